"""The least time that a machine could need, from what it reaches here and now on plain work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from efficient_attn import Mechanism
from efficient_attn.benchmarking.cells import BACKWARD, FORWARD, Cell
from efficient_attn.benchmarking.instruments import INSTRUMENTS
from efficient_attn.complexity import Shape
from efficient_attn.mechanisms import SoftmaxMechanism

SAMPLES = 9
SQUARE = {"cuda": 8192, "cpu": 512}
COPIED = {"cuda": 1 << 30, "cpu": 1 << 24}
"""Elements of a side of the matrices, and bytes of the tensor that is copied."""

BACKWARD_PRODUCTS = 2.5
"""Of the forward pass: the gradients of two products are four, and one is computed again instead of kept."""


@dataclass(frozen=True)
class Roofline:
    """What a matrix product and a copy reach on a device."""

    flops_per_second: float
    bytes_per_second: float


@lru_cache
def roofline(device: str, dtype: str) -> Roofline:
    """The best of several samples, on normal numbers: zeros cost less power and run faster."""
    size, clock = SQUARE[device], INSTRUMENTS[device].clock
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    b = a.T.contiguous()
    out = torch.empty_like(a)
    product = min(clock(lambda: torch.mm(a, b, out=out), 1) for _ in range(SAMPLES))
    source = torch.randn(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    copy = min(clock(lambda: target.copy_(source), 1) for _ in range(SAMPLES))
    return Roofline(2 * size**3 / product, 2 * source.nbytes / copy)


@dataclass(frozen=True)
class Work:
    """What cannot be avoided: multiplications of pairs that the mask allows, inputs read once, results written once."""

    flops: float
    bytes: int

    def floor(self, roof: Roofline) -> float:
        """Seconds below which no implementation comes."""
        return max(self.flops / roof.flops_per_second, self.bytes / roof.bytes_per_second)


def unavoidable(cell: Cell, mechanism: Mechanism) -> Work:
    """Of the cell's pass or passes.

    Forward moves q, k, v and the output. Backward moves q, k, v, the output's gradient and three gradients, and for
    softmax the output too, whose product with its gradient every row needs.
    """
    sizes = cell.batch, cell.heads, cell.length, cell.length, cell.head_dim
    cost = mechanism.cost(Shape(*sizes, dtype=getattr(torch, cell.dtype)))
    forward = Work(cost.flops.forward, cost.bytes_read + cost.bytes_written)
    if cell.work == FORWARD:
        return forward
    tensor = cost.bytes_written
    moved = (8 if isinstance(mechanism, SoftmaxMechanism) else 7) * tensor
    backward = Work(BACKWARD_PRODUCTS * forward.flops, moved)
    if cell.work == BACKWARD:
        return backward
    return Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
