"""What a GPU run measures, on a CPU with the same instruments' stand-ins: everything but the calls of CUDA."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.measure import accelerated, roofline
from benchmarks.measure.accelerated import measure, strips_of, wrong_ones
from benchmarks.peers import PEERS, Contender, Race
from benchmarks.subjects import subject
from efficient_attn.benchmarking import instruments
from efficient_attn.benchmarking.cells import (
    BACKWARD,
    CAPACITY,
    DECODE,
    FORWARD,
    RACES,
    TABLES,
    TRAINING,
    Cell,
)
from efficient_attn.benchmarking.records import ERROR, OK, OOM, WRONG
from efficient_attn.benchmarking.worker import Unsupported

TINY = Cell("tiny", "window 256, causal", FORWARD, 96, "masked SDPA", heads=2, head_dim=16, effort="dry")


@pytest.fixture
def with_instruments(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Instruments of a CPU, with some of them replaced."""

    def put(**changes: Any) -> None:
        changed = replace(instruments.INSTRUMENTS["cpu"], **changes)
        for module in (accelerated, roofline):
            monkeypatch.setattr(module, "INSTRUMENTS", {"cpu": changed})

    return put


def planted(monkeypatch: pytest.MonkeyPatch, build: Callable[[Race], Contender]) -> Cell:
    monkeypatch.setattr(accelerated, "PEERS", {**PEERS, "planted": build})
    return replace(TINY, peer="planted")


@pytest.mark.parametrize("work", RACES)
def test_a_race_gives_times_errors_memory_and_the_roofline(work: str) -> None:
    outcome = measure(replace(TINY, work=work))
    assert outcome.status == OK, outcome.reason
    result = outcome.result
    json.dumps(result, allow_nan=False)
    kinds = {"output"} if work == FORWARD else {"output", "gradient"}
    for side in ("ours", "peer"):
        found = result[side]
        assert set(found["errors"]) == kinds
        assert max(found["errors"].values()) < 1e-5
        assert len(found["seconds"]) == 3
        assert found["peak_bytes"] > 0
        assert found["prepared_seconds"] > 0
    assert result["ours"]["backend"] == "blocked"
    assert result["inputs_bytes"] == 3 * 2 * 96 * 16 * 4
    assert 0 < result["ratio"]["low"] <= result["ratio"]["median"] <= result["ratio"]["high"]
    roof = result["roofline"]
    assert roof["fraction"] == pytest.approx(roof["floor_seconds"] / sorted(result["ours"]["seconds"])[1])
    assert "graph" not in result, "a CPU has none"


def test_without_a_peer_ours_is_measured_alone() -> None:
    outcome = measure(replace(TINY, peer=""))
    assert outcome.status == OK
    assert "peer" not in outcome.result
    assert "ratio" not in outcome.result
    assert outcome.result["roofline"]["fraction"] > 0


