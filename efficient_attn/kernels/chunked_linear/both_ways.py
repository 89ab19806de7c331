"""Documents without causality: the keys up to each row by one walk, those after it by another, of mirrored tokens.

Both are in units of the largest exponent of a document, so that their sums add up; a token's own key is in the first.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from . import launch
from .launch import Exponents, Pass


def mirrored(p: Pass) -> Pass:
    """The same tokens, as many queries as keys, from the last one to the first; each sees those before it alone."""
    other = copy.copy(p)
    other.q, other.k, other.v = p.q.flip(2), p.k.flip(2), p.v.flip(2)
    other.valid = None if p.valid is None else p.valid.flip(1)
    other.segment = None if p.segment is None else p.segment.flip(1)
    if p.exponents is not None:
        e = p.exponents
        other.exponents = Exponents(e.row_shift.flip(2), e.shift.flip(2), e.exponent.flip(2), e.peak.flip(2))
    other.walk = {**p.walk, "STRICT": True}
    return other


def forward(p: Pass, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `launch.forward`."""
    part, weights = launch.sums(p)
    out, lost, total = launch.forward(mirrored(p), keep, begun=(part.flip(2), weights.flip(2)))
    return out.flip(2), lost.flip(2) if lost.numel() else lost, total.flip(2)


def backward(
    p: Pass, grad: Tensor, out: Tensor, lost: Tensor | None, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v: those of both walks, added before they are rounded."""
    delta = launch.delta_of(p, grad, out, lost)
    gradients = _gradients(p, grad, total, delta)
    others = _gradients(mirrored(p), grad.flip(2), total.flip(2), delta.flip(2))
    dq, dk, dv = (
        a.add_(b.flip(2)).to(x.dtype) for a, b, x in zip(gradients, others, (p.q, p.k, p.v), strict=True)
    )
    return dq, dk, dv


def _gradients(p: Pass, grad: Tensor, total: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    dq = launch.row_gradients(p, grad, total, delta, torch.float32)
    states = p.row_states(grad, total, delta)
    return dq, *launch.key_gradients(p, grad, total, delta, states, torch.float32)
