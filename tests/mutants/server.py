"""A fork server: torch is imported once, and each mutant gets a process of its own that imports the package."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

# What children would otherwise import one by one: the package's dependencies, and those of the tests.
import hypothesis
import numpy
import pytest
import sympy
import torch
import torch._dynamo
import torch.nn.attention.flex_attention
import torch.utils.flop_counter

from .battery import Check, Result, run
from .mutant import PACKAGE, ROOT, Mutant

torch.set_num_threads(1)

PRELOADED = (hypothesis, numpy, pytest, sympy, torch)
SECONDS = 900
"""What one process may take: more than its whole battery."""


@dataclass(frozen=True)
class Task:
    """The checks to run against a mutant, or against the true code."""

    mutant: Mutant | None
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a task: `violation` is None if everything held."""

    task: Task
    violation: str | None
    cases: int
    seconds: float
    """Of processor time, which does not depend on what else the machine does."""


def in_forks(tasks: Iterable[Task], jobs: int) -> Iterator[Outcome]:
    """The outcomes, as they come, of `jobs` processes at a time."""
    waiting, running = iter(tasks), dict[Connection, tuple[Task, Any, float]]()
    while True:
        while len(running) < jobs and (task := next(waiting, None)) is not None:
            connection, process = _fork(_work, task)
            running[connection] = task, process, time.monotonic()
        if not running:
            return
        ready = wait(list(running), timeout=1.0)
        for connection in list(running):
            task, process, start = running[connection]
            seconds = time.monotonic() - start
            if connection in ready:
                result = _received(connection, process)
            elif seconds > SECONDS:
                process.kill()
                result = Result(0, f"timeout: more than {SECONDS} s")
            else:
                continue
            process.join()
            del running[connection]
            yield Outcome(task, result.violation, result.cases, result.seconds or seconds)


def ask(question: Callable[[], Any]) -> Any:
    """The answer of a function that imports the package, which this process must not."""
    connection, process = _fork(_answer, question)
    answer = connection.recv()
    process.join()
    return answer


def _fork(target: Callable[..., None], argument: Any) -> tuple[Connection, Any]:
    assert PACKAGE not in sys.modules
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=target, args=(argument, theirs))
    process.start()
    theirs.close()
    return ours, process


def _received(connection: Connection, process: Any) -> Result:
    try:
        return connection.recv()
    except EOFError:
        process.join()
        return Result(0, f"crash: the process ended with {process.exitcode}")


def _answer(question: Callable[[], Any], connection: Connection) -> None:
    sys.path.insert(0, str(ROOT))
    connection.send(question())


def _work(task: Task, connection: Connection) -> None:
    sys.path.insert(0, str(ROOT))
    if task.mutant is not None:
        task.mutant.install()
    total = Result()
    for check in task.checks:
        try:
            result = run(check)
        except Exception as error:
            result = Result(0, f"{check}: {type(error).__name__}: {error}")
        total.cases += result.cases
        total.violation = result.violation
        if result.violation is not None:
            break
    total.seconds = time.process_time()
    connection.send(total)
