"""The plan: what the benchmarks promise to measure, and with which targets."""

from __future__ import annotations

import pytest

from benchmarks import plan
from benchmarks.peers import OWN_FORWARD, PEERS
from benchmarks.subjects import SUBJECTS, is_subquadratic
from efficient_attn import MECHANISMS
from efficient_attn.benchmarking.cells import (
    CAPACITY,
    CAPACITY_FORWARD,
    FORWARD,
    RACES,
    TRAINING,
    Cell,
    Target,
)

FULL = plan.cells(plan.SECTIONS, (1, 2), "full")
W, L, B = "window 256, causal", "linear, causal", "bigbird b64"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("section", "subject", "work", "length", "peer", "bound"),
    [
        ("window", W, FORWARD, 16_384, "masked SDPA", 28),
        ("window", W, FORWARD, 16_384, "flex", 1.8),
        ("window", W, TRAINING, 4096, "masked SDPA", 6.5),
        ("linear", L, FORWARD, 16_384, "cumsum", 60),
        ("linear", L, FORWARD, 16_384, "chunks", 3),
        ("linear", L, FORWARD, 16_384, "fast-transformers", 2),
        ("linear", L, TRAINING, 16_384, "chunks", 3),
        ("bigbird", B, FORWARD, 16_384, "masked SDPA", 15),
        ("bigbird", B, FORWARD, 16_384, "flex", 1.5),
        ("bigbird", B, TRAINING, 16_384, OWN_FORWARD, 0.25),
        ("performer", "performer 256, causal", FORWARD, 16_384, "performer-pytorch", 1),
        ("linformer", "linformer 256", FORWARD, 16_384, "linformer", 1),
        ("longformer", "longformer 256 + 64", FORWARD, 16_384, "local-attention", 1),
        ("sparse", "strided 128, causal", FORWARD, 16_384, "masked SDPA", 1),
        ("sparse", "fixed 128, causal", FORWARD, 16_384, "masked SDPA", 1),
        ("full", "full", FORWARD, 128, "SDPA", 0.95),
        ("full", "full, causal", FORWARD, 4096, "SDPA", 0.95),
        ("every", B, FORWARD, 1024, "masked SDPA", 1 / 1.3),
        ("every", L, TRAINING, 1024, "masked SDPA", 1 / 1.3),
        ("every", "linear", FORWARD, 1024, "SDPA", 1 / 1.3),
    ],
)
def test_a_promised_comparison_is_planned_with_its_target(
    section: str, subject: str, work: str, length: int, peer: str, bound: float, threads: int
) -> None:
    cell = Cell(section, subject, work, length, peer, threads=threads)
    assert cell in FULL
    assert plan.target_of(cell) == Target(bound)


def test_half_precision_is_compared_in_half_precision() -> None:
    cell = Cell("bf16", W, FORWARD, 16_384, "masked SDPA", dtype="bfloat16")
    assert cell in FULL
    assert plan.target_of(cell) == Target(15)


@pytest.mark.parametrize("subject", [W, L])
@pytest.mark.parametrize("length", [1024, 4096, 16_384])
def test_window_and_linear_are_compared_at_every_length(subject: str, length: int) -> None:
    section = "window" if subject == W else "linear"
    peers = {"masked SDPA", "flex"} if subject == W else {"cumsum", "chunks", "fast-transformers"}
    planned = {c.peer for c in FULL if (c.section, c.length, c.work) == (section, length, FORWARD)}
    assert peers <= planned


def test_every_mechanism_is_in_every_section_that_is_about_all() -> None:
    def classes(cells: list[Cell]) -> set[type]:
        return {type(SUBJECTS[cell.subject](64, 8, 64)) for cell in cells}

    subquadratic = {type(SUBJECTS[name](64, 8, 64)) for name in SUBJECTS if is_subquadratic(name)}
    assert subquadratic == set(MECHANISMS.values()) - {MECHANISMS["full"], MECHANISMS["flash"]}
    assert classes([c for c in FULL if c.section in ("every", "full")]) == set(MECHANISMS.values())
    assert classes([c for c in FULL if c.work == CAPACITY and c.length == 262_144]) == subquadratic
    for length in (4096, 65_536):
        assert classes([c for c in FULL if c.section == "memory" and c.length == length]) == subquadratic
    assert {c.subject for c in FULL if c.work == CAPACITY_FORWARD and c.length == 1_048_576} == {W, L}
    assert {W, L, "performer 256, causal"} <= {c.subject for c in FULL if c.section == "decode"}


@pytest.mark.parametrize("effort", plan.SIZES)
def test_a_plan_is_sound(effort: str) -> None:
    planned = plan.cells(plan.SECTIONS, (2, 1, 1), effort)
    assert len(set(planned)) == len(planned), "nothing twice"
    for cell in planned:
        assert cell.effort == effort
        assert cell.subject in SUBJECTS
        assert (cell.peer in (*PEERS, OWN_FORWARD)) == (cell.work in RACES)
        assert plan.target_of(cell) == cell.target
    once = [c.threads for c in planned if c.section in plan.MOST_THREADS]
    assert set(once) == {2}
    assert {c.threads for c in planned if c.section in plan.FEWEST_THREADS} == {1}
    assert {c.threads for c in planned if c.work in RACES} == {1, 2}


def test_a_quick_run_is_short_and_judges_nothing() -> None:
    quick = plan.cells(plan.SECTIONS, (1,), "quick")
    assert {c.section for c in quick} == set(plan.SECTIONS)
    assert all(c.target is None for c in quick)
    assert max(c.length for c in quick if c.work in RACES) <= 1024


def test_the_target_of_a_cell_that_the_plan_no_longer_has_is_none() -> None:
    assert plan.target_of(Cell("window", W, FORWARD, 77, "masked SDPA")) is None
