"""Each kind of measurement, tiny, in this process: the numbers are there, and they are of the right thing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.measure import measure, memory, races
from benchmarks.peers import OWN_FORWARD, PEERS, Contender, Race
from efficient_attn.benchmarking import decode, instruments, timing
from efficient_attn.benchmarking.cells import (
    CAPACITY,
    CAPACITY_FORWARD,
    DECODE,
    FORWARD,
    MEMORY,
    TRAINING,
    Cell,
)
from efficient_attn.benchmarking.records import OK, WRONG
from efficient_attn.benchmarking.timing import Effort

TINY = Cell("tiny", "window 256, causal", FORWARD, 96, "masked SDPA", heads=2, effort="quick")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 0.0)
    for module in (instruments, decode):
        monkeypatch.setattr(module, "EFFORTS", {"quick": Effort(seconds=0.05, least=3, most=5)})


@pytest.mark.parametrize("work", [FORWARD, TRAINING])
def test_a_race_gives_times_errors_and_a_ratio(work: str) -> None:
    outcome = measure(replace(TINY, work=work))
    assert outcome.status == OK
    result = outcome.result
    json.dumps(result, allow_nan=False)
    assert len(result["ours"]["seconds"]) == len(result["peer"]["seconds"]) >= 3
    assert min(result["ours"]["seconds"] + result["peer"]["seconds"]) > 0
    assert 0 < result["ratio"]["low"] <= result["ratio"]["median"] <= result["ratio"]["high"]
    kinds = {"output"} if work == FORWARD else {"output", "gradient"}
    for side in ("ours", "peer"):
        assert set(result[side]["errors"]) == kinds
        assert max(result[side]["errors"].values()) < 1e-5
    assert result["ours"]["backend"] == "blocked"
    assert "window_size=256" in result["ours"]["what"]
    assert result["wrong"] == []


def test_a_wrong_peer_is_marked_and_still_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(race: Race) -> Contender:
        return Contender(lambda: torch.empty_like(race.v), race.inputs, race.mechanism)

    monkeypatch.setattr(races, "PEERS", {**PEERS, "planted": nan})
    outcome = measure(replace(TINY, peer="planted"))
    assert outcome.status == WRONG
    assert outcome.result["wrong"] == ["planted"]
    assert "planted is wrong" in outcome.reason
    assert outcome.result["peer"]["errors"] == {"output": None}, "JSON has no infinity"
    assert len(outcome.result["peer"]["seconds"]) >= 3
    json.dumps(outcome.result, allow_nan=False)


def test_forward_and_backward_against_our_own_forward_is_a_share_of_it() -> None:
    outcome = measure(replace(TINY, work=TRAINING, peer=OWN_FORWARD, length=256))
    assert outcome.status == OK
    assert 0.05 < outcome.result["ratio"]["median"] < 1
    assert set(outcome.result["ours"]["errors"]) == {"output", "gradient"}


def test_half_precision_is_measured_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = races.PEERS["masked SDPA"]

    def spy(race: Race) -> Contender:
        seen.append(race.q.dtype)
        return original(race)

    monkeypatch.setattr(races, "PEERS", {**PEERS, "masked SDPA": spy})
    outcome = measure(replace(TINY, dtype="bfloat16"))
    assert outcome.status == OK
    assert seen == [torch.bfloat16]
    assert 1e-4 < outcome.result["ours"]["errors"]["output"] < 2e-2


def test_the_peak_is_that_of_what_was_alive_at_once() -> None:
    def work() -> None:
        for _ in range(5):
            once = torch.ones(1 << 20)
            twice = once + 1
            del once, twice

    assert 0 <= memory.peak_allocated(work) - (8 << 20) < 1024, "two of 4 MiB, and a scalar"
    resident = memory.peak_resident(lambda: torch.ones(64 << 20))["resident_bytes"]
    assert resident > 0.9 * (256 << 20)


def test_the_peak_of_a_training_step_counts_output_and_gradients_but_not_inputs() -> None:
    outcome = measure(Cell("memory", "linear, causal", MEMORY, 2048, heads=2))
    result = outcome.result
    assert outcome.status == OK
    assert result["inputs_bytes"] == 3 * 2 * 2048 * 64 * 4
    assert 4 / 3 * result["inputs_bytes"] < result["allocated_bytes"] < 20 * result["inputs_bytes"]
    assert result["resident_bytes"] >= 0  # this process may have had enough already; a fresh one has not


@pytest.mark.parametrize("work", [CAPACITY, CAPACITY_FORWARD])
def test_capacity_runs_once_and_checks_some_rows(work: str) -> None:
    outcome = measure(Cell("capacity", "window 256, causal", work, 700, heads=2))
    assert outcome.status == OK
    assert outcome.result["error"] < 1e-5
    assert outcome.result["seconds"] > 0


def test_capacity_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(module: torch.nn.Module, inputs: Any, out: Any) -> Any:
        return 1.01 * out

    def broken(cell: Cell) -> torch.nn.Module:
        mechanism = memory_subject(cell)
        mechanism.register_forward_hook(too_large)
        return mechanism

    memory_subject = memory.subject
    monkeypatch.setattr(memory, "subject", broken)
    outcome = measure(Cell("capacity", "window 256, causal", CAPACITY_FORWARD, 300, heads=2))
    assert outcome.status == WRONG
    assert 5e-3 < outcome.result["error"] < 2e-2


@pytest.mark.parametrize("name", ["window 256, causal", "linear, causal", "full, causal"])
def test_decoding_is_timed_at_each_position_after_a_check(name: str) -> None:
    outcome = measure(Cell("decode", name, DECODE, 300, heads=2, effort="quick", positions=(10, 300)))
    assert outcome.status == OK, outcome.reason
    assert set(outcome.result["positions"]) == {"10", "300"}
    for found in outcome.result["positions"].values():
        assert min(found["seconds"]) > 0
    assert outcome.result["positions"]["10"]["ratio"]["median"] == 1
    assert max(outcome.result["errors"].values()) < 1e-5
    sizes = [found["state_bytes"] for found in outcome.result["positions"].values()]
    assert (sizes[0] == sizes[1]) == (name != "full, causal")


def test_work_that_nobody_measures_is_refused() -> None:
    with pytest.raises(ValueError, match="dreaming"):
        measure(replace(TINY, work="dreaming"))
