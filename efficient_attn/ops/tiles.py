"""Walking the tiles of a mask: batches of equal tiles, gathered into dense operands and scattered back.

Letters of shapes: b rows of the batch, h key-value heads, g queries that share one, t tiles, r rows of a tile,
n keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from ..masks import Mask, Tile, TileGroup, tile_groups
from .problem import anchors
from .workspace import Workspace

TILE_ROWS = 64
TILE_KEYS = 1024
BATCH_SCORES = 1 << 19
"""Scores that are in flight at a time, if a single tile of one head has no more: what a core's cache holds."""


@dataclass
class Rows:
    """Batch rows that share an anchor, with their keys from the anchor on."""

    index: Tensor | None
    start: int
    stop: int

    def take(self, x: Tensor) -> Tensor:
        return x if self.index is None else x[self.index]

    def keys(self, x: Tensor, dim: int) -> Tensor:
        return self.take(x).narrow(dim, self.start, self.stop - self.start)


def row_groups(mask: Mask, k_segment: Tensor | None, num_keys: int) -> Iterator[Rows]:
    """One group for an unanchored mask, else one for each first valid position; the last matters to some draws."""
    if k_segment is None or not mask.anchored:
        yield Rows(None, 0, num_keys)
        return
    start, stop = anchors(k_segment >= 0)
    if not mask.drawn_over_all:
        stop = torch.full_like(stop, num_keys)
    members: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        members.setdefault(key, []).append(row)
    for (first, last), rows in members.items():
        index = None if len(rows) == len(k_segment) else torch.tensor(rows, device=k_segment.device)
        yield Rows(index, first, last)


