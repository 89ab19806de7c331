"""The calls of CUDA, against stand-ins that write down what they are asked: order, units, and what is subtracted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from efficient_attn.benchmarking import cuda, environment


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on the stand-in of a device, in order."""
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(seen)
            seen.append("event")

        def elapsed_time(self, end: Any) -> float:
            assert seen[-1] == "synchronize", "events are read when they have happened"
            return 3.0 * (end.at - self.at)  # milliseconds

    class Scratch:
        def zero_(self) -> None:
            seen.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("synchronize"))
    monkeypatch.setattr(cuda, "_scratch", Scratch)
    return seen


def test_each_call_is_timed_between_two_events_after_a_flush(log: list[str]) -> None:
    seconds = cuda.event_clock(lambda: log.append("call"), 2)
    once = ["flush", "event", "call", "event"]
    assert log == ["synchronize", *once, *once, "synchronize"]
    assert seconds == pytest.approx(6e-3)


def test_the_peak_is_counted_from_what_was_held_before(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(held=100, peak=900)

    def reset() -> None:
        state.peak = state.held

    def work() -> None:
        state.peak = max(state.peak, state.held + 70)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state.held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    assert cuda.peak_bytes(work) == 70


def test_what_the_allocator_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 200)
    assert cuda.free_bytes() == 1500


def test_memory_is_poisoned_in_small_blocks_and_in_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def full(shape: tuple[int], value: float, dtype: torch.dtype, device: str) -> object:
        assert value != value
        assert device == "cuda"
        made.append(shape[0] * dtype.itemsize)
        return object()

    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("emptied"))
    monkeypatch.setattr(cuda, "free_bytes", lambda: 80 << 30)
    monkeypatch.setattr(torch, "full", full)
    with cuda.poisoned():
        assert order == ["emptied"]
        assert made == [512 << 10] * 64 + [20 << 30]


def test_a_graph_is_captured_after_warming_up_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            seen.append(f"{self.name} waits for {other.name}")

        name = "side"

    current = Stream()
    current.name = "current"

    class Graph:
        def replay(self) -> None:
            seen.append("replay")

    @contextlib.contextmanager
    def inside(thing: object) -> Iterator[None]:
        seen.append(f"in {type(thing).__name__}")
        yield
        seen.append("out")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "graph", inside)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    replay = cuda.captured(lambda: seen.append("work"))
    warm = ["side waits for current", "in Stream", "work", "work", "work", "out", "current waits for side"]
    assert seen == [*warm, "in Graph", "work", "out"]
    replay()
    assert seen[-1] == "replay"


def test_the_names_that_are_used_are_those_of_torch() -> None:
    for name in (
        "Event",
        "synchronize",
        "mem_get_info",
        "memory_allocated",
        "memory_reserved",
        "empty_cache",
    ):
        assert callable(getattr(torch.cuda, name))
    for name in ("max_memory_allocated", "reset_peak_memory_stats", "graph", "CUDAGraph", "Stream", "stream"):
        assert callable(getattr(torch.cuda, name))
    assert torch.cuda.OutOfMemoryError.__name__ == "OutOfMemoryError"


@pytest.mark.parametrize("said", ["1980 MHz, 3201 MHz, 34, 120.50 W, 570.1\n", None])
def test_the_environment_names_the_gpu_its_clocks_and_its_libraries(
    said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(
        name="A Certain GPU", major=9, minor=0, total_memory=141 << 30, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(environment, "_output", lambda command: said.strip() if said else None)
    described = environment.environment("cuda")
    assert described["gpu"]["name"] == "A Certain GPU"
    assert described["gpu"]["capability"] == "9.0"
    assert "triton" in described["libraries"]
    assert "gpu" in environment.fingerprint(described)
    assert "gpu_now" not in environment.fingerprint(described), "a warmer GPU is the same GPU"
    if said is None:
        assert described["gpu_now"] is None
    else:
        assert described["gpu_now"]["clocks.sm"] == "1980 MHz"
        assert described["gpu_now"]["driver_version"] == "570.1"
    assert "gpu" not in environment.environment()
