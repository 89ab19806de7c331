"""The causal scan of linear attention, in chunks: y_i = sum_{j <= i} (q_i . k_j) 2^(a_i + b_j) v_j.

The powers of two are exact, so the stabiliser costs no accuracy; a_i + b_j is at most 0 for every pair summed.
The backward pass is the same scan three times, so second derivatives come for nothing:

    dq = scan(g, v, k)            over j <= i, the weights unchanged
    dk = scan(v, g, q)            over i >= j, with a and b exchanged
    dv = scan(k, q, g)            likewise
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import full_precision

CHUNK = 64


def forward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, segment: Tensor | None, reverse: bool
) -> Tensor:
    """The scan of q (B, H, G, N, D) over k (B, H, G', N, D) and v (B, H, G', N, E): (B, H, G, N, E).

    The G' copies of the keys at one position are summed. `a`, `b` are (B, H, N), both or neither; `segment` (B, N)
    holds equal numbers at consecutive positions that may see each other. `reverse` sums over j >= i.
    """
    groups, length = q.shape[2], q.shape[3]
    out = torch.empty(*q.shape[:4], v.shape[4], dtype=q.dtype, device=q.device)
    state = q.new_zeros(*q.shape[:2], q.shape[4], v.shape[4])
    state_exponent: Tensor | None = None
    state_segment: Tensor | None = None
    starts = range(0, length, CHUNK)
    with full_precision(q.device):
        for start in reversed(starts) if reverse else starts:
            chunk = slice(start, min(start + CHUNK, length))
            size = chunk.stop - chunk.start
            qc, kc, vc = (x[:, :, :, chunk].flatten(2, 3) for x in (q, k, v))
            ac, bc = (None if x is None else x[:, :, chunk] for x in (a, b))
            sc = None if segment is None else segment[:, chunk]

            scores = (qc @ kc.mT).unflatten(2, (groups, size)).unflatten(4, (k.shape[2], size))
            if ac is not None and bc is not None:
                # Hidden pairs may exceed every bound: clamp them, they are zeroed below.
                scores *= torch.exp2((ac[..., :, None] + bc[..., None, :]).clamp(max=0))[:, :, None, :, None]
            scores.masked_fill_(_hidden(sc, size, reverse, q.device), 0.0)
            y = scores.flatten(4, 5).flatten(2, 3) @ vc
            carried = (qc @ state).unflatten(2, (groups, size))
            y = y.unflatten(2, (groups, size)).add_(
                carried * _state_weights(ac, sc, state_exponent, state_segment, q)
            )
            out[:, :, :, chunk] = y

            last = chunk.start if reverse else chunk.stop - 1
            state, state_exponent, state_segment = _advance(
                state,
                state_exponent,
                state_segment,
                k[:, :, :, chunk],
                v[:, :, :, chunk],
                bc,
                segment,
                sc,
                last,
            )
    return out


def _hidden(segment: Tensor | None, size: int, reverse: bool, device: torch.device) -> Tensor:
    """Pairs of a chunk that must not be summed: (B or 1, 1, 1, size, 1, size)."""
    visible = torch.ones(size, size, dtype=torch.bool, device=device)
    visible = (visible.triu_() if reverse else visible.tril_())[None]
    if segment is not None:
        visible = visible & (segment[:, :, None] == segment[:, None, :])
    return ~visible[:, None, None, :, None, :]


def _state_weights(
    a: Tensor | None,
    segment: Tensor | None,
    exponent: Tensor | None,
    state_segment: Tensor | None,
    like: Tensor,
) -> Tensor:
    """How much each row of a chunk takes from the state of the chunks before: (B, H, 1, size, 1) or a scalar."""
    weights = torch.ones((), dtype=like.dtype, device=like.device)
    if a is not None and exponent is not None:
        weights = torch.exp2((a + exponent[..., None]).clamp(max=0))[:, :, None, :, None]
    if segment is not None and state_segment is not None:
        weights = weights * (segment == state_segment[:, None])[:, None, None, :, None]
    return weights


def _advance(
    state: Tensor,
    exponent: Tensor | None,
    state_segment: Tensor | None,
    k: Tensor,
    v: Tensor,
    b: Tensor | None,
    all_segments: Tensor | None,
    segment: Tensor | None,
    last: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The state after a chunk: sum of k_j v_j^T 2^(b_j - exponent) over the segment that is open at its end."""
    now = None if all_segments is None else all_segments[:, last]
    keep = None
    if segment is not None and now is not None:
        keep = (segment == now[:, None])[:, None]
    weights = None if keep is None else keep.to(k.dtype)
    if b is not None:
        b = b if keep is None else torch.where(keep, b, -torch.inf)
        peak = b.amax(-1)
        carried = None
        if exponent is not None:
            still = exponent if keep is None else torch.where(_same(now, state_segment), exponent, -torch.inf)
            peak = torch.maximum(peak, still)
            carried = torch.exp2(still - peak)
        weights = torch.exp2(b - peak[..., None])
        state = state if carried is None else state * carried[..., None, None]
        exponent = peak
    elif state_segment is not None:
        state = state * _same(now, state_segment)[..., None, None]
    if weights is not None:
        k = k * weights[:, :, None, :, None]
    return state + k.flatten(2, 3).mT @ v.flatten(2, 3), exponent, now


def _same(now: Tensor | None, before: Tensor | None) -> Tensor:
    assert now is not None and before is not None
    return (now == before)[:, None]


scan = torch.library.custom_op("efficient_attn::linear_scan", forward, mutates_args=())
"""`forward` as a differentiable operator."""


@scan.register_fake
def _(q, k, v, a, b, segment, reverse):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:4], v.shape[4])


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, reverse = inputs
    ctx.save_for_backward(*tensors)
    ctx.reverse = reverse


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    q, k, v, a, b, segment = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dq = scan(grad, v, k, a, b, segment, ctx.reverse) if needs[0] else None
    dk = scan(v, grad, q, b, a, segment, not ctx.reverse) if needs[1] else None
    dv = scan(k, q, grad, b, a, segment, not ctx.reverse) if needs[2] else None
    return dq, dk, dv, None, None, None, None


scan.register_autograd(_backward, setup_context=_save)
