"""The one module that speaks to CUDA: events, caches, memory, graphs. Nothing here runs without a GPU."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

Work = Callable[[], object]

FLUSHED = 256 << 20
"""Bytes written before each call, more than any L2 cache holds: a caller's inputs seldom lie there either."""


@lru_cache(maxsize=1)
def _scratch() -> Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")


def event_clock(work: Work, calls: int) -> float:
    """Seconds that one call takes on the device, over `calls` of them, each with a cold L2 cache.

    The write that empties the cache also keeps the device busy while the call is being launched.
    """
    flush = _scratch()
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
    torch.cuda.synchronize()
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    milliseconds = [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]
    return sum(milliseconds) / calls / 1e3


def captured(work: Work) -> Work:
    """The replay of a CUDA graph of `work`: no launch of it waits for Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def synchronize() -> None:
    """Wait until the device is done."""
    torch.cuda.synchronize()


def held_bytes() -> int:
    """Bytes that tensors hold now."""
    gc.collect()
    return torch.cuda.memory_allocated()


def peak_bytes(work: Work) -> int:
    """The most bytes that tensors held at one moment of `work`, beyond those that they held before."""
    torch.cuda.synchronize()
    before = held_bytes()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_bytes() -> int:
    """Bytes that can still be allocated, those that the allocator keeps for later included."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


SMALL, SMALL_BLOCKS = 512 << 10, 64
"""The allocator serves requests of up to 1 MiB from blocks of their own."""
POISONED_SHARE = 4


@contextmanager
def poisoned() -> Iterator[None]:
    """What the allocator gives out holds NaN inside, until it has given out a quarter of the free memory.

    Not by torch.use_deterministic_algorithms: peers would compile anew, and others take a slower way.
    """
    gc.collect()
    torch.cuda.empty_cache()
    sizes = [*[SMALL] * SMALL_BLOCKS, free_bytes() // POISONED_SHARE]
    blocks = [torch.full((size // 4,), math.nan, dtype=torch.float32, device="cuda") for size in sizes]
    del blocks  # back to the allocator, which hands the same memory out again
    yield
