"""Times several things against each other: interleaved, in swapped order, so that a drift hits all alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Work = Callable[[], object]
Clock = Callable[[Work, int], float]
Sampler = Callable[[], float]

SHORTEST_SAMPLE = 2e-3
WARM_UP = 0.1


@dataclass(frozen=True)
class Effort:
    """How often to repeat: as many rounds as fit into `seconds`, within `least` and `most`."""

    seconds: float
    least: int
    most: int
    warm_up: float | None = None
    """Seconds to run before; None: WARM_UP."""

    def rounds(self, seconds_a_round: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / max(seconds_a_round, 1e-9))))


EFFORTS: Mapping[str, Effort] = {
    "full": Effort(seconds=6.0, least=3, most=41),
    "quick": Effort(seconds=0.4, least=3, most=9),
    "dry": Effort(seconds=0.0, least=3, most=3, warm_up=0.0),
}


def wall_clock(work: Work, calls: int) -> float:
    """Seconds that one call takes, over `calls` of them. On a CPU a call is done when it returns."""
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls


def warmed_up(work: Work, clock: Clock = wall_clock, seconds: float | None = None) -> tuple[Sampler, float]:
    """A sampler of `work`, run until it is warm, and the seconds that a sample takes."""
    cost = spent = clock(work, 1)
    while spent < (WARM_UP if seconds is None else seconds):
        cost = min(cost, again := clock(work, 1))
        spent += max(again, 1e-6)
    calls = max(1, math.ceil(SHORTEST_SAMPLE / max(cost, 1e-9)))
    return lambda: clock(work, calls), calls * cost


def interleaved(samplers: Mapping[str, Sampler], rounds: int) -> dict[str, list[float]]:
    """Each sampler's samples, one a round, in an order that is reversed from round to round."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                samples[name].append(samplers[name]())
            order.reverse()
    finally:
        if collects:
            gc.enable()
    return samples


@dataclass(frozen=True)
class Ratio:
    """How many times as long one took as the other: the median over the rounds, and the quartiles."""

    median: float
    low: float
    high: float


def ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    """Of each round's two samples, which stand side by side, so that a drift of the machine cancels."""
    each = [a / b for a, b in zip(numerator, denominator, strict=True)]
    if len(each) == 1:
        return Ratio(each[0], each[0], each[0])
    low, median, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(median, low, high)
