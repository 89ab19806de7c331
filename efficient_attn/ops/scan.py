"""The causal scan that all of linear attention rests on, as a loop over blocks of chunks.

    y_i = sum over j <= i of (q_i . k_j) 2^(a_i + b_j) v_j      where a_i + b_j <= 0; a, b are integers or absent

Inside a chunk the sum is a masked product; what came before enters through the carry, sum_j k_j v_j^T 2^(b_j - c) with
c the largest b_j so far. Every scale is a power of two, so scaling never rounds, and a row reads nothing that
follows it. The gradients of q, k and v are three scans again:

    dq = scan(g, v, k)    dk = reverse scan(v, g, q)    dv = reverse scan(k, q, g)        (a and b swapped in reverse)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inputs import full_precision
from .operators import operator
from .workspace import Workspace

CHUNK = 64
BLOCK_ROWS = 2048
"""Rows of all heads together that are in flight at a time: what a core's cache holds."""


@dataclass
class Carry:
    """What a scan remembers between blocks; empty at first.

    `kv` (B, H, M, E) in units of 2^`exponent` (B, H), of the segment `segment` (B,) alone.
    """

    kv: Tensor | None = None
    exponent: Tensor | None = None
    segment: Tensor | None = None

    def add(self, kv: Tensor, exponent: Tensor | None, segment: Tensor | None) -> None:
        """Add later keys' sum; another segment begins anew."""
        same = None
        if segment is not None and self.segment is not None:
            same = (segment == self.segment)[:, None]
        if self.kv is None:
            self.kv = kv.clone()
        elif exponent is None or self.exponent is None:
            self.kv = kv + (self.kv if same is None else self.kv * same[..., None, None])
        else:
            before = self.exponent if same is None else torch.where(same, self.exponent, -torch.inf)
            joint = torch.maximum(before, exponent)
            scale = torch.exp2(exponent - joint)[..., None, None]
            self.kv = _scaled(self.kv, before - joint).addcmul_(kv, scale)
            exponent = joint
        self.exponent, self.segment = exponent, segment

    def absorb(self, k: Tensor, v: Tensor, b: Tensor | None) -> None:
        """Add keys (B, H, G, N, M) and values (B, H, G, N, E) that no row stands among; there are no segments."""
        if k.shape[3] == 0:
            return
        peak = None if b is None else b.amax(-1)
        if b is not None and peak is not None:
            k = k * torch.exp2(b - peak[..., None])[:, :, None, :, None]
        sums = k.flatten(2, 3).mT @ v.flatten(2, 3)
        self.add(sums, peak, None)

    def turned(self, columns: int) -> Carry:
        """The same of keys and values exchanged, the first `columns` of the values alone."""
        assert self.kv is not None
        return Carry(self.kv[..., :columns, :].mT, self.exponent, self.segment)

    def read(self, q: Tensor, a: Tensor | None) -> Tensor:
        """What rows q (B, H, G, N, M) after everything see: (B, H, G, N, E)."""
        assert self.kv is not None
        y = (q.flatten(2, 3) @ self.kv).unflatten(2, q.shape[2:4])
        if a is None or self.exponent is None:
            return y
        return y * _row_weights(a + self.exponent[..., None])


def _scaled(x: Tensor, exponent: Tensor) -> Tensor:
    return x * torch.exp2(exponent)[..., None, None]


def _row_weights(exponent: Tensor) -> Tensor:
    """2^exponent for (B, H, N), as (B, H, 1, N, 1); what exceeds 1 belongs to hidden pairs."""
    return torch.exp2(exponent.clamp(max=0))[:, :, None, :, None]


def blocks(length: int, rows: int, reverse: bool) -> Iterator[slice]:
    """[0, length) in blocks of whole chunks, the last one shorter; `rows` is how many heads there are in all."""
    if rows == 0:
        return
    size = max(1, BLOCK_ROWS // (CHUNK * rows)) * CHUNK
    whole = length // CHUNK * CHUNK
    starts = [slice(s, min(s + size, whole)) for s in range(0, whole, size)]
    parts = starts + ([slice(whole, length)] if whole < length else [])
    yield from reversed(parts) if reverse else parts


def scan_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    segment: Tensor | None,
    reverse: bool,
    carry: Carry,
    workspace: Workspace,
) -> Tensor:
    """The scan over one block, of less than a chunk or of whole ones, after `carry`, which moves past it.

    q (B, H, G, N, M), k (B, H, G', N, M), v (B, H, G', N, E), of G and G' one is 1; a, b (B, H, N), segment (B, N).
    Returns (B, H, G, N, E), valid until the next block.
    """
    past = pass_by(k, v, a, b, segment, reverse, carry, workspace)
    return rows_of_block(q, k, v, a, b, segment, reverse, past, workspace)


