"""Softmax attention over the tiles of a structured mask, in plain torch: any device, dtype, mask and head size.

Equal tiles are batched, so that each product works on what a core's cache holds. Weights are powers of two, because
torch's exp2 is vectorised on every CPU and its exp is not.

Forward and backward are custom ops. A loop of slices under autograd would zero-fill a full-length gradient for
every slice, and under torch.compile would be unrolled for every length; an op is one node that serves all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..inputs import accumulation_dtype, full_precision, refuse_forward_mode
from ..masks import Mask
from .lowering import lowered, softmax_operator
from .problem import SoftmaxProblem
from .tiles import Batch, Rows, Walk, merged_heads, row_groups

LOG2_E = math.log2(math.e)


def blocked(p: SoftmaxProblem) -> Tensor:
    """softmax(scale q k^T) v over the tiles of `p.mask`; memory O(L + S), time in the pairs of the tiles."""
    refuse_forward_mode(p.q, p.k, p.v)
    out, _ = _forward_op(*lowered(p))
    return out


def _generator(seed: Tensor | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(int(seed))


def _keep(scores: Tensor, generator: torch.Generator, dropout_p: float) -> Tensor:
    """Dropout's factor for each weight: 0, or 1 / (1 - p)."""
    # Not in the default dtype, which may be coarser than `dropout_p`, or another one when it is drawn again.
    draw = torch.rand(scores.shape, generator=generator, dtype=torch.float32, device=scores.device)
    return (draw >= dropout_p).to(scores.dtype) / (1 - dropout_p)


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
    structure, dtype = Mask.from_spec(mask), accumulation_dtype(q.dtype)
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    generator = _generator(seed, q.device)
    with full_precision(q.device):
        for group in row_groups(structure, k_segment, k.shape[2]):
            walk, values = _walk(group, structure, q, k, q_segment, k_segment, q_offset), group.keys(v, 2)
            part_out, part_lse = group.take(out), group.take(lse)
            if not walk.stores_every_row:
                part_out.zero_()
                part_lse.fill_(-torch.inf)
            for batch in walk.batches(dtype):
                scores = batch.scores(
                    batch.queries(scale * LOG2_E, dtype), batch.take_keys(walk.k, "keys", dtype)
                )
                # A finite peak, so that a row of -inf gives weights of zero.
                peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
                weights = scores.sub_(peak).exp2_()
                total = weights.sum(-1, keepdim=True)
                if generator is not None:
                    weights = weights * _keep(weights, generator, dropout_p)
                tile_out = walk.workspace.product(
                    merged_heads(weights), batch.take_keys(values, "values", dtype), "out"
                ).view(*weights.shape[:-1], -1)
                # Where there is a key at all, the largest weight is 1.
                tile_out /= total.clamp(min=1)
                _store(batch, part_out, part_lse, tile_out, (peak + total.log2()).squeeze(-1))
            if group.index is not None:
                out[group.index], lse[group.index] = part_out, part_lse
    return out.to(q.dtype), lse


def _walk(
    group: Rows,
    mask: Mask,
    q: Tensor,
    k: Tensor,
    q_segment: Tensor | None,
    k_segment: Tensor | None,
    q_offset: Tensor,
) -> Walk:
    """The tiles of a group of rows, which counts positions from its anchor."""
    return Walk(
        mask,
        group.take(q),
        group.keys(k, 2),
        None if q_segment is None else group.take(q_segment),
        None if k_segment is None else group.keys(k_segment, 1),
        int(q_offset) - group.start,
    )


def _store(batch: Batch, out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
    """Put the results of a batch into their rows, or merge them with what earlier tiles left there."""
    if batch.first:
        batch.put_rows(out, tile_out)
        batch.put_rows(lse, tile_lse)
        return
    for tile, (new_out, new_lse) in batch.each(tile_out, tile_lse):
        old_out, old_lse = tile.take_rows(out), tile.take_rows(lse)
        joint = torch.logaddexp2(old_lse, new_lse)
        base = joint.clamp(min=torch.finfo(joint.dtype).min)
        merged = new_out * (new_lse - base).exp2_()[..., None]
        merged += old_out * (old_lse - base).exp2_()[..., None]
        tile.put_rows(out, merged)
        tile.put_rows(lse, joint)


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
    """The gradients of q, k and v; weights are recomputed tile by tile from the log-sum-exp."""
    structure, dtype = Mask.from_spec(mask), accumulation_dtype(q.dtype)
    dq = torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (k, v))
    delta = (grad.to(dtype) * out.to(dtype)).sum(-1)
    # A row without keys has weights of zero whatever is subtracted, if only it is finite.
    lse = lse.clamp(min=torch.finfo(dtype).min)
    generator = _generator(seed, q.device)
    with full_precision(q.device):
        for group in row_groups(structure, k_segment, k.shape[2]):
            walk, values = _walk(group, structure, q, k, q_segment, k_segment, q_offset), group.keys(v, 2)
            grad_g, delta_g, lse_g, dq_g = (group.take(x) for x in (grad, delta, lse, dq))
            dk_g, dv_g = group.keys(dk, 2), group.keys(dv, 2)
            if not walk.stores_every_row:
                dq_g.zero_()
            for batch in walk.batches(dtype):
                queries = batch.queries(scale * LOG2_E, dtype)
                keys = batch.take_keys(walk.k, "keys", dtype)
                weights = batch.scores(queries, keys).sub_(batch.take_rows(lse_g)[..., None]).exp2_()
                row_grad = batch.dense_rows(grad_g, "grad", dtype)
                tile_values = batch.take_keys(values, "values", dtype)
                d_weights = walk.workspace.product(row_grad, tile_values.mT, "d_weights").view_as(weights)
                kept = weights
                if generator is not None:
                    keep = _keep(weights, generator, dropout_p)
                    kept, d_weights = weights * keep, d_weights * keep
                batch.add_keys(dv_g, walk.workspace.product(merged_heads(kept).mT, row_grad, "d_values"))
                d_scores = d_weights.sub_(batch.take_rows(delta_g)[..., None]).mul_(weights)
                d_scores = merged_heads(d_scores)
                batch.add_keys(dk_g, walk.workspace.product(d_scores.mT, queries, "d_keys"))
                _add_rows(
                    batch,
                    dq_g,
                    walk.workspace.product(d_scores, keys, "d_queries").view(*weights.shape[:-1], -1),
                )
            if group.index is not None:
                dq[group.index] = dq_g
                dk[group.index, :, group.start : group.stop] = dk_g
                dv[group.index, :, group.start : group.stop] = dv_g
    return dq.mul_(scale).to(q.dtype), dk.div_(LOG2_E).to(k.dtype), dv.to(v.dtype)


def _add_rows(batch: Batch, target: Tensor, values: Tensor) -> None:
    if batch.first:
        batch.put_rows(target, values)
        return
    for tile, (part,) in batch.each(values):
        tile.put_rows(target, tile.take_rows(target) + part)


_forward_op = softmax_operator("blocked", forward, backward)
