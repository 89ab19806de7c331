"""Measures one cell, in the worker. The number is in the outcome's result, as plain JSON."""

from __future__ import annotations

import torch

from efficient_attn.benchmarking.cells import CAPACITY, CAPACITY_FORWARD, DECODE, MEMORY, RACES, Cell
from efficient_attn.benchmarking.worker import Outcome


def measure(cell: Cell) -> Outcome:
    """The outcome of `cell`. Raises Unsupported where it cannot be measured here."""
    torch.set_num_threads(cell.threads)
    if cell.work in RACES:
        from .races import measure_race

        return measure_race(cell)
    if cell.work == MEMORY:
        from .memory import measure_memory

        return measure_memory(cell)
    if cell.work in (CAPACITY, CAPACITY_FORWARD):
        from .memory import measure_capacity

        return measure_capacity(cell)
    if cell.work == DECODE:
        from benchmarks.subjects import subject
        from efficient_attn.benchmarking.decode import measure_decode

        return measure_decode(cell, subject(cell))
    raise ValueError(f"work of a cell must be one that is measured, got {cell.work!r}")
