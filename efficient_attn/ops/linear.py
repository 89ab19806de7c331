"""Linear attention: the product reassociated as phi(q) (phi(k)^T v), causal by a scan over chunks.

The library's own feature maps go through operators that compute them block by block; anybody else's through
operators that autograd looks into.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import Backend, BackendError
from ..feature_maps import formula_of
from ..inputs import full_precision, refuse_forward_mode
from .chunked_linear import chunked_linear, refuse
from .composed import NOTHING, composed, composed_step, features, no_weight
from .linear_steps import kernel_step, refuse_step
from .packing import Packing
from .problem import LinearProblem, allowed_pairs
from .stream import stream


def _query_scale(p: LinearProblem) -> float:
    return p.scale * p.q.shape[3] ** 0.5


def _valid(p: LinearProblem) -> Tensor | None:
    if p.segment_ids is None:
        return p.key_mask
    inside = p.segment_ids >= 0
    return inside if p.key_mask is None else inside & p.key_mask


def chunked(p: LinearProblem) -> Tensor:
    """Linear attention in time and memory O(L + S)."""
    return _linear(p, stream, both_ways=False)


def triton(p: LinearProblem) -> Tensor:
    """The same by kernels."""
    return _linear(p, chunked_linear, both_ways=True)


def _linear(p: LinearProblem, run: Callable[..., tuple[Tensor, Tensor, Tensor]], both_ways: bool) -> Tensor:
    """Linear attention by the operator `run` for the maps that operators know.

    `both_ways` says whether it also takes documents whose tokens see later ones.
    """
    refuse_forward_mode(p.q, p.k, p.v)
    p.feature_map.check_head_dim(p.q.shape[3])
    q, k, v, valid, segment, q_offset = p.q, p.k, p.v, _valid(p), None, p.q_offset
    packing = Packing(p) if p.segment_ids is not None and k.shape[2] > 0 else None
    if packing is not None:
        q, k, v, segment, q_offset = packing.queries(q), packing.keys(k), packing.keys(v), packing.segment, 0
        valid = None if valid is None else valid.gather(1, packing.order)
    feature, scale = formula_of(p.feature_map), _query_scale(p)
    with full_precision(q.device):
        if feature is None or (segment is not None and not p.is_causal and not both_ways):
            out = composed(p.feature_map, q, k, v, valid, segment, q_offset, scale, p.is_causal)
        else:
            # A copy, because a cache may move its offset on before the backward pass reads it.
            moving = isinstance(q_offset, Tensor)
            offset = q_offset.clone() if moving else torch.full((), q_offset, dtype=torch.int64)
            projection = getattr(p.feature_map, "projection", None)
            out, *_ = run(q, k, v, valid, segment, offset, projection, feature, scale, p.is_causal)
    return out if packing is None else packing.outputs(out)


def linear_matrix(p: LinearProblem) -> Tensor:
    """The attention weights (B, H, L, S): features multiplied out, masked, divided by their sum."""
    with full_precision(p.q.device):
        q, _ = features(p.feature_map, p.q, _query_scale(p), None)
        k, exponent = features(p.feature_map, p.k, 1.0, _valid(p))
        group = q.shape[1] // k.shape[1]
        weights = q @ k.repeat_interleave(group, 1).mT
        allowed = allowed_pairs(p)
        if exponent is not None and k.shape[2]:
            exponent = torch.where(allowed, exponent.repeat_interleave(group, 1)[:, :, None, :], NOTHING)
            weights = weights * torch.exp2(exponent - exponent.amax(-1, keepdim=True))
        weights = torch.where(allowed, weights, 0.0)
        total = weights.sum(-1, keepdim=True)
        nothing = no_weight(total)
        return torch.where(nothing, 0.0, weights / torch.where(nothing, 1.0, total))


def reference(p: LinearProblem) -> Tensor:
    """`linear_matrix @ v`: O(L S) time and memory."""
    weights = linear_matrix(p)
    v = p.v.to(weights.dtype).repeat_interleave(p.q.shape[1] // p.v.shape[1], 1)
    with full_precision(p.q.device):
        return (weights @ v).to(p.q.dtype)


def linear_step(
    p: LinearProblem, kv: Tensor, peak: Tensor | None, backend: str = "chunked"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """New tokens after the state (kv, peak): their outputs, and the state after them.

    Raises:
        BackendError: if the kernels are asked for by name and cannot run.
    """
    if backend in ("auto", "triton") and p.q.numel() > 0 and p.v.numel() > 0:
        reasons = refuse_step(p, peak)
        if not reasons:
            return kernel_step(p, kv, peak, _query_scale(p))
        if backend == "triton":
            raise BackendError(f"backend='triton' cannot run this step: {'; '.join(reasons)}")
    with full_precision(p.q.device):
        return composed_step(p.feature_map, p.q, p.k, p.v, p.key_mask, _query_scale(p), kv, peak)


LINEAR_BACKENDS = (
    Backend("triton", triton, refuse, portable=False),
    Backend("chunked", chunked, lambda p: []),
    Backend("reference", reference, lambda p: [], by_name_only=True),
)