@pytest.mark.parametrize("who", ["ours", "planted"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB"), OOM),
        (ValueError("no such shape"), ERROR),
    ],
)
def test_who_failed_is_said(who: str, error: Exception, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(race: Race) -> Contender:
        raise error

    cell = planted(monkeypatch, fails if who == "planted" else PEERS["masked SDPA"])
    if who == "ours":
        monkeypatch.setattr(accelerated, "ours_in", fails)
    outcome = measure(cell)
    assert outcome.status == status
    assert outcome.reason.startswith(f"{who}: {type(error).__name__}: ")


def test_memory_that_runs_out_while_a_backward_pass_is_prepared_is_the_peers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def build(race: Race) -> Contender:
        return Contender(lambda: Exploding.apply(race.mechanism(*race.inputs)), race.inputs, race.mechanism)

    outcome = measure(replace(planted(monkeypatch, build), work=BACKWARD))
    assert outcome.status == OOM
    assert outcome.reason.startswith("planted: ")


def test_a_peer_that_is_not_supported_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(race: Race) -> Contender:
        raise Unsupported("not on Tuesdays")

    with pytest.raises(Unsupported, match="Tuesdays"):
        measure(planted(monkeypatch, build))


def test_in_half_precision_ours_may_not_round_much_worse_than_a_right_peer() -> None:
    fine, worse = {"output": 1.4e-3, "gradient": 2e-3}, {"output": 1.4e-3, "gradient": 4e-3}
    peer = {"output": 1e-3, "gradient": 2e-3}
    half = torch.bfloat16
    assert wrong_ones({"ours": fine, "flex": peer}, half) == {}
    assert list(wrong_ones({"ours": worse, "flex": peer}, half)) == ["ours"]
    assert "worse than flex" in wrong_ones({"ours": worse, "flex": peer}, half)["ours"]
    assert wrong_ones({"ours": worse, "flex": peer}, half, comparable=False) == {}
    assert wrong_ones({"ours": {"output": 2e-7}, "flex": {"output": 1e-7}}, torch.float32) == {}
    far_off = {"output": 0.5, "gradient": 0.5}
    assert list(wrong_ones({"ours": fine, "flex": far_off}, half)) == ["flex"], "a wrong peer is no measure"
    assert list(wrong_ones({"ours": far_off, "flex": peer}, half)) == ["ours"]


def test_a_wrong_peer_is_marked_and_still_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(race: Race) -> Contender:
        return Contender(lambda: torch.empty_like(race.v), race.inputs, race.mechanism)

    outcome = measure(planted(monkeypatch, nan))
    assert outcome.status == WRONG
    assert outcome.result["wrong"] == ["planted"]
    assert len(outcome.result["peer"]["seconds"]) == 3
    json.dumps(outcome.result, allow_nan=False)


def rows(cell: Cell) -> list[int]:
    return [row for strip in strips_of(cell) for row in range(strip.start, strip.stop)]


def test_all_rows_of_a_short_sequence_are_compared_and_256_of_a_long_one(
    with_instruments: Callable[..., None],
) -> None:
    with_instruments(free_bytes=lambda: 80 << 30)
    cell = replace(TINY, heads=16, length=4096)
    assert rows(cell) == list(range(4096))
    for length, count in ((65_536, 256), (262_144, 64), (1_048_576, 16)):
        found = rows(replace(cell, length=length))
        assert len(set(found)) == count
        assert (found[0], found[-1]) == (0, length - 1)
        assert 8 * 16 * length * count <= accelerated.LARGEST_MATRIX


def test_little_memory_compares_fewer_rows(with_instruments: Callable[..., None]) -> None:
    with_instruments(free_bytes=lambda: 8 << 30)
    assert len(rows(replace(TINY, heads=16, length=4096))) == 256
    with_instruments(free_bytes=lambda: 0)
    assert len(rows(replace(TINY, heads=16, length=4096))) == 16


def test_a_short_call_is_timed_as_a_graph_too(with_instruments: Callable[..., None]) -> None:
    with_instruments(captured=lambda work: work)
    result = measure(TINY).result
    assert set(result["graph"]["seconds"]) == {"ours", "masked SDPA"}
    assert result["graph"]["ratio"]["median"] > 0
    assert "graph" not in measure(replace(TINY, work=TRAINING)).result


def test_a_capture_that_fails_costs_the_graph_and_the_process(
    with_instruments: Callable[..., None],
) -> None:
    def fails(work: Callable[[], object]) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with_instruments(captured=fails)
    outcome = measure(TINY)
    assert outcome.status == OK
    assert outcome.spent
    assert "stream is capturing" in outcome.result["graph"]["reason"]
    assert len(outcome.result["ours"]["seconds"]) == 3


def test_a_long_call_needs_no_graph(
    with_instruments: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_instruments(captured=lambda work: work)
    monkeypatch.setattr(accelerated, "GRAPH_BELOW", 0.0)
    assert "graph" not in measure(TINY).result


def test_what_cannot_be_avoided_is_counted_as_the_plan_counts_it() -> None:
    n, heads, size = 4096, 16, 128
    cell = Cell("r", "window 256, causal", FORWARD, n, heads=heads, head_dim=size, dtype="bfloat16")
    tensor = heads * n * size * 2
    pairs = n * 256 - 256 * 255 // 2
    forward = roofline.unavoidable(cell, subject(cell))
    assert (forward.flops, forward.bytes) == (4 * heads * pairs * size, 4 * tensor)
    backward = roofline.unavoidable(replace(cell, work=BACKWARD), subject(cell))
    assert (backward.flops, backward.bytes) == (2.5 * forward.flops, 8 * tensor)
    both = roofline.unavoidable(replace(cell, work=TRAINING), subject(cell))
    assert (both.flops, both.bytes) == (3.5 * forward.flops, 12 * tensor)
    linear = replace(cell, subject="linear, causal", work=BACKWARD)
    assert roofline.unavoidable(linear, subject(linear)).bytes == 7 * tensor

    roof = roofline.Roofline(flops_per_second=790e12, bytes_per_second=4.3e12)
    assert roofline.Work(790e9, 43).floor(roof) == pytest.approx(1e-3)
    assert roofline.Work(79, 43 * 10**8).floor(roof) == pytest.approx(1e-3)


def test_the_published_floor_of_a_window_comes_out() -> None:
    cell = Cell("r", "window 1024, causal", FORWARD, 65_536, heads=16, head_dim=64, dtype="bfloat16")
    roof = roofline.Roofline(790e12, 4.3e12)
    assert roofline.unavoidable(cell, subject(cell)).floor(roof) == pytest.approx(0.35e-3, rel=0.02)
    linear = replace(cell, subject="linear, causal", head_dim=128)
    assert roofline.unavoidable(linear, subject(linear)).floor(roof) == pytest.approx(0.25e-3, rel=0.02)


def test_the_roofline_is_measured_once_a_process() -> None:
    assert roofline.roofline("cpu", "float32") is roofline.roofline("cpu", "float32")
    assert roofline.roofline("cpu", "float32").flops_per_second > 1e6


@pytest.mark.parametrize("name", ["window 1024, causal", "linear, causal", "linformer 256"])
def test_capacity_compares_the_peak_with_what_must_be_held(name: str) -> None:
    cell = replace(TINY, subject=name, work=CAPACITY, peer="", length=600)
    outcome = measure(cell)
    assert outcome.status == OK, outcome.reason
    assert outcome.result["error"] < 1e-5
    assert 1 <= outcome.result["peak_ratio"] < 20


def test_capacity_of_a_perfect_pass_is_one(
    with_instruments: Callable[..., None],
) -> None:
    tensor = 2 * 600 * 16 * 4

    def peak(work: Callable[[], object]) -> int:
        work()
        return 5 * tensor  # the output, its gradient, and three gradients

    with_instruments(peak_bytes=peak)
    cell = replace(TINY, work=CAPACITY, peer="", length=600)
    assert measure(cell).result["peak_ratio"] == 1


def test_capacity_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(cell: Cell) -> torch.nn.Module:
        mechanism = subject(cell)
        mechanism.register_forward_hook(lambda module, inputs, out: 1.01 * out)
        return mechanism

    monkeypatch.setattr(accelerated, "subject", broken)
    assert measure(replace(TINY, work=CAPACITY, peer="", length=300)).status == WRONG


def test_the_parameters_are_in_the_dtype_of_the_cell() -> None:
    cell = replace(TINY, subject="linformer 256", dtype="bfloat16")
    assert {p.dtype for p in accelerated.prepared_subject(cell).parameters()} == {torch.bfloat16}


def test_tables_are_timed_where_kernels_need_them() -> None:
    with pytest.raises(Unsupported, match="blocked runs here"):
        measure(replace(TINY, subject="bigbird b64", work=TABLES, peer=""))


def test_decoding_and_nonsense() -> None:
    outcome = measure(replace(TINY, work=DECODE, peer="", length=20, positions=(5, 20)))
    assert outcome.status == OK, outcome.reason
    with pytest.raises(ValueError, match="dreaming"):
        measure(replace(TINY, work="dreaming"))