@dataclass
class Walk:
    """All tiles of `mask` for one group of rows: queries from position `offset` on, keys from 0.

    `q` (b, h g, L, e) and `k` (b, h, S, e); segments (b, L) and (b, S), or None.
    """

    mask: Mask
    q: Tensor
    k: Tensor
    q_segment: Tensor | None
    k_segment: Tensor | None
    offset: int

    def __post_init__(self) -> None:
        self.workspace = Workspace(self.q.device)

    @cached_property
    def _groups(self) -> tuple[TileGroup, ...]:
        stop = self.offset + self.q.shape[2]
        return tile_groups(self.mask, self.offset, stop, self.k.shape[2], TILE_ROWS, TILE_KEYS)

    @property
    def stores_every_row(self) -> bool:
        """Whether each row has a tile whose result is stored, so that nothing need be there before."""
        stored = sum(len(group.tiles) * group.tiles[0].num_rows for group in self._groups if group.first)
        return stored == self.q.shape[2]

    def batches(self, dtype: torch.dtype) -> Iterator[Batch]:
        """Every tile once, those whose result is merged after those whose result is stored."""
        batch, heads = self.k.shape[:2]
        shared = self.q.shape[1] // heads
        for group in self._groups:
            tile = group.tiles[0]
            cap = None if tile.mask is None else _bound(~tile.allowed(self.k.device), dtype)
            one = shared * tile.num_rows * tile.num_keys
            for part in _slabs(batch, heads, max(1, BATCH_SCORES // one)):
                in_part = len(range(*part[0].indices(batch))) * len(range(*part[1].indices(heads)))
                size = max(1, BATCH_SCORES // max(1, one * in_part))
                for first in range(0, len(group.tiles), size):
                    yield Batch(self, group, slice(first, first + size), part, cap)


def _bound(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What scores are bounded by: infinity, or -infinity where `hidden`. A minimum is cheaper than a masked fill."""
    return torch.full(hidden.shape, torch.inf, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, -torch.inf
    )


def _slabs(batch: int, heads: int, most: int) -> Iterator[tuple[slice, slice]]:
    """The (batch, heads) plane in rectangles of at most `most` heads, whole rows where these fit."""
    rows, columns = max(1, most // heads), min(heads, most)
    for row in range(0, batch, rows):
        for column in range(0, heads, columns):
            yield slice(row, row + rows), slice(column, column + columns)


@dataclass
class Batch:
    """Tiles of one shape over one slab of heads: what one batched product computes."""

    walk: Walk
    group: TileGroup
    span: slice
    slab: tuple[slice, slice]
    cap: Tensor | None

    @property
    def first(self) -> bool:
        return self.group.first

    @cached_property
    def tiles(self) -> Sequence[Tile]:
        return self.group.tiles[self.span]

    @cached_property
    def _rows(self) -> list[slice]:
        offset = self.walk.offset
        return [slice(t.rows.start - offset, t.rows.stop - offset, t.rows.step) for t in self.tiles]

    @cached_property
    def _run(self) -> slice | None:
        """The rows of all tiles as one slice, if they follow each other."""
        rows = self._rows
        if all(s.step == 1 for s in rows) and all(a.stop == b.start for a, b in pairwise(rows)):
            return slice(rows[0].start, rows[-1].stop)
        return None

    def take_rows(self, x: Tensor) -> Tensor:
        """(B, H, L, ...) -> (b, h, t, g, r, ...), a view where it can be."""
        x = self._by_key_head(x)
        if self._run is not None:
            return self._unrolled(x)
        return torch.stack([x[:, :, :, s] for s in self._rows], 2)

    def put_rows(self, target: Tensor, values: Tensor) -> None:
        """Store (b, h, t, g, r, ...) into (B, H, L, ...)."""
        target = self._by_key_head(target)
        if self._run is not None:
            self._unrolled(target).copy_(values)
            return
        for number, s in enumerate(self._rows):
            target[:, :, :, s] = values[:, :, number]

    def each(self, *values: Tensor) -> Iterator[tuple[Batch, tuple[Tensor, ...]]]:
        """The batch tile by tile, with the tile's part of each of `values`: tiles may share rows."""
        for number in range(len(self.tiles)):
            first = self.span.start + number
            alone = Batch(self.walk, self.group, slice(first, first + 1), self.slab, self.cap)
            yield alone, tuple(x[:, :, number : number + 1] for x in values)

    def _by_key_head(self, x: Tensor) -> Tensor:
        heads = self.walk.k.shape[1]
        return x.unflatten(1, (heads, x.shape[1] // heads))[self.slab]

    def _unrolled(self, x: Tensor) -> Tensor:
        return x[:, :, :, self._run].unflatten(3, (len(self.tiles), -1)).movedim(3, 2)

    def take_keys(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """(B, h, S, e) -> (b h t, n, e) in `dtype`, valid until the next batch."""
        x = x[self.slab]
        shape = (*x.shape[:2], len(self.tiles), self.tiles[0].num_keys, x.shape[3])
        out = self.walk.workspace.take(name, *shape, dtype=dtype)
        if self._blocks is not None:
            blocks, index = self._in_blocks(x)
            chosen = out.view(*x.shape[:2], len(index), -1, x.shape[3])
            if x.dtype == dtype:
                torch.index_select(blocks, 2, index, out=chosen)
            else:
                chosen.copy_(blocks.index_select(2, index))
            return out.flatten(0, 2)
        for tiles, columns, source in self._key_views(x, overlapping=True):
            out[:, :, tiles, columns] = source
        return out.flatten(0, 2)

    def add_keys(self, target: Tensor, values: Tensor) -> None:
        """Add (b h t, n, e) into (B, h, S, e)."""
        target = target[self.slab]
        if self._blocks is not None:
            blocks, index = self._in_blocks(target)
            blocks.index_add_(2, index, values.view(*target.shape[:2], len(index), -1, target.shape[3]))
            return
        values = values.view(*target.shape[:2], len(self.tiles), *values.shape[1:])
        for tiles, columns, view in self._key_views(target, overlapping=False):
            view += values[:, :, tiles, columns]

    def _in_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b, h, S, e) in blocks (b, h, S / width, width, e), and the numbers of those of all tiles."""
        assert self._blocks is not None
        width, index = self._blocks
        whole = x.shape[2] // width * width
        return x[:, :, :whole].unflatten(2, (-1, width)), index[self.span].flatten().to(x.device)

    @property
    def _blocks(self) -> tuple[int, Tensor] | None:
        return self.group.key_blocks if len(self.tiles) > 1 else None

    def _key_views(self, x: Tensor, *, overlapping: bool) -> Iterator[tuple[slice, slice, Tensor]]:
        """The tiles' keys in `x` as few views (b, h, t, n, e), each with the tiles and the columns it stands for.

        Evenly spaced slices of several tiles are one strided view; `overlapping` says whether its parts may overlap.
        """
        column = 0
        for run in self.group.key_runs:
            columns = slice(column, column + run.width)
            column += run.width
            slices = run.slices[self.span]
            if run.gap and (overlapping or run.gap >= run.width):
                strip = x[:, :, slices[0].start : slices[-1].stop]
                yield slice(None), columns, strip.unfold(2, run.width, run.gap).transpose(3, 4)
            else:
                for number, s in enumerate(slices):
                    yield slice(number, number + 1), columns, x[:, :, None, s]

    def queries(self, scale: float, dtype: torch.dtype) -> Tensor:
        """The scaled queries (b h t, g r, e) in `dtype`."""
        return self.dense_rows(self.walk.q, "queries", dtype).mul_(scale)

    def dense_rows(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """(B, H, L, e) -> (b h t, g r, e) in `dtype`, valid until the next batch."""
        rows = self.take_rows(x)
        return (
            self.walk.workspace.take(name, *rows.shape, dtype=dtype).copy_(rows).flatten(3, 4).flatten(0, 2)
        )

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries @ keys^T as (b, h, t, g, r, n), -inf where anything forbids the pair; until the next batch."""
        rows, tiles = self.tiles[0].num_rows, len(self.tiles)
        scores = self.walk.workspace.product(queries, keys.mT, "scores").unflatten(1, (-1, rows))
        heads = len(range(*self.slab[1].indices(self.walk.k.shape[1])))
        scores = scores.unflatten(0, (-1, heads, tiles))
        if self.cap is not None:
            partial = scores[..., -self.cap.shape[-1] :]
            torch.minimum(partial, self.cap, out=partial)
        across = self._across_segments()
        return scores if across is None else torch.minimum(scores, _bound(across, scores.dtype), out=scores)

    def _across_segments(self) -> Tensor | None:
        """Pairs of different segments, or with a key that is padding: (b, 1, t, 1, r or 1, n)."""
        walk, rows = self.walk, self.slab[0]
        if walk.k_segment is None:
            return None
        keys = torch.stack(
            [torch.cat([walk.k_segment[rows, s] for s in tile.keys], 1) for tile in self.tiles], 1
        )[:, None, :, None, None, :]
        hidden = keys < 0
        if walk.q_segment is None:
            return hidden
        queries = torch.stack([walk.q_segment[rows, s] for s in self._rows], 1)
        return hidden | (queries[:, None, :, None, :, None] != keys)


def merged_heads(x: Tensor) -> Tensor:
    """(b, h, t, g, r, n) -> (b h t, g r, n): the form that batched products take."""
    return rearrange(x, "b h t g r n -> (b h t) (g r) n")
