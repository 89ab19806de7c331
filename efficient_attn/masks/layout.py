"""What a kernel walks: tiles of (queries, keys), and block layouts in compressed rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import Mask


@dataclass(frozen=True)
class Tile:
    """Queries `rows` against the keys of all `keys` slices (disjoint, in positions, steps allowed).

    `mask` decides within the tile; None says that every pair is allowed. `inner` are key intervals that every
    row has whole, whatever the mask. `first` says that no earlier tile had these rows, so that its result is
    stored rather than merged.
    """

    rows: slice
    keys: tuple[slice, ...]
    mask: Mask | None
    first: bool = True
    inner: tuple[tuple[int, int], ...] = ()

    @property
    def num_rows(self) -> int:
        return len(range(self.rows.start, self.rows.stop, self.rows.step or 1))

    @property
    def num_keys(self) -> int:
        return sum(len(range(s.start, s.stop, s.step or 1)) for s in self.keys)

    def within(self, other: Mask, num_keys: int) -> Tile | None:
        """This tile under a second mask, its keys trimmed to what that mask can allow; None if nothing is left."""
        low, up = other.hull(self.rows.start, self.rows.stop, num_keys)
        keys = tuple(trimmed for s in self.keys if (trimmed := _trim(s, low, up)) is not None)
        if not keys:
            return None
        return replace(self, keys=keys, inner=(), mask=other if self.mask is None else self.mask & other)


def _trim(s: slice, low: int, up: int) -> slice | None:
    step = s.step or 1
    start = s.start if s.start >= low else s.start + -(-(low - s.start) // step) * step
    stop = min(s.stop, up)
    return slice(start, stop, step) if start < stop else None


def row_ranges(start: int, stop: int, size: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) in ranges of at most `size`, aligned to multiples of it, broken at every cut."""
    edges = sorted({start, stop, *cuts, *range((start // size + 1) * size, stop, size)})
    return pairwise(edges)


def _union(low: list[int], up: list[int]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for a, b in sorted((a, b) for a, b in zip(low, up, strict=True) if a < b):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


class _Bands:
    """For ranges of rows: the key intervals that any row has (outer) and that every row has (inner)."""

    def __init__(self, mask: Mask, ranges: Sequence[tuple[int, int]], num_keys: int) -> None:
        edges = torch.tensor(ranges, dtype=torch.int64).view(-1, 2)
        lengths = edges[:, 1] - edges[:, 0]
        q = torch.arange(int(edges[0, 0]), int(edges[-1, 1]))
        lower, upper = mask.row_spans(q, num_keys)
        empty = upper <= lower
        owner = torch.repeat_interleave(torch.arange(len(edges)), lengths)[:, None].expand_as(lower)

        def reduce(values: Tensor, how: str, start: int) -> list[list[int]]:
            out = torch.full((len(edges), lower.shape[1]), start, dtype=torch.int64)
            return out.scatter_reduce(0, owner, values, how).tolist()

        self.outer_low = reduce(torch.where(empty, num_keys, lower), "amin", num_keys)
        self.outer_up = reduce(torch.where(empty, 0, upper), "amax", 0)
        self.inner_low = reduce(torch.where(empty, num_keys, lower), "amax", 0)
        self.inner_up = reduce(torch.where(empty, 0, upper), "amin", num_keys)

    def outer(self, index: int) -> list[tuple[int, int]]:
        return _union(self.outer_low[index], self.outer_up[index])

    def inner(self, index: int) -> list[tuple[int, int]]:
        return _union(self.inner_low[index], self.inner_up[index])


@lru_cache(maxsize=64)
def plan(mask: Mask, start: int, stop: int, num_keys: int, rows: int, keys: int) -> tuple[Tile, ...]:
    """Tiles of at most `rows` x `keys` that hold every allowed pair of the queries [start, stop) exactly once."""
    result = []
    for tile in mask.sized(num_keys).tiles(start, stop, num_keys, rows):
        first = tile.first
        for part in _split(tile, keys):
            result.append(replace(part, first=first))
            first = False
    return tuple(result)


def tiles_from_spans(mask: Mask, start: int, stop: int, num_keys: int, size: int) -> Iterator[Tile]:
    """The plan that follows from `row_spans`: one tile a row range, its keys the union of the rows' intervals."""
    ranges = list(row_ranges(start, stop, size, mask.cuts(start, stop)))
    if not ranges:
        return
    bands = _Bands(mask, ranges, num_keys)
    for index, (low, up) in enumerate(ranges):
        inner = bands.inner(index)
        spans = bands.outer(index)
        if spans:
            yield Tile(slice(low, up, 1), tuple(slice(a, b, 1) for a, b in spans), mask, inner=tuple(inner))


def _split(tile: Tile, most: int) -> Iterator[Tile]:
    """The tile in parts of at most `most` keys."""
    part: list[slice] = []
    room = most
    for s in tile.keys:
        step = s.step or 1
        start = s.start
        while start < s.stop:
            stop = min(s.stop, start + room * step)
            part.append(slice(start, stop, step))
            room -= len(range(start, stop, step))
            start += len(range(start, stop, step)) * step
            if room == 0:
                yield _part(tile, tuple(part))
                part, room = [], most
    if part:
        yield _part(tile, tuple(part))


def _part(tile: Tile, keys: tuple[slice, ...]) -> Tile:
    whole = all(any(a <= s.start and s.stop <= b for a, b in tile.inner) for s in keys)
    return replace(tile, keys=keys, mask=None if whole else tile.mask, inner=())


@dataclass(frozen=True)
class BlockLayout:
    """Which blocks of `block_size` x `block_size` pairs hold anything, in compressed sparse rows.

    Row block r has the full blocks `full_index[full_start[r]:full_start[r + 1]]`, in which every pair is allowed,
    and likewise the partial ones, in which the predicate decides. Blocks without an allowed pair do not appear.
    """

    block_size: int
    full_start: Tensor
    full_index: Tensor
    partial_start: Tensor
    partial_index: Tensor

    @classmethod
    def of(
        cls, mask: Mask, q_len: int, num_keys: int, block_size: int, q_offset: int | None = None
    ) -> BlockLayout:
        """The layout of `mask`, in time proportional to rows and stored blocks (never q_len x num_keys)."""
        offset = num_keys - q_len if q_offset is None else q_offset
        mask = mask.sized(num_keys)
        ranges = [(s, min(s + block_size, offset + q_len)) for s in range(offset, offset + q_len, block_size)]
        full: list[list[int]] = []
        partial: list[list[int]] = []
        if ranges:
            bands = _Bands(mask, ranges, num_keys)
            for index, rows in enumerate(ranges):
                f, p = _classify(mask, rows, bands.outer(index), bands.inner(index), num_keys, block_size)
                full.append(f)
                partial.append(p)
        return cls(block_size, *_compress(full), *_compress(partial))


def _classify(
    mask: Mask,
    rows: tuple[int, int],
    outer: list[tuple[int, int]],
    inner: list[tuple[int, int]],
    num_keys: int,
    size: int,
) -> tuple[list[int], list[int]]:
    full, partial = [], []
    for block in sorted({b for low, up in outer for b in range(low // size, -(-up // size))}):
        low, up = block * size, min((block + 1) * size, num_keys)
        if any(a <= low and up <= b for a, b in inner):
            full.append(block)
            continue
        # The bounds could not tell: ask the predicate, on this block alone.
        allowed = mask.allows(torch.arange(*rows)[:, None], torch.arange(low, up)[None, :])
        if bool(allowed.all()):
            full.append(block)
        elif bool(allowed.any()):
            partial.append(block)
    return full, partial


def _compress(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    start = torch.tensor([0, *(len(r) for r in rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return start, torch.tensor([b for r in rows for b in r], dtype=torch.int32)
