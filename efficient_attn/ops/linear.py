"""Linear attention: the product reassociated as phi(q) (phi(k)^T v), causal by a scan over chunks.

The normaliser is one more column of v, a column of ones, so that every routine here sums weighted values only.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ..backends import Backend
from ..feature_maps import FeatureMap
from ..inputs import accumulation_dtype, full_precision, refuse_forward_mode
from .problem import LinearProblem, allowed_pairs, segments_of_queries
from .scan import scan

NOTHING = -(2.0**100)
"""The exponent of a key with no weight: below every real one, and finite, so that differences are too."""


def features(phi: FeatureMap, x: Tensor, scale: float, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """phi(scale x) in the accumulation dtype, zero where `valid` (B, length) is False, and its exponents."""
    values, exponent = phi(x.to(accumulation_dtype(x.dtype)) * scale)
    if valid is not None:
        values = torch.where(valid[:, None, :, None], values, 0.0)
        exponent = None if exponent is None else torch.where(valid[:, None, :], exponent, NOTHING)
    # A token whose features all vanish has the exponent -inf: log(0).
    return values, None if exponent is None else exponent.clamp(min=NOTHING)


def _query_scale(p: LinearProblem) -> float:
    return p.scale * p.q.shape[3] ** 0.5


def _valid(p: LinearProblem) -> Tensor | None:
    if p.segment_ids is None:
        return p.key_mask
    inside = p.segment_ids >= 0
    return inside if p.key_mask is None else inside & p.key_mask


def _with_ones(v: Tensor) -> Tensor:
    v = v.to(accumulation_dtype(v.dtype))
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)


def no_weight(total: Tensor) -> Tensor:
    """Where a row's total weight has underflowed so far that its reciprocal would overflow gradients."""
    return total < (2.0**-900 if total.dtype == torch.float64 else 2.0**-100)


def normalise(sums: Tensor) -> Tensor:
    """The weighted values over their total weight, the last column; zero, with zero gradient, where that is none."""
    values, total = sums[..., :-1], sums[..., -1:]
    nothing = no_weight(total)
    return torch.where(nothing, 0.0, values / torch.where(nothing, 1.0, total))


def chunked(p: LinearProblem) -> Tensor:
    """Linear attention in time and memory O(L + S)."""
    refuse_forward_mode(p.q, p.k, p.v)
    with full_precision(p.q.device):
        q, _ = features(p.feature_map, p.q, _query_scale(p), None)
        k, exponent = features(p.feature_map, p.k, 1.0, _valid(p))
        v = _with_ones(p.v)
        q = rearrange(q, "b (h g) l m -> b h g l m", h=k.shape[1])
        if p.segment_ids is not None:
            sums = _packed(p, q, k, v, exponent)
        elif p.is_causal:
            sums = _causal(q, k, v, exponent, p.q_offset)
        else:
            kv, _ = state_of(k, v, exponent)
            sums = _read(q, kv)
        return rearrange(normalise(sums), "b h g l e -> b (h g) l e").to(p.q.dtype)


