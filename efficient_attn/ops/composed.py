"""Linear attention composed of operators that torch can differentiate: any feature map, any number of derivatives.

The normaliser is one more column of v, a column of ones, so that every routine here sums weighted values only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..feature_maps import Features
from ..inputs import accumulation_dtype
from .scan import scan

NOTHING = -(2.0**100)
"""The exponent of a key with no weight: below every real one, and finite, so that differences are too."""

PIECE = 256
"""Keys that one product sums up."""


def no_weight(total: Tensor) -> Tensor:
    """Where a row's total weight has underflowed so far that its reciprocal would overflow gradients."""
    return total < (2.0**-900 if total.dtype == torch.float64 else 2.0**-100)


def running_maximum(x: Tensor, segment: Tensor | None) -> Tensor:
    """The maximum of x (B, H, S) over earlier positions of the same segment and the position itself."""
    if segment is None:
        return x.cummax(-1).values
    step = 1
    while step < x.shape[2]:
        same = (segment[:, step:] == segment[:, :-step])[:, None]
        later = torch.where(same, torch.maximum(x[:, :, step:], x[:, :, :-step]), x[:, :, step:])
        x = torch.cat([x[:, :, :step], later], 2)
        step *= 2
    return x


def maximum_of_segment(x: Tensor, segment: Tensor) -> Tensor:
    """The maximum of x (B, H, S) over all positions of the same segment."""
    return running_maximum(running_maximum(x, segment).flip(2), segment.flip(1)).flip(2)


def features(
    phi: Callable[[Tensor], Features], x: Tensor, scale: float, valid: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """phi(scale x) in the accumulation dtype, zero where `valid` (B, length) is False, and its exponents."""
    values, exponent = phi(x.to(accumulation_dtype(x.dtype)) * scale)
    if valid is not None:
        values = torch.where(valid[:, None, :, None], values, 0.0)
        exponent = None if exponent is None else torch.where(valid[:, None, :], exponent, NOTHING)
    # A token whose features all vanish has the exponent -inf: log(0).
    return values, None if exponent is None else exponent.clamp(min=NOTHING)


def composed(
    phi: Callable[[Tensor], Features],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    segment: Tensor | None,
    q_offset: int | Tensor,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Linear attention (B, H, L, Ev). Equal entries of `segment` (B, S) are consecutive, and then L = S."""
    query, _ = features(phi, q, scale, None)
    k, exponent = features(phi, k, 1.0, valid)
    v, query = with_ones(v), query.unflatten(1, (k.shape[1], -1))
    if segment is not None and not is_causal:
        sums = _both_ways(query, k[:, :, None], v[:, :, None], exponent, segment)
    elif segment is not None:
        running = None if exponent is None else -running_maximum(exponent, segment)
        sums = scan(query, k[:, :, None], v[:, :, None], running, exponent, segment, False)
    elif is_causal:
        sums = _causal(query, k, v, exponent, q_offset)
    else:
        sums = read(query, state_of(k, v, exponent)[0])
    return normalise(sums).flatten(1, 2).to(q.dtype)


def with_ones(v: Tensor) -> Tensor:
    v = v.to(accumulation_dtype(v.dtype))
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)


def normalise(sums: Tensor) -> Tensor:
    """The weighted values over their total weight, the last column; zero, with zero gradient, where that is none."""
    values, total = sums[..., :-1], sums[..., -1:]
    nothing = no_weight(total)
    return torch.where(nothing, 0.0, values / torch.where(nothing, 1.0, total))


def state_of(k: Tensor, v: Tensor, exponent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """sum_j k_j v_j^T 2^(exponent_j - peak) of all keys, (B, H, M, E), and the peak (B, H)."""
    if exponent is None:
        return _sum_over_keys(k, v), None
    if exponent.shape[2] == 0:
        return k.mT @ v, exponent.new_full(exponent.shape[:2], NOTHING)
    peak = exponent.amax(2)
    return _sum_over_keys(k * torch.exp2(exponent - peak[..., None])[..., None], v), peak


def _sum_over_keys(k: Tensor, v: Tensor) -> Tensor:
    """k^T v in pieces: one product over a million keys adds them one by one, and fp32 loses up to 5e-4."""
    number = k.shape[2] // PIECE
    if number == 0:
        return k.mT @ v
    whole = number * PIECE
    k_pieces, v_pieces = (x[:, :, :whole].unflatten(2, (number, PIECE)) for x in (k, v))
    return (k_pieces.mT @ v_pieces).sum(2) + k[:, :, whole:].mT @ v[:, :, whole:]


def read(q: Tensor, kv: Tensor) -> Tensor:
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


def composed_step(
    phi: Callable[[Tensor], Features],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    scale: float,
    kv: Tensor,
    peak: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """New tokens after the state (kv, peak): their outputs (B, H, L, Ev), and the state after them."""
    query, _ = features(phi, q, scale, None)
    k, exponent = features(phi, k, 1.0, valid)
    v, query = with_ones(v), query.unflatten(1, (k.shape[1], -1))
    after = merge_states(kv, peak, *state_of(k, v, exponent))
    one = query.shape[3] == 1
    sums = read(query, after[0]) if one else scan_from(query, k, v, exponent, kv, peak)
    return normalise(sums).flatten(1, 2).to(q.dtype), *after


def scan_from(
    q: Tensor, k: Tensor, v: Tensor, exponent: Tensor | None, kv: Tensor, peak: Tensor | None
) -> Tensor:
    """The causal scan after keys that are summed up in the state (kv, peak) already."""
    if exponent is None or peak is None:
        return scan(q, k[:, :, None], v[:, :, None], None, None, None, False) + read(q, kv)
    running = torch.maximum(exponent.cummax(2).values, peak[..., None])
    inside = scan(q, k[:, :, None], v[:, :, None], -running, exponent, None, False)
    return inside + read(q, kv) * torch.exp2(peak[..., None] - running)[:, :, None, :, None]


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
        return read(q, kv)
    beside = torch.arange(length, device=k.device) + q_offset
    inside = (beside >= 0) & (beside < num_keys)
    beside = beside.clamp(0, num_keys - 1)
    k, v = torch.where(inside[:, None], k[:, :, beside], 0.0), v[:, :, beside]
    exponent = None if exponent is None else torch.where(inside, exponent[:, :, beside], NOTHING)
    return scan_from(q, k, v, exponent, kv, peak)


def _both_ways(q: Tensor, k: Tensor, v: Tensor, exponent: Tensor | None, segment: Tensor) -> Tensor:
    """Non-causal within each segment: the keys up to each query, then those after it, at one scale a segment."""
    peak = following = None
    if exponent is not None:
        peak = -maximum_of_segment(exponent, segment)
        following = torch.cat([exponent[:, :, 1:], torch.full_like(exponent[:, :, :1], NOTHING)], 2)
    same = torch.cat(
        [segment[:, 1:] == segment[:, :-1], torch.zeros_like(segment[:, :1], dtype=torch.bool)], 1
    )
    if following is not None:
        following = torch.where(same[:, None], following, NOTHING)
    next_k = torch.where(same[:, None, None, :, None], k.roll(-1, 3), 0.0)
    forward = scan(q, k, v, peak, exponent, segment, False)
    return forward + scan(q, next_k, v.roll(-1, 3), peak, following, segment, True)
