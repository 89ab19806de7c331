"""Says how far a run has come: with rich on a terminal, as one line a cell elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..benchmarking.cells import Cell
from ..benchmarking.tables import rich_on
from .output import say


class Remaining:
    """Guesses what is left from what was measured: of the same subject scaled by its FLOPs, else the average.

    Args:
        cells: all that will be measured.
        flops: of a cell.
        most: seconds that no cell takes longer than.
    """

    def __init__(self, cells: Sequence[Cell], flops: Callable[[Cell], int], most: float) -> None:
        self.left = list(cells)
        self.flops = flops
        self.most = most
        self.measured: list[tuple[Cell, float]] = []

    def finished(self, cell: Cell, seconds: float | None) -> None:
        """`cell` is done; `seconds` is None if it was recorded already."""
        self.left.remove(cell)
        if seconds is not None:
            self.measured.append((cell, seconds))

    @property
    def seconds(self) -> float | None:
        """None while nothing is known."""
        return sum(map(self._guess, self.left)) if self.measured else None

    def _guess(self, cell: Cell) -> float:
        for known, seconds in reversed(self.measured):
            if (known.subject, known.work) == (cell.subject, cell.work):
                grown = self.flops(cell) / max(1, self.flops(known))
                return min(self.most, seconds * max(1.0, grown))
        return sum(seconds for _, seconds in self.measured) / len(self.measured)


class Progress:
    """Shown on standard error. Inside `with`, `begin` and `end` belong to one cell after another."""

    def __init__(self, total: int, remaining: Remaining) -> None:
        self.total, self.remaining, self.done = total, remaining, 0
        self.began = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if rich_on(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.description}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, left="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, what: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=what, left=self.left)

    def end(self, line: str) -> None:
        """One more is done, and `line` says what came of it."""
        self.done += 1
        if self._bar is None:
            left = f", {self.left}" if self.left else ""
            say(f"[{self.done}/{self.total}, {time.monotonic() - self.began:.0f} s{left}] {line}")
            return
        self._bar.console.print(line, markup=False, highlight=False)
        self._bar.update(self._task, completed=self.done, left=self.left)

    @property
    def left(self) -> str:
        """About how long it will still take."""
        seconds = self.remaining.seconds
        return f"about {rough(seconds)} left" if seconds else ""


def rough(seconds: float) -> str:
    """A guess, with no more digits than it deserves."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
