"""The worker: whatever a cell does to its process is an outcome, and the next cell is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

from efficient_attn.benchmarking.cells import FORWARD, MEMORY, Cell
from efficient_attn.benchmarking.environment import available_bytes
from efficient_attn.benchmarking.records import ERROR, OK, OOM, TIMEOUT, UNSUPPORTED
from efficient_attn.benchmarking.worker import Outcome, Worker, _attempt
from tests.benchmarks.measurers import behave


def cell(behaviour: str, work: str = FORWARD, threads: int = 1) -> Cell:
    return Cell("worker", behaviour, work, 16, threads=threads)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(behave, timeout=30) as running:
        yield running


@pytest.mark.parametrize(
    ("behaviour", "status", "reason"),
    [
        ("fine", OK, ""),
        ("unsupported", UNSUPPORTED, "flex has no backward pass here"),
        ("raises", ERROR, "ValueError: a mistake in two lines"),
        ("allocates", OOM, "can't allocate memory"),
        ("out of memory", OOM, "MemoryError"),
        ("killed", OOM, "was killed"),
        ("exits", ERROR, "exit code 3"),
    ],
)
def test_what_becomes_of_a_cell(worker: Worker, behaviour: str, status: str, reason: str) -> None:
    outcome = worker.run(cell(behaviour))
    assert outcome.status == status
    assert reason in outcome.reason
    assert "\n" not in outcome.reason
    assert worker.run(cell("fine")).status == OK, "the next cell is measured, whatever the last one did"


def test_the_traceback_of_a_mistake_is_kept(worker: Worker) -> None:
    assert "measurers.py" in worker.run(cell("raises")).result["traceback"]


def test_one_process_serves_many_cells_but_memory_and_other_threads_get_a_fresh_one(worker: Worker) -> None:
    def process(*arguments: object) -> int:
        return worker.run(cell("fine", *arguments)).result["pid"]  # type: ignore[arg-type]

    first = process()
    assert process() == first
    alone = process(MEMORY)
    assert alone != first
    assert process(MEMORY) != alone
    two = process(FORWARD, 2)
    assert process(FORWARD, 2) == two
    assert len({first, alone, two, os.getpid()}) == 4


def test_a_cell_that_hangs_is_ended_in_time_with_its_whole_group() -> None:
    with Worker(behave, timeout=30) as running:
        group = running.run(cell("fine")).result["group"]
        assert group != os.getpgid(0)
        running.timeout = 0.3
        began = time.monotonic()
        outcome = running.run(cell("hangs"))
        assert time.monotonic() - began < 10
        assert outcome.status == TIMEOUT
        assert "0.3 s" in outcome.reason
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)


def test_what_torch_says_when_it_gets_no_memory_is_understood() -> None:
    def more_than_any_machine_has(cell: Cell) -> Outcome:
        return Outcome(result={"bytes": torch.empty(1 << 50, dtype=torch.uint8).nbytes})

    outcome = _attempt(more_than_any_machine_has, cell("fine"))
    assert outcome.status == OOM, outcome
    assert outcome.reason


def test_a_child_may_not_take_more_memory_than_there_is(worker: Worker) -> None:
    limit = worker.run(cell("limit")).result["limit"]
    free = available_bytes()
    assert (free is None) == (limit is None)
    if free is not None and limit is not None:
        assert 0 < limit < 1.2 * free
