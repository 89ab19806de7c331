"""Normal inputs: a function of the seed, whatever else has drawn numbers before."""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import Cell


def normal_inputs(
    cell: Cell, length: int | None = None, *, seed: int = 0, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (batch, heads, length, head_dim) in the cell's dtype, on its device."""
    generator = torch.Generator(cell.device).manual_seed(seed)
    shape = (cell.batch, cell.heads, cell.length if length is None else length, cell.head_dim)

    def normal() -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=cell.device)
        return drawn.to(getattr(torch, cell.dtype)).requires_grad_(grad)

    return normal(), normal(), normal()
