"""Softmax attention over a structured mask by Triton kernels: the operator, and what it serves.

The kernels walk a window in closed form, any other pattern by a table of blocks that is built once for a length and
kept. Nothing waits for the device, but for three cases in which a table depends on what lies there: a `q_offset` on the
device, under any pattern that needs a table; key masks of patterns drawn over the whole sequence, whose table follows
from the number of valid keys; and the building of a table itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Backend
from ..inputs import refuse_forward_mode
from ..kernels import refusals
from ..kernels.block_sparse.parts import LONGEST
from ..kernels.block_sparse.parts import refusals as mask_refusals
from ..masks import Mask
from .lowering import lowered, softmax_operator
from .problem import SoftmaxProblem, anchors


def block_sparse(p: SoftmaxProblem) -> Tensor:
    """softmax(scale q k^T) v over the blocks of `p.mask`; memory O(L + S), time in the pairs of the blocks."""
    refuse_forward_mode(p.q, p.k, p.v)
    out, _ = _forward_op(*lowered(p))
    return out


def refuse(p: SoftmaxProblem) -> list[str]:
    """Why the kernels cannot run `p`."""
    reasons = refusals(p.q.device, p.q.dtype, p.q.shape[3], p.v.shape[3])
    if p.attn_bias is not None:
        reasons.append("attn_bias is not supported")
    reasons += mask_refusals(p.mask)
    if max(p.q.shape[2], p.k.shape[2]) >= LONGEST:
        reasons.append(f"takes fewer than 2^30 queries and keys, not {p.q.shape[2]} and {p.k.shape[2]}")
    return reasons


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segment: Tensor | None,
    k_segment: Tensor | None,
    q_offset: Tensor,
    seed: Tensor | None,
    mask: str,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, L, Ev), and the base-2 log-sum-exp2 of each row's scores (B, H, L), -inf where it has none."""
    from ..kernels.block_sparse import launch

    with torch.cuda.device_of(q):
        return launch.forward(_call(q, k, v, q_segment, k_segment, q_offset, seed, mask, scale, dropout_p))


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_segment: Tensor | None,
    k_segment: Tensor | None,
    q_offset: Tensor,
    seed: Tensor | None,
    mask: str,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; weights are recomputed block by block from the log-sum-exp."""
    from ..kernels.block_sparse import launch

    with torch.cuda.device_of(q):
        call = _call(q, k, v, q_segment, k_segment, q_offset, seed, mask, scale, dropout_p)
        return launch.backward(call, grad, out, lse)


def _call(q, k, v, q_segment, k_segment, q_offset, seed, spec, scale, dropout_p):  # type: ignore[no-untyped-def]
    """The call of the kernels: masks of rows found, the offset left where it lies."""
    from ..kernels.block_sparse.launch import Call, Group, unit_columns

    if seed is not None and q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph would repeat one draw of dropout for ever: its seed is read on the host"
        )
    mask, groups, anchor = Mask.from_spec(spec), (Group(None, k.shape[2]),), None
    if mask.anchored and k_segment is not None:
        anchor, stop = anchors(k_segment >= 0)
        if mask.drawn_over_all:
            lengths = stop - anchor
            groups = tuple(
                Group((lengths == length).nonzero().squeeze(1), length)
                for length in dict.fromkeys(lengths.tolist())
            )
    return Call(
        q=unit_columns(q),
        k=unit_columns(k),
        v=unit_columns(v),
        q_segment=None if q_segment is None else q_segment.contiguous(),
        k_segment=None if k_segment is None else k_segment.contiguous(),
        anchor=anchor,
        groups=groups,
        q_offset=int(q_offset) if q_offset.device.type == "cpu" else q_offset.to(torch.int64),
        seed=0 if seed is None else int(seed),
        mask=mask,
        scale=scale,
        dropout_p=dropout_p,
    )


_forward_op = softmax_operator("block_sparse", forward, backward)

TRITON = Backend("triton", block_sparse, refuse, portable=False)
