"""Softmax attention written down in full: slow, obvious, and the oracle of everything else."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ..inputs import accumulation_dtype, full_precision
from .problem import SoftmaxProblem, allowed_pairs


def safe_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; a row of -inf gives zeros, and zero gradients."""
    if scores.shape[-1] == 0:
        return scores
    peak = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(peak == -torch.inf, 0.0, peak))
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def grouped_matmul(x: Tensor, y: Tensor) -> Tensor:
    """x (B, H, n, m) @ y (B, Hkv, m, p), head h of x with head h // (H / Hkv) of y, which is never repeated."""
    heads = y.shape[1]
    folded = rearrange(x, "b (h g) n m -> b h (g n) m", h=heads) @ y
    return rearrange(folded, "b h (g n) p -> b (h g) n p", g=x.shape[1] // heads)


def softmax_matrix(p: SoftmaxProblem) -> Tensor:
    """The attention weights (B, H, L, S), in the accumulation dtype."""
    dtype = accumulation_dtype(p.q.dtype)
    with full_precision(p.q.device):
        scores = grouped_matmul(p.q.to(dtype), p.k.to(dtype).mT) * p.scale
        allowed = allowed_pairs(p)
        if p.attn_bias is not None and p.attn_bias.dtype == torch.bool:
            allowed = allowed & p.attn_bias
        elif p.attn_bias is not None:
            scores = scores + p.attn_bias.to(dtype)
        return safe_softmax(scores.masked_fill(~allowed, -torch.inf))


def reference(p: SoftmaxProblem) -> Tensor:
    """`softmax_matrix @ v`: O(L S) time and memory."""
    weights = torch.nn.functional.dropout(softmax_matrix(p), p.dropout_p)
    with full_precision(p.q.device):
        return grouped_matmul(weights, p.v.to(weights.dtype)).to(p.q.dtype)
