"""The plan of a GPU: the targets that were promised, and nothing that cannot be measured."""

from __future__ import annotations

import pytest

from benchmarks import plan_gpu
from benchmarks.measure import tuning
from benchmarks.peers import PEERS
from benchmarks.subjects import SUBJECTS
from efficient_attn.benchmarking.cells import (
    BACKWARD,
    CAPACITY,
    FORWARD,
    RACES,
    TABLES,
    TRAINING,
    TUNE,
    Cell,
    Target,
)

FULL = plan_gpu.cells(plan_gpu.SECTIONS, "full")
JUDGED = 65_536


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("subject", "work", "peer", "bound"),
    [
        ("full, causal", FORWARD, "SDPA flash", 0.97),
        ("full, causal", FORWARD, "SDPA cuDNN", 0.97),
        ("full, causal", TRAINING, "SDPA efficient", 0.97),
        ("window 1024, causal", FORWARD, "flex", 1.25),
        ("window 1024, causal", FORWARD, "FlashAttention-2", 1.4),
        ("window 1024, causal", BACKWARD, "flex", 1.2),
        ("window 256, causal", FORWARD, "flex", 1.4),
        ("bigbird b64", FORWARD, "flex", 1.2),
        ("bigbird b64", BACKWARD, "flex", 1.2),
        ("longformer 256 + 64", FORWARD, "flex", 1.2),
        ("longformer 256 + 64", BACKWARD, "flex", 1.2),
        ("linear, causal", FORWARD, "fla raw", 1.5),
        ("linear, causal", FORWARD, "fla", 3),
        ("linear, causal", TRAINING, "fla raw", 2),
        ("linear, causal", TRAINING, "fla", 4),
        ("linear", FORWARD, "two products", 2),
        ("linformer 256", FORWARD, "projected SDPA", 1 / 1.1),
    ],
)
def test_a_promised_comparison_is_planned_with_its_target(
    subject: str, work: str, peer: str, bound: float, head_dim: int
) -> None:
    found = [
        cell
        for cell in FULL
        if (cell.subject, cell.work, cell.peer, cell.length, cell.head_dim)
        == (subject, work, peer, JUDGED, head_dim)
    ]
    assert len(found) == 1
    assert found[0].target == plan_gpu.target_of(found[0]) == Target(bound)
    assert (found[0].dtype, found[0].batch, found[0].heads, found[0].device) == ("bfloat16", 1, 16, "cuda")


def test_performer_is_judged_at_its_head_size_and_long_sequences_by_their_memory() -> None:
    judged = [c for c in FULL if c.peer == "performer-pytorch" and c.target is not None]
    assert [(c.head_dim, c.length, c.target) for c in judged] == [(64, JUDGED, Target(10))]
    longest = [c for c in FULL if c.work == CAPACITY]
    assert {c.length for c in longest} == {1_048_576}
    assert {c.target for c in longest} == {Target(1.3, at_least=False)}
    assert {c.subject: c.target for c in FULL if c.work == TABLES} == {
        "bigbird b64": Target(0.05, at_least=False),
        "longformer 256 + 64": Target(0.05, at_least=False),
    }


def test_every_length_every_head_size_and_every_pass_is_measured() -> None:
    alone = {(c.subject, c.length, c.head_dim, c.work) for c in FULL if c.section == "alone"}
    for subject in plan_gpu.SUBJECTS:
        for length in (4096, 16_384, 65_536, 262_144):
            assert {(subject, length, d, w) for d in (64, 128) for w in RACES} <= alone


@pytest.mark.parametrize("effort", plan_gpu.SIZES)
def test_a_plan_is_sound(effort: str) -> None:
    planned = [*plan_gpu.cells(plan_gpu.SECTIONS, effort), *plan_gpu.tuning(effort)]
    assert len(set(planned)) == len(planned), "nothing twice"
    assert {c.section for c in planned} == {*plan_gpu.SECTIONS, "tune"}
    for cell in planned:
        assert cell.effort == effort
        assert cell.subject in SUBJECTS
        assert cell.device == ("cpu" if effort == "dry" else "cuda")
        if cell.work in RACES:
            assert not cell.peer or cell.peer in PEERS
        assert (effort == "full") or cell.target is None, "only a full run is judged"
        assert plan_gpu.target_of(cell) == cell.target


def test_a_dry_run_is_short_and_has_every_section_and_peer_of_a_quick_one() -> None:
    dry, quick = (plan_gpu.cells(plan_gpu.SECTIONS, effort) for effort in ("dry", "quick"))
    assert max(c.length for c in dry) <= 512
    assert [(c.section, c.work, c.peer) for c in dry] == [(c.section, c.work, c.peer) for c in quick]


def test_every_kernel_that_has_configs_is_tuned_by_something() -> None:
    shipped = {f"{family}.{kernel}" for family, table in tuning.tables().items() for kernel in table}
    assert set(tuning.UNTIMED) < shipped
    assert shipped - set(tuning.UNTIMED) <= set(tuning.TIMED_BY), "a kernel that nobody tunes"
    tuned = {c.peer for c in plan_gpu.tuning("full")}
    assert tuned == set(tuning.TIMED_BY)
    assert all(c.work == TUNE and c.dtype == "bfloat16" for c in plan_gpu.tuning("dry"))


def test_the_target_of_a_cell_that_the_plan_does_not_have_is_none() -> None:
    assert plan_gpu.target_of(Cell("window_256", "window 256, causal", FORWARD, 77, "flex")) is None
    assert plan_gpu.target_of(Cell("x", "full", FORWARD, 77, effort="of yesterday")) is None
