"""Random inputs that fit a mechanism."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..mechanisms import Mechanism

BATCH, HEADS, KV_HEADS, LENGTH, HEAD_DIM, V_HEAD_DIM = 2, 4, 2, 37, 8, 5
"""The sizes of the laws, where the mechanism was not built for others."""

EQUAL = -1
"""As v_head_dim: that of q and k, as fused kernels want it."""


def heads_of(mechanism: Mechanism) -> tuple[int, int]:
    """Heads of q and of k."""
    built_for = mechanism.num_kv_heads
    return (HEADS, KV_HEADS) if built_for is None else (built_for, built_for)


def head_dim_of(mechanism: Mechanism) -> int:
    """Head size of q and k."""
    return mechanism.head_dim or HEAD_DIM


def sample(
    mechanism: Mechanism,
    q_len: int = LENGTH,
    kv_len: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    batch: int = BATCH,
    grad: bool = False,
    v_head_dim: int = V_HEAD_DIM,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q (batch, 4, q_len, 8), k and v (batch, 2, kv_len, 8 and 5), or as many heads as the mechanism has."""
    generator = torch.Generator().manual_seed(seed * 1009 + q_len)
    kv_len = q_len if kv_len is None else kv_len
    heads, kv_heads = heads_of(mechanism)
    head_dim = head_dim_of(mechanism)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    return (
        normal(batch, heads, q_len, head_dim),
        normal(batch, kv_heads, kv_len, head_dim),
        normal(batch, kv_heads, kv_len, head_dim if v_head_dim == EQUAL else v_head_dim),
    )


def holes(length: int, seed: int = 0, batch: int = BATCH) -> Tensor:
    """A key mask with random holes, padding left of the first row and right of the second."""
    generator = torch.Generator().manual_seed(seed + 17)
    mask = torch.rand(batch, length, generator=generator) > 0.25
    mask[0, : length // 4] = False
    mask[-1, length - length // 5 :] = False
    return mask


def lengths(mechanism: Mechanism) -> list[int]:
    """Awkward ones, as far as the mechanism goes."""
    most = mechanism.max_seq_len or 150
    return [n for n in (1, 2, 7, 16, 31, LENGTH, 64, 129) if n <= most]


def in_dtype(mechanism: Mechanism, dtype: torch.dtype) -> Mechanism:
    """A copy in evaluation mode with its parameters in `dtype`."""
    return copy.deepcopy(mechanism).to(dtype).eval()


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """x (B, Hkv, ...) with each head repeated for the query heads that share it."""
    return x.repeat_interleave(heads // x.shape[1], 1)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fresh memory holds NaN inside, so that whatever is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
