"""The loop of every benchmark command: what is recorded already is not measured again."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable
from typing import Any

from .cells import Cell
from .environment import environment, fingerprint
from .records import ERROR, Record, Records, key_of
from .worker import Measure, Worker, threads_and_device


def measure_all(
    cells: Iterable[Cell],
    records: Records,
    measure: Measure,
    *,
    timeout: float,
    again: bool | Container[str],
    report: Callable[[Cell, Record, bool], None],
    complain: Callable[[str], None],
    seconds: float | None = None,
    describe: Callable[[str], dict[str, Any]] = environment,
    shared_by: Callable[[Cell], object] = threads_and_device,
    begin: Callable[[Cell], object] = lambda cell: None,
) -> list[Cell]:
    """Measure each cell that has no record yet, append its record, and report it; returns those not come to.

    Args:
        measure: a function at the top of a module; it runs in a worker.
        timeout: seconds that one cell may take.
        again: measure also what has a record, or a record of these statuses. An error is measured again in any case.
        report: told each cell's record, and whether it was measured just now.
        complain: told of each damaged line.
        seconds: when they are over, no further cell is begun.
        describe: the environment of a device.
        shared_by: cells for which it gives the same share a process.
        begin: told each cell before it is measured.
    """
    began, left = time.monotonic(), []
    known, complaints = records.by_key()
    for complaint in complaints:
        complain(complaint)
    print_of_worker: dict[str, Any] = {}
    with Worker(measure, timeout, shared_by) as worker:
        for cell in cells:
            described = describe(cell.device)  # of now: load and date change, and sources may
            if fingerprint(described) != print_of_worker:
                worker.stop()
                print_of_worker = fingerprint(described)
            key = key_of(cell, print_of_worker)
            if is_done(known.get(key), again):
                report(cell, known[key], False)
                continue
            if seconds is not None and time.monotonic() - began > seconds:
                left.append(cell)
                continue
            begin(cell)
            outcome = worker.run(cell)
            known[key] = records.append(
                {
                    "key": key,
                    "cell": cell.identity,
                    "target": None if cell.target is None else str(cell.target),
                    "environment": described,
                    "status": outcome.status,
                    "reason": outcome.reason,
                    "result": outcome.result,
                }
            )
            report(cell, known[key], True)
    return left


def is_done(record: Record | None, again: bool | Container[str] = False) -> bool:
    """Whether a record stands for its cell: it is no error, and not to be measured again."""
    if record is None or record["status"] == ERROR:
        return False
    return not (again if isinstance(again, bool) else record["status"] in again)
