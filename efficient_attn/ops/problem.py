"""What an operator is asked to compute, and its masks lowered to one boolean matrix for the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..feature_maps import FeatureMap
from ..masks import Mask


@dataclass(kw_only=True)
class Problem:
    """Queries, keys, values and masks, checked and resolved, before anyone has computed anything."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float
    q_offset: int | Tensor
    is_causal: bool
    key_mask: Tensor | None = None
    segment_ids: Tensor | None = None


@dataclass(kw_only=True)
class SoftmaxProblem(Problem):
    """softmax(scale q k^T + attn_bias, where the masks allow) v."""

    mask_spec: str
    attn_bias: Tensor | None = None
    dropout_p: float = 0.0


@dataclass(kw_only=True)
class LinearProblem(Problem):
    """phi(q) phi(k)^T v, each row divided by its sum of weights, where the masks allow."""

    feature_map: FeatureMap


def anchors(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first valid position of each row, and one past its last; both 0 where the row has none. (B,), (B,)."""
    position = torch.arange(key_mask.shape[1], device=key_mask.device)
    if key_mask.shape[1] == 0:
        none = torch.zeros(len(key_mask), dtype=torch.int64, device=key_mask.device)
        return none, none
    stop = torch.where(key_mask, position + 1, 0).amax(1)
    first = torch.where(key_mask, position, key_mask.shape[1]).amin(1)
    return torch.where(stop > 0, first, 0), stop


def segments_of_queries(segment_ids: Tensor, q_len: int, q_offset: int | Tensor) -> Tensor:
    """(B, L): the segment at each query's position, -1 outside the sequence."""
    if segment_ids.shape[1] == 0:
        return segment_ids.new_full((len(segment_ids), q_len), -1)
    position = torch.arange(q_len, device=segment_ids.device) + q_offset
    inside = (position >= 0) & (position < segment_ids.shape[1])
    return torch.where(inside, segment_ids[:, position.clamp(0, segment_ids.shape[1] - 1)], -1)


def allowed_pairs(p: Problem) -> Tensor:
    """Which query may attend to which key, all masks together: (B or 1, 1, L, S) bool."""
    q_len, num_keys = p.q.shape[2], p.k.shape[2]
    q_pos = torch.arange(q_len, device=p.q.device)[:, None] + p.q_offset
    k_pos = torch.arange(num_keys, device=p.q.device)[None, :]
    mask = p.mask
    if p.key_mask is not None and mask.anchored:
        start, stop = (x[:, None, None] for x in anchors(p.key_mask))
        q_pos, k_pos = q_pos - start, k_pos - start
        allowed = mask.sized(stop - start).allows(q_pos, k_pos)[:, None]
    else:
        allowed = mask.sized(num_keys).allows(q_pos, k_pos)[None, None]
    if p.key_mask is not None:
        allowed = allowed & p.key_mask[:, None, None, :]
    if p.segment_ids is not None:
        q_segment = segments_of_queries(p.segment_ids, q_len, p.q_offset)
        same = q_segment[:, :, None] == p.segment_ids[:, None, :]
        allowed = allowed & (same & (p.segment_ids >= 0)[:, None, :])[:, None]
    return allowed