def state_of(k: Tensor, v: Tensor, exponent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """sum_j k_j v_j^T 2^(exponent_j - peak) of all keys, (B, H, M, E), and the peak (B, H)."""
    if exponent is None:
        return k.mT @ v, None
    if exponent.shape[2] == 0:
        return k.mT @ v, exponent.new_full(exponent.shape[:2], NOTHING)
    peak = exponent.amax(2)
    return (k * torch.exp2(exponent - peak[..., None])[..., None]).mT @ v, peak


def _read(q: Tensor, kv: Tensor) -> Tensor:
    """q (B, H, G, L, M) times the state (B, H, M, E), which the group shares."""
    return (q.flatten(2, 3) @ kv).unflatten(2, (q.shape[2], q.shape[3]))


def merge_states(
    kv: Tensor, peak: Tensor | None, new_kv: Tensor, new_peak: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The sum of two states, at the larger of their scales."""
    if peak is None or new_peak is None:
        return kv + new_kv, None
    joint = torch.maximum(peak, new_peak)
    return _rescale(kv, peak, joint) + _rescale(new_kv, new_peak, joint), joint


def _rescale(kv: Tensor, peak: Tensor, joint: Tensor) -> Tensor:
    return kv * torch.exp2(peak - joint)[..., None, None]


def scan_from(
    q: Tensor, k: Tensor, v: Tensor, exponent: Tensor | None, kv: Tensor, peak: Tensor | None
) -> Tensor:
    """The causal scan after keys that are summed up in the state (kv, peak) already."""
    if exponent is None or peak is None:
        return scan(q, k[:, :, None], v[:, :, None], None, None, None, False) + _read(q, kv)
    running = torch.maximum(exponent.cummax(2).values, peak[..., None])
    inside = scan(q, k[:, :, None], v[:, :, None], -running, exponent, None, False)
    return inside + _read(q, kv) * torch.exp2(peak[..., None] - running)[:, :, None, :, None]


def _causal(q: Tensor, k: Tensor, v: Tensor, exponent: Tensor | None, q_offset: int | Tensor) -> Tensor:
    """Keys before the first query go into a state; the others are laid beside the query at their position."""
    length, num_keys = q.shape[3], k.shape[2]
    if isinstance(q_offset, int) and q_offset == 0 and length == num_keys:
        running = None if exponent is None else -exponent.cummax(2).values
        return scan(q, k[:, :, None], v[:, :, None], running, exponent, None, False)
    position = torch.arange(num_keys, device=k.device)
    past = torch.where(position < q_offset, 1.0, 0.0)[:, None]
    past_exponent = None if exponent is None else torch.where(position < q_offset, exponent, NOTHING)
    kv, peak = state_of(k * past, v, past_exponent)
    if num_keys == 0:
        return _read(q, kv)
    beside = torch.arange(length, device=k.device) + q_offset
    inside = (beside >= 0) & (beside < num_keys)
    beside = beside.clamp(0, num_keys - 1)
    k, v = torch.where(inside[:, None], k[:, :, beside], 0.0), v[:, :, beside]
    exponent = None if exponent is None else torch.where(inside, exponent[:, :, beside], NOTHING)
    return scan_from(q, k, v, exponent, kv, peak)


def _packed(p: LinearProblem, q: Tensor, k: Tensor, v: Tensor, exponent: Tensor | None) -> Tensor:
    """Documents side by side: sorted by segment (stably, so that order within one stays), scanned, sorted back."""
    assert p.segment_ids is not None
    length, num_keys = q.shape[3], k.shape[2]
    if num_keys == 0:
        return q.new_zeros(*q.shape[:4], v.shape[3])
    order = p.segment_ids.argsort(dim=1, stable=True)
    segment = p.segment_ids.gather(1, order)
    # Queries move to the positions they stand at, so that one permutation serves queries and keys.
    at = torch.arange(num_keys, device=q.device) - p.q_offset
    at_query = (at >= 0) & (at < length)
    q = torch.where(at_query[:, None], q[:, :, :, at.clamp(0, max(length - 1, 0))], 0.0) if length else q
    if length == 0:
        return q.new_zeros(*q.shape[:4], v.shape[3])
    q = _permute(q, order)
    k, v = _permute(k[:, :, None], order), _permute(v[:, :, None], order)
    exponent = None if exponent is None else exponent.gather(2, order[:, None].expand_as(exponent))

    if p.is_causal:
        running = None if exponent is None else -_running_maximum(exponent, segment)
        sums = scan(q, k, v, running, exponent, segment, False)
    else:
        sums = _both_ways(q, k, v, exponent, segment)

    sums = _permute(sums, order.argsort(dim=1))
    beside = torch.arange(length, device=q.device) + p.q_offset
    own = segments_of_queries(p.segment_ids, length, p.q_offset) >= 0
    return torch.where(own[:, None, None, :, None], sums[:, :, :, beside.clamp(0, num_keys - 1)], 0.0)


def _permute(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, G, S, M) with positions in the row's `order` (B, S)."""
    return x.gather(3, order[:, None, None, :, None].expand(x.shape))


def _both_ways(q: Tensor, k: Tensor, v: Tensor, exponent: Tensor | None, segment: Tensor) -> Tensor:
    """Non-causal within each segment: the keys up to each query, then those after it, at one scale a segment."""
    peak = following = None
    if exponent is not None:
        peak = -_running_maximum(_running_maximum(exponent, segment).flip(2), segment.flip(1)).flip(2)
        following = torch.cat([exponent[:, :, 1:], torch.full_like(exponent[:, :, :1], NOTHING)], 2)
    same = torch.cat(
        [segment[:, 1:] == segment[:, :-1], torch.zeros_like(segment[:, :1], dtype=torch.bool)], 1
    )
    if following is not None:
        following = torch.where(same[:, None], following, NOTHING)
    next_k = torch.where(same[:, None, None, :, None], k.roll(-1, 3), 0.0)
    forward = scan(q, k, v, peak, exponent, segment, False)
    return forward + scan(q, next_k, v.roll(-1, 3), peak, following, segment, True)


def _running_maximum(x: Tensor, segment: Tensor) -> Tensor:
    """The maximum of x (B, H, S) over earlier positions of the same segment and the position itself."""
    step = 1
    while step < x.shape[2]:
        same = (segment[:, step:] == segment[:, :-step])[:, None]
        x = torch.cat(
            [
                x[:, :, :step],
                torch.where(same, torch.maximum(x[:, :, step:], x[:, :, :-step]), x[:, :, step:]),
            ],
            2,
        )
        step *= 2
    return x


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


def linear_step(p: LinearProblem, kv: Tensor, peak: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """New tokens after the state (kv, peak): their outputs, and the state after them."""
    with full_precision(p.q.device):
        q, _ = features(p.feature_map, p.q, _query_scale(p), None)
        k, exponent = features(p.feature_map, p.k, 1.0, p.key_mask)
        v = _with_ones(p.v)
        q = rearrange(q, "b (h g) l m -> b h g l m", h=k.shape[1])
        after = merge_states(kv, peak, *state_of(k, v, exponent))
        sums = _read(q, after[0]) if q.shape[3] == 1 else scan_from(q, k, v, exponent, kv, peak)
        return rearrange(normalise(sums), "b h g l e -> b (h g) l e").to(p.q.dtype), *after


LINEAR_BACKENDS = (
    Backend("chunked", chunked, lambda p: []),
    Backend("reference", reference, lambda p: [], by_name_only=True),
)
