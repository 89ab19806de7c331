"""Kernels with known faults, for the screen to find. Imports Triton, so that tests import it when they run."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(A, B, C, N, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """C = A B over (BLOCK, N) and (N, COLUMNS), 64 at a time."""
    row, column, inner = tl.arange(0, BLOCK), tl.arange(0, COLUMNS), tl.arange(0, 64)
    total = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, N, 64):
        a = tl.load(A + row[:, None] * N + (start + inner)[None, :])
        b = tl.load(B + (start + inner)[:, None] * COLUMNS + column[None, :])
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(C + row[:, None] * COLUMNS + column[None, :], total)
