"""Measures cells in a child process, so that one that hangs, crashes or eats the memory costs only itself."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from .cells import ALONE, Cell
from .environment import available_bytes
from .records import ERROR, OK, OOM, TIMEOUT, UNSUPPORTED

Measure = Callable[[Cell], "Outcome"]
RESERVE = 1 << 30  # bytes left to everybody else, the parent included


class Unsupported(Exception):
    """This cannot be measured here, and why: not installed, not implemented, not built."""


@dataclass
class Outcome:
    """What became of a cell: a status of `records.STATUSES`, why if it is not OK, and the numbers."""

    status: str = OK
    reason: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    spent: bool = False
    """Whether the process that measured it should measure nothing more."""


def threads_and_device(cell: Cell) -> object:
    """What a process is set up for."""
    return cell.threads, cell.device


class Worker:
    """Runs `measure` on one cell after another in a child that is replaced when it must be.

    Args:
        measure: a function at the top of a module, so that it can be sent to the child.
        timeout: seconds that a cell may take, the import of torch included.
        shared_by: cells for which it gives the same share a process.
    """

    def __init__(
        self, measure: Measure, timeout: float, shared_by: Callable[[Cell], object] = threads_and_device
    ) -> None:
        self.measure = measure
        self.timeout = timeout
        self.shared_by = shared_by
        self._process: Any = None
        self._connection: Connection | None = None
        self._started_for: object = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def run(self, cell: Cell) -> Outcome:
        """The outcome of `cell`. Whatever happens to the child is one, too."""
        if cell.work in ALONE or self.shared_by(cell) != self._started_for:
            self.stop()
        connection = self._connection or self._start(cell)
        try:
            connection.send(cell)
            if not connection.poll(self.timeout):
                self.stop()
                return Outcome(TIMEOUT, f"not done after {self.timeout:g} s")
            outcome: Outcome = connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            outcome = _of_exit_code(self._process.exitcode)
            self.stop()
            return outcome
        # What failed on a GPU may have left its memory full, or its context broken for good.
        if outcome.spent or (cell.device != "cpu" and outcome.status in (OOM, ERROR)):
            self.stop()
        return outcome

    def stop(self) -> None:
        """End the child, and with it the compilers that it may have started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # in case it had not become the leader of its group yet
        self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process, self._connection, self._started_for = None, None, None

    def _start(self, cell: Cell) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.measure, cell.device), daemon=True)
        # The child inherits the mask: Ctrl-C is for the parent, who then ends the child.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._started_for = self.shared_by(cell)
        return self._connection


def _serve(connection: Connection, measure: Measure, device: str) -> None:
    """The child, until its parent is gone: a group of its own, within the memory that there is."""
    os.setpgid(0, 0)
    if device == "cpu":  # CUDA reserves addresses by the hundred gigabytes, and uses few of them
        _limit_memory()
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send(_attempt(measure, connection.recv()))


def _attempt(measure: Measure, cell: Cell) -> Outcome:
    try:
        return measure(cell)
    except Unsupported as reason:
        return Outcome(UNSUPPORTED, str(reason))
    except MemoryError:
        return Outcome(OOM, "MemoryError")
    except Exception as error:
        return failed(error)


def failed(error: Exception, who: str = "") -> Outcome:
    """The outcome of a measurement that raised `error`, on the side of `who`."""
    said = _shortened(f"{who}{': ' if who else ''}{type(error).__name__}: {error}".strip())
    if is_out_of_memory(error):
        return Outcome(OOM, said)
    return Outcome(ERROR, said, {"traceback": traceback.format_exc()[-4000:]})


def is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError; only CUDA has a class for it.
    said = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)
    )


def _of_exit_code(code: int | None) -> Outcome:
    if code == -signal.SIGKILL:
        return Outcome(OOM, "the process was killed, as the system does when memory runs out")
    return Outcome(ERROR, f"the process ended with exit code {code}")


def _limit_memory() -> None:
    """Make torch's allocator fail where the system would kill the process, or swap for hours."""
    free = available_bytes()
    if sys.platform != "linux" or free is None:
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = max(free - RESERVE, free // 2)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _shortened(text: str, most: int = 300) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= most else one_line[: most - 3] + "..."
