"""Timing: in turns, the order swapped, as often as there is time for."""

from __future__ import annotations

import gc
import time

import pytest

from efficient_attn.benchmarking import timing
from efficient_attn.benchmarking.timing import Effort, interleaved, ratio, wall_clock, warmed_up


def test_contenders_take_turns_in_swapped_order() -> None:
    calls: list[str] = []
    seconds = {"ours": iter(range(1, 5)), "peer": iter(range(10, 50, 10))}

    def sampler(name: str):  # type: ignore[no-untyped-def]
        def sample() -> float:
            assert not gc.isenabled()
            calls.append(name)
            return float(next(seconds[name]))

        return sample

    samples = interleaved({name: sampler(name) for name in seconds}, rounds=4)
    assert calls == ["ours", "peer", "peer", "ours", "ours", "peer", "peer", "ours"]
    assert samples == {"ours": [1, 2, 3, 4], "peer": [10, 20, 30, 40]}
    assert gc.isenabled()


def test_the_collector_works_again_after_a_failure() -> None:
    def fails() -> float:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        interleaved({"ours": fails}, rounds=1)
    assert gc.isenabled()


def test_a_ratio_is_that_of_samples_side_by_side_so_that_a_drift_cancels() -> None:
    ours = [1.0, 2.0, 4.0, 8.0, 16.0]  # the machine slows down by 16
    found = ratio([3 * x for x in ours], ours)
    assert (found.median, found.low, found.high) == (3.0, 3.0, 3.0)
    noisy = ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (noisy.low, noisy.median, noisy.high) == (2.0, 3.0, 4.0)
    assert ratio([2.0], [4.0]).median == 0.5


def test_rounds_fit_into_the_time_but_never_below_the_least() -> None:
    effort = Effort(seconds=6, least=3, most=41)
    assert [effort.rounds(s) for s in (0.001, 0.5, 1.0, 100.0)] == [41, 12, 6, 3]


def test_a_sample_of_something_short_is_many_calls_and_of_something_long_one() -> None:
    asked: list[int] = []

    def clock_of(cost: float) -> timing.Clock:
        def clock(work: timing.Work, calls: int) -> float:
            asked.append(calls)
            return cost

        return clock

    sample, seconds = warmed_up(lambda: None, clock_of(1e-4))
    sample()
    assert asked[-1] == 20
    assert seconds == pytest.approx(2e-3)
    asked.clear()
    sample, seconds = warmed_up(lambda: None, clock_of(7.0))
    assert asked == [1], "seven seconds are not repeated to warm up"
    sample()
    assert asked == [1, 1]
    assert seconds == 7.0


def test_the_clock_tells_the_seconds_of_one_call() -> None:
    assert wall_clock(lambda: time.sleep(0.01), 3) == pytest.approx(0.01, rel=0.5)
