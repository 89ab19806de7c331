"""Softmax attention over the tiles of a structured mask, in plain torch: any device, dtype, mask and head size.

Forward and backward are custom ops. A loop of slices under autograd would zero-fill a full-length gradient for
every slice, and under torch.compile would be unrolled for every length; an op is one node that serves all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ..inputs import accumulation_dtype, full_precision, refuse_forward_mode
from ..masks import Mask, Tile, plan
from .problem import SoftmaxProblem, anchors, segments_of_queries

TILE_ROWS = 64
TILE_KEYS = 1024


def blocked(p: SoftmaxProblem) -> Tensor:
    """softmax(scale q k^T) v over the tiles of `p.mask`; memory O(L + S), time in the pairs of the tiles."""
    refuse_forward_mode(p.q, p.k, p.v)
    q_segment = k_segment = None
    if p.segment_ids is not None:
        q_segment = segments_of_queries(p.segment_ids, p.q.shape[2], p.q_offset)
        k_segment = p.segment_ids
    if p.key_mask is not None:
        k_segment = torch.where(p.key_mask, 0 if k_segment is None else k_segment, -1)
    # A copy, because a cache may move its offset on before the backward pass reads it.
    offset = (
        p.q_offset.clone()
        if isinstance(p.q_offset, Tensor)
        else torch.full((), p.q_offset, dtype=torch.int64)
    )
    # The seed comes from torch's generator, so that manual_seed and checkpointing govern the dropout.
    seed = torch.randint(1 << 62, ()) if p.dropout_p > 0 else None
    out, _ = _forward_op(p.q, p.k, p.v, q_segment, k_segment, offset, seed, p.mask_spec, p.scale, p.dropout_p)
    return out


@dataclass
class _Rows:
    """Batch rows that share an anchor, with their keys from the anchor on."""

    index: Tensor | None
    start: int
    stop: int

    def take(self, x: Tensor) -> Tensor:
        return x if self.index is None else x[self.index]

    def keys(self, x: Tensor, dim: int) -> Tensor:
        return self.take(x).narrow(dim, self.start, self.stop - self.start)


def _row_groups(mask: Mask, k_segment: Tensor | None, num_keys: int) -> Iterator[_Rows]:
    """One group for an unanchored mask, else one for each first valid position; the last matters to some draws."""
    if k_segment is None or not mask.anchored:
        yield _Rows(None, 0, num_keys)
        return
    start, stop = anchors(k_segment >= 0)
    if not mask.drawn_over_all:
        stop = torch.full_like(stop, num_keys)
    members: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        members.setdefault(key, []).append(row)
    for (first, last), rows in members.items():
        index = None if len(rows) == len(k_segment) else torch.tensor(rows, device=k_segment.device)
        yield _Rows(index, first, last)


def _gather(x: Tensor, tile: Tile, dim: int) -> Tensor:
    """The tile's keys along `dim`: a view where they are one slice."""
    index = (slice(None),) * dim
    parts = [x[(*index, s)] for s in tile.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _scatter_add(x: Tensor, tile: Tile, values: Tensor) -> None:
    start = 0
    for s in tile.keys:
        length = len(range(s.start, s.stop, s.step))
        x[:, :, s] += values[:, :, start : start + length]
        start += length


def _disallowed(
    tile: Tile, q_pos: Tensor, k_pos: Tensor, q_segment: Tensor | None, k_segment: Tensor | None
) -> Tensor | None:
    """What to mask out of the tile's scores (b, 1, 1, rows, keys), or None if nothing."""
    allowed = None
    if tile.mask is not None:
        allowed = tile.mask.allows(q_pos[:, None], k_pos[None, :])[None]
    if k_segment is not None:
        keys = k_segment[:, None, :]
        same = keys >= 0 if q_segment is None else (q_segment[:, :, None] == keys) & (keys >= 0)
        allowed = same if allowed is None else allowed & same
    return None if allowed is None else ~allowed[:, None, None]


class _Walk:
    """The tiles of one group of rows: slices inputs, computes masked scores, draws dropout in a fixed order."""

    def __init__(
        self,
        group: _Rows,
        mask: Mask,
        q: Tensor,
        k: Tensor,
        q_seg: Tensor | None,
        k_seg: Tensor | None,
        offset: int,
    ) -> None:
        self.offset = offset - group.start
        length, heads = q.shape[2], k.shape[1]
        self.q = rearrange(group.take(q), "b (h g) l e -> b h g l e", h=heads)
        self.k = group.keys(k, 2)
        self.q_seg = None if q_seg is None else group.take(q_seg)
        self.k_seg = None if k_seg is None else group.keys(k_seg, 1)
        num_keys = group.stop - group.start
        self.tiles = plan(mask, self.offset, self.offset + length, num_keys, TILE_ROWS, TILE_KEYS)
        self.q_pos = torch.arange(self.offset, self.offset + length, device=q.device)
        self.k_pos = torch.arange(num_keys, device=q.device)

    def rows(self, tile: Tile) -> slice:
        return slice(tile.rows.start - self.offset, tile.rows.stop - self.offset, tile.rows.step)

    def scores(self, tile: Tile, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries (b, h, g r, e), keys (b, h, n, e) and masked scores (b, h, g, r, n) of the tile."""
        rows = self.rows(tile)
        q = rearrange(self.q[:, :, :, rows].to(dtype) * scale, "b h g r e -> b h (g r) e")
        k = _gather(self.k, tile, 2).to(dtype)
        scores = rearrange(q @ k.mT, "b h (g r) n -> b h g r n", g=self.q.shape[2])
        hidden = _disallowed(
            tile,
            self.q_pos[rows],
            _gather(self.k_pos, tile, 0),
            None if self.q_seg is None else self.q_seg[:, rows],
            None if self.k_seg is None else _gather(self.k_seg, tile, 1),
        )
        return q, k, scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _generator(seed: Tensor | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(int(seed))


def _keep(scores: Tensor, generator: torch.Generator, dropout_p: float) -> Tensor:
    """Dropout's factor for each weight: 0, or 1 / (1 - p)."""
    draw = torch.rand(scores.shape, generator=generator, device=scores.device)
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
    """The output (B, H, L, Ev) and the log-sum-exp of each row's scores (B, H, L), -inf where it has none."""
    structure, dtype, heads = Mask.from_spec(mask), accumulation_dtype(q.dtype), k.shape[1]
    out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=dtype)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
    generator = _generator(seed, q.device)
    with full_precision(q.device):
        for group in _row_groups(structure, k_segment, k.shape[2]):
            walk = _Walk(group, structure, q, k, q_segment, k_segment, int(q_offset))
            values = group.keys(v, 2)
            part_out = torch.zeros_like(group.take(out)) if group.index is not None else out
            part_lse = torch.full_like(group.take(lse), -torch.inf) if group.index is not None else lse
            grouped_out = rearrange(part_out, "b (h g) l e -> b h g l e", h=heads)
            grouped_lse = rearrange(part_lse, "b (h g) l -> b h g l", h=heads)
            for tile in walk.tiles:
                _, _, scores = walk.scores(tile, scale, dtype)
                peak = scores.amax(-1, keepdim=True).nan_to_num_(neginf=0.0)
                weights = scores.sub_(peak).exp_()
                total = weights.sum(-1, keepdim=True)
                if generator is not None:
                    weights = weights * _keep(weights, generator, dropout_p)
                tile_out = rearrange(weights, "b h g r n -> b h (g r) n") @ _gather(values, tile, 2).to(dtype)
                tile_out = rearrange(tile_out, "b h (g r) e -> b h g r e", g=scores.shape[2])
                tile_out = tile_out / torch.where(total == 0, 1.0, total)
                tile_lse = (peak + total.log()).squeeze(-1)
                _store(tile.first, grouped_out, grouped_lse, walk.rows(tile), tile_out, tile_lse)
            if group.index is not None:
                out[group.index], lse[group.index] = part_out, part_lse
    return out.to(q.dtype), lse


def _store(first: bool, out: Tensor, lse: Tensor, rows: slice, tile_out: Tensor, tile_lse: Tensor) -> None:
    """Put a tile's result into its rows, or merge it with what earlier tiles left there."""
    if not first:
        before = lse[:, :, :, rows]
        joint = torch.logaddexp(before, tile_lse)
        base = joint.nan_to_num(neginf=0.0)
        tile_out = tile_out * (tile_lse - base).exp()[..., None]
        tile_out = tile_out + out[:, :, :, rows] * (before - base).exp()[..., None]
        tile_lse = joint
    out[:, :, :, rows], lse[:, :, :, rows] = tile_out, tile_lse


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
    structure, dtype, heads = Mask.from_spec(mask), accumulation_dtype(q.dtype), k.shape[1]
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    grad = grad.to(dtype)
    delta = (grad * out.to(dtype)).sum(-1)
    generator = _generator(seed, q.device)
    with full_precision(q.device):
        for group in _row_groups(structure, k_segment, k.shape[2]):
            walk = _Walk(group, structure, q, k, q_segment, k_segment, int(q_offset))
            values = group.keys(v, 2)
            by_group = (
                rearrange(group.take(x), "b (h g) ... -> b h g ...", h=heads) for x in (grad, delta, lse, dq)
            )
            grad_g, delta_g, lse_g, dq_g = by_group
            dk_g, dv_g = torch.zeros_like(walk.k, dtype=dtype), torch.zeros_like(values, dtype=dtype)
            for tile in walk.tiles:
                rows = walk.rows(tile)
                queries, keys, scores = walk.scores(tile, scale, dtype)
                row_lse = lse_g[:, :, :, rows, None].nan_to_num(neginf=0.0)
                weights = scores.sub_(row_lse).exp_()
                row_grad = rearrange(grad_g[:, :, :, rows], "b h g r e -> b h (g r) e")
                d_weights = (row_grad @ _gather(values, tile, 2).to(dtype).mT).view_as(weights)
                kept = weights
                if generator is not None:
                    keep = _keep(weights, generator, dropout_p)
                    kept, d_weights = weights * keep, d_weights * keep
                _scatter_add(dv_g, tile, rearrange(kept, "b h g r n -> b h (g r) n").mT @ row_grad)
                d_scores = weights * (d_weights - delta_g[:, :, :, rows, None])
                d_scores = rearrange(d_scores, "b h g r n -> b h (g r) n")
                _scatter_add(dk_g, tile, d_scores.mT @ queries)
                d_rows = rearrange(d_scores @ keys, "b h (g r) e -> b h g r e", g=weights.shape[2])
                dq_g[:, :, :, rows] += d_rows * scale
            _put(group, dq, rearrange(dq_g, "b h g l e -> b (h g) l e"), 0, q.shape[2])
            _put(group, dk, dk_g, group.start, group.stop)
            _put(group, dv, dv_g, group.start, group.stop)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _put(group: _Rows, target: Tensor, part: Tensor, start: int, stop: int) -> None:
    if group.index is None:
        target[:, :, start:stop] = part
    else:
        target[group.index, :, start:stop] = part


_forward_op = torch.library.custom_op("efficient_attn::blocked_forward", forward, mutates_args=())
_backward_op = torch.library.custom_op("efficient_attn::blocked_backward", backward, mutates_args=())


@_forward_op.register_fake
def _(q, k, v, q_segment, k_segment, q_offset, seed, mask, scale, dropout_p):  # type: ignore[no-untyped-def]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@_backward_op.register_fake
def _(grad, q, k, v, out, lse, q_segment, k_segment, q_offset, seed, mask, scale, dropout_p):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, q_segment, k_segment, q_offset, seed, mask, scale, dropout_p = inputs
    ctx.save_for_backward(q, k, v, *output, q_segment, k_segment)
    ctx.scalars = (q_offset, seed, mask, scale, dropout_p)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _grad_lse):  # type: ignore[no-untyped-def]
    grads = _backward_op(grad, *ctx.saved_tensors, *ctx.scalars)
    return (*grads, *[None] * 7)


def _no_second_derivative(ctx, *grads):  # type: ignore[no-untyped-def]
    raise NotImplementedError('blocked attention has no second derivative; backend="reference" has one')


_forward_op.register_autograd(_backward, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)
