"""What measures time and memory on a device. Everything else here asks for it by the type of the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ..testing.sampling import poisoned_allocations
from . import cuda
from .allocations import peak_allocated
from .cells import Cell
from .environment import available_bytes
from .timing import EFFORTS, Clock, Work, interleaved, wall_clock, warmed_up
from .worker import Unsupported


def _done() -> None:
    """On a CPU a call is done when it returns."""


def _never(work: Work) -> Work:
    raise Unsupported("only a GPU has graphs")


@dataclass(frozen=True)
class Instruments:
    """
    Args:
        clock: seconds of one call, over several.
        synchronize: waits until the device has done what it was told.
        peak_bytes: the most that a call held at one moment, beyond what was held before.
        held_bytes: what tensors hold now; 0 where nobody counts.
        free_bytes: what can still be allocated.
        poisoned: inside, fresh memory holds NaN.
        captured: a call that the device repeats without Python.
    """

    clock: Clock
    synchronize: Callable[[], None]
    peak_bytes: Callable[[Work], int]
    held_bytes: Callable[[], int]
    free_bytes: Callable[[], int]
    poisoned: Callable[[], AbstractContextManager[None]]
    captured: Callable[[Work], Work]


INSTRUMENTS: Mapping[str, Instruments] = {
    "cpu": Instruments(
        clock=wall_clock,
        synchronize=_done,
        peak_bytes=peak_allocated,
        held_bytes=lambda: 0,
        free_bytes=lambda: available_bytes() or 1 << 30,
        poisoned=poisoned_allocations,
        captured=_never,
    ),
    "cuda": Instruments(
        clock=cuda.event_clock,
        synchronize=cuda.synchronize,
        peak_bytes=cuda.peak_bytes,
        held_bytes=cuda.held_bytes,
        free_bytes=cuda.free_bytes,
        poisoned=cuda.poisoned,
        captured=cuda.captured,
    ),
}
"""By the type of device: one that returns before it is done needs another clock."""


def times_of(cell: Cell, works: Mapping[str, Work]) -> dict[str, list[float]]:
    """Seconds of each work, warmed up and then in turns, as often as the cell's effort says."""
    samplers, seconds_a_round, effort = {}, 0.0, EFFORTS[cell.effort]
    for name, work in works.items():
        samplers[name], seconds = warmed_up(work, INSTRUMENTS[cell.device].clock, effort.warm_up)
        seconds_a_round += seconds
    samples = interleaved(samplers, effort.rounds(seconds_a_round))
    return {name: [float(f"{s:.5g}") for s in each] for name, each in samples.items()}
