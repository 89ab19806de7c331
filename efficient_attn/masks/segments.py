"""Packed sequences: from cumulative lengths to segment ids."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from ..inputs import check_positive, is_integer


def segment_ids_from_cu_seqlens(
    cu_seqlens: Int[Tensor, " documents_plus_1"], total: int
) -> Int[Tensor, "1 total"]:
    """The segment ids of one packed row, from the cumulative document lengths that varlen kernels take.

    Position p belongs to document d where cu_seqlens[d] <= p < cu_seqlens[d + 1]; documents of length zero take
    no position. Positions from cu_seqlens[-1] to `total` are padding and get -1, which attends to nothing.

    Args:
        cu_seqlens: ascending offsets, starting with 0 (not checked: that would wait for the device).
        total: length of the packed row, in tokens.
    Raises:
        TypeError: if `cu_seqlens` is not an integer tensor, or `total` no int.
        ValueError: if `cu_seqlens` is not one-dimensional or is empty, or `total` is negative.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be an integer tensor, got {type(cu_seqlens).__name__}")
    if not is_integer(cu_seqlens.dtype):
        raise TypeError(f"cu_seqlens must be an integer tensor, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens must have shape (documents + 1,), got {tuple(cu_seqlens.shape)}")
    check_positive("total", total, least=0)
    positions = torch.arange(total, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.to(torch.int64), positions, right=True) - 1
    return torch.where(document < cu_seqlens.numel() - 1, document, -1)[None]
