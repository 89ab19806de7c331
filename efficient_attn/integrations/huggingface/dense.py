"""Full attention with what some models do to the scores: written out, in O(L S) time and memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...inputs import accumulation_dtype
from ...mechanisms import FullAttention
from ...mechanisms.base import Mechanism
from ...ops.problem import allowed_pairs
from .lowering import Masks


def softcapped(
    mechanism: Mechanism,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Masks,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Full attention whose scores s become c tanh(s / c), and whose rows may attend to nothing.

        weights_ij = exp(s_ij + b_ij) / (exp(sink_h) + sum_j exp(s_ij + b_ij))

    Gemma Team, "Gemma 2", 2024, arXiv:2408.00118, section 2 (softcap); the sink is a learnt score of each head that
    no value belongs to.

    Args:
        softcap: c; None leaves the scores alone.
        sinks: (H,) scores; None is minus infinity.
    Returns:
        The outputs (B, H, L, Ev) and the weights (B, H, L, S) before dropout.
    """
    assert isinstance(mechanism, FullAttention)
    p = mechanism._problem(q, k, v, masks.key_mask, masks.segment_ids, masks.q_offset, masks.attn_bias)
    groups = q.shape[1] // k.shape[1]
    dtype = accumulation_dtype(q.dtype)
    grouped = p.q.to(dtype).unflatten(1, (-1, groups))
    scores = torch.einsum("bhgle,bhse->bhgls", grouped, p.k.to(dtype)).flatten(1, 2) * p.scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = allowed_pairs(p)
    bias = p.attn_bias
    if bias is not None and bias.dtype == torch.bool:
        allowed = allowed & bias
    elif bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~allowed, -torch.inf)
    sink = torch.full_like(scores[..., :1], -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand_as(sink)
    top = torch.cat([scores, sink], -1).amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True) + torch.exp(sink - top)
    weights = weights / torch.where(total > 0, total, 1.0)
    dropped = F.dropout(weights, p.dropout_p, training=p.dropout_p > 0)
    out = torch.einsum("bhgls,bhsv->bhglv", dropped.unflatten(1, (-1, groups)), p.v.to(dtype))
    return out.flatten(1, 2).to(q.dtype), weights