@dataclass
class Past:
    """What stands before each chunk of a block, and how much of it each row takes, all if `weights` is None.

    `states` (B, H, chunks, M, E), `weights` (B, H or 1, chunks, size).
    """

    states: Tensor
    weights: Tensor | None

    def turned(self, columns: int) -> Past:
        """The same of keys and values exchanged, the first `columns` of the values alone."""
        return Past(self.states[..., :columns, :].mT, self.weights)


def _in_chunks(x: Tensor) -> Tensor:
    """(B, H, G, N, M) -> (B H chunks, G size, M)."""
    size = min(CHUNK, x.shape[3])
    return x.unflatten(3, (x.shape[3] // size, size)).movedim(3, 2).flatten(3, 4).flatten(0, 2)


def _scales_in_chunks(x: Tensor | None) -> Tensor | None:
    """(..., N) -> (..., chunks, size)."""
    return None if x is None else x.unflatten(-1, (-1, min(CHUNK, x.shape[-1])))


def pass_by(
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    segment: Tensor | None,
    reverse: bool,
    carry: Carry,
    workspace: Workspace,
) -> Past:
    """What rows with the exponents `a` find before their chunks; `carry` moves past the block."""
    batch, heads, copies = k.shape[:3]
    kc, vc = _in_chunks(k), _in_chunks(v)
    ac, bc, sc = _scales_in_chunks(a), _scales_in_chunks(b), _scales_in_chunks(segment)
    taken, peak = _carried(bc, sc, reverse)
    if taken is not None and vc.shape[2] < kc.shape[2]:
        vc = _times(vc, taken, copies)
    elif taken is not None:
        kc = _times(kc, taken, copies)
    chunks = len(kc) // (batch * heads)
    sums = workspace.product(kc.mT, vc, "sums").view(batch, heads, chunks, kc.shape[2], vc.shape[2])
    if peak is None and sc is None:
        return Past(_plain_states(sums, reverse, carry, workspace), None)
    return _states(sums, peak, ac, sc, reverse, carry, workspace)


def rows_of_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    segment: Tensor | None,
    reverse: bool,
    past: Past,
    workspace: Workspace,
) -> Tensor:
    """What rows see of their own chunk and of `past`: (B, H, G, N, E), valid until the next block."""
    batch, heads, groups, length = q.shape[:4]
    qc, kc, vc = _in_chunks(q), _in_chunks(k), _in_chunks(v)
    ac, bc, sc = _scales_in_chunks(a), _scales_in_chunks(b), _scales_in_chunks(segment)
    pairs = _pairs(qc, kc, k.shape[2], ac, bc, sc, reverse, workspace)
    y = workspace.product(pairs, vc, "rows")
    states, weights = past.states.flatten(0, 2), past.weights
    size = qc.shape[1] // groups
    by_chunk = (batch, heads, length // size, groups, size, y.shape[2])
    if weights is not None and qc.shape[2] > y.shape[2]:
        read = workspace.product(qc, states, "read").view(by_chunk)
        y += read.mul_(weights[:, :, :, None, :, None]).view(y.shape)
    else:
        # A power of two on the narrower side: q times it loses nothing that would have counted.
        scaled = qc if weights is None else _times(qc, weights, groups)
        torch.baddbmm(y, scaled, states, out=y)
    return y.view(by_chunk).movedim(2, 3).reshape(batch, heads, groups, length, y.shape[2])


def _pairs(
    q: Tensor,
    k: Tensor,
    copies: int,
    a: Tensor | None,
    b: Tensor | None,
    segment: Tensor | None,
    reverse: bool,
    workspace: Workspace,
) -> Tensor:
    """The weights inside each chunk, zero where hidden: (B H chunks, G size, G' size)."""
    # The side with several rows a position goes first, so that each of its copies is one square matrix.
    turned = copies > 1
    x, y = (k, q) if turned else (q, k)
    size = y.shape[1]
    pairs = workspace.product(x, y.mT, "pairs")
    squares = pairs.view(-1, size, size)
    if a is not None and b is not None:
        row, column = (b, a) if turned else (a, b)
        # Hidden pairs may exceed every bound: clamp them, they are zeroed below.
        scale = torch.exp2((row[..., :, None] + column[..., None, :]).clamp_(max=0))
        rows = pairs.shape[1] // size
        pairs.view(*scale.shape[:3], rows, size, size).mul_(scale[:, :, :, None])
    (squares.triu_ if reverse != turned else squares.tril_)()
    if segment is not None:
        across = (segment[..., :, None] != segment[..., None, :])[:, None, :, None]
        heads = len(squares) // across.shape[0] // across.shape[2]
        groups = x.shape[1] // size
        squares.view(across.shape[0], heads // groups, across.shape[2], groups, size, size).masked_fill_(
            across, 0.0
        )
    return pairs.mT if turned else pairs


def _last(x: Tensor, reverse: bool) -> Tensor:
    """The entry of each chunk (..., size) at which the scan leaves it."""
    return x[..., 0] if reverse else x[..., -1]


def _carried(b: Tensor | None, segment: Tensor | None, reverse: bool) -> tuple[Tensor | None, Tensor | None]:
    """How much of its keys a chunk passes on, (B, H or 1, chunks, size): 2^(b - peak), none of segments that ended.

    With the peak (B, H, chunks); what is absent is None.
    """
    keep = None if segment is None else (segment == _last(segment, reverse)[..., None])[:, None]
    if b is None:
        return keep, None
    if keep is not None:
        b = torch.where(keep, b, -torch.inf)
    peak = b.amax(-1)
    return torch.exp2(b - peak[..., None]), peak


def _times(k: Tensor, weights: Tensor, copies: int) -> Tensor:
    """k (B H chunks, G' size, M) with its positions weighted (B, H or 1, chunks, size)."""
    batch, _, chunks, size = weights.shape
    return (k.view(batch, -1, chunks, copies, size, k.shape[2]) * weights[:, :, :, None, :, None]).view(
        k.shape
    )


def _plain_states(sums: Tensor, reverse: bool, carry: Carry, workspace: Workspace) -> Tensor:
    """Without scales and segments: running sums of `sums` over the chunks, each without its own."""
    states = workspace.take("states", *sums.shape, dtype=sums.dtype)
    last = torch.empty_like(sums[:, :, 0])
    ends = [*(reversed(states.unbind(2)) if reverse else states.unbind(2)), last]
    if carry.kv is None:
        ends[0].zero_()
    else:
        ends[0].copy_(carry.kv)
    in_order = reversed(sums.unbind(2)) if reverse else sums.unbind(2)
    for number, own in enumerate(in_order):
        torch.add(ends[number], own, out=ends[number + 1])
    carry.kv = last
    return states


def _states(
    sums: Tensor,
    peak: Tensor | None,
    a: Tensor | None,
    segment: Tensor | None,
    reverse: bool,
    carry: Carry,
    workspace: Workspace,
) -> Past:
    """`_plain_states` in units that differ from chunk to chunk, or for segments that end."""
    states = workspace.take("states", *sums.shape, dtype=sums.dtype)
    weights: list[Tensor] = []
    chunks = range(sums.shape[2])
    for c in reversed(chunks) if reverse else chunks:
        if carry.kv is None:
            states[:, :, c].zero_()
        else:
            states[:, :, c].copy_(carry.kv)
        weights.append(_taken(a, segment, c, carry, sums))
        now = None if segment is None else _last(segment[:, c], reverse)
        carry.add(sums[:, :, c], None if peak is None else peak[:, :, c], now)
    return Past(states, torch.stack(weights[::-1] if reverse else weights, 2))


def _taken(a: Tensor | None, segment: Tensor | None, chunk: int, carry: Carry, like: Tensor) -> Tensor:
    """How much each row of a chunk takes of the carry: (B, H or 1, size)."""
    weights = like.new_ones(1, 1, 1)
    if a is not None and carry.exponent is not None:
        weights = torch.exp2((a[:, :, chunk] + carry.exponent[..., None]).clamp(max=0))
    if segment is not None and carry.segment is not None:
        weights = weights * (segment[:, chunk] == carry.segment[:, None])[:, None]
    shape = a[:, :, chunk].shape if a is not None else segment[:, None, chunk].shape  # type: ignore[index]
    return weights.expand(shape)


def forward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, segment: Tensor | None, reverse: bool
) -> Tensor:
    """The scan of q (B, H, G, N, M) over k (B, H, G', N, M) and v (B, H, G', N, E): (B, H, G, N, E).

    The G' copies of the keys at one position are summed; G or G' is 1. `a`, `b` are (B, H, N), both or neither;
    `segment` (B, N) holds equal numbers at consecutive positions that may see each other. `reverse` sums over j >= i.
    """
    out = torch.empty(*q.shape[:4], v.shape[4], dtype=q.dtype, device=q.device)
    carry, workspace = Carry(), Workspace(q.device)
    rows = q.shape[0] * q.shape[1] * max(q.shape[2], k.shape[2])
    with full_precision(q.device):
        for block in blocks(q.shape[3], rows, reverse):
            qc, kc, vc = (x[:, :, :, block] for x in (q, k, v))
            ac, bc = (None if x is None else x[:, :, block] for x in (a, b))
            own = None if segment is None else segment[:, block]
            out[:, :, :, block] = scan_block(qc, kc, vc, ac, bc, own, reverse, carry, workspace)
    return out


def _fake(q, k, v, *others):  # type: ignore[no-untyped-def]
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


scan = operator("linear_scan", forward, _fake, _save, _backward)
"""`forward` as a differentiable operator."""
