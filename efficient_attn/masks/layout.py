"""What a kernel walks: tiles of (queries, keys), and block layouts in compressed rows."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .base import Mask


@dataclass(frozen=True)
class Tile:
    """Queries `rows` against the keys of the slices `whole` and `partial` (disjoint, in positions, steps allowed).

    Every row may attend to all `whole` keys; over the `partial` ones `mask` decides. `first` says that no earlier
    tile had these rows, so that its result is stored rather than merged.
    """

    rows: slice
    whole: tuple[slice, ...]
    partial: tuple[slice, ...]
    mask: Mask | None
    first: bool = True

    @property
    def keys(self) -> tuple[slice, ...]:
        return self.whole + self.partial

    @property
    def num_rows(self) -> int:
        return _length(self.rows)

    @property
    def num_keys(self) -> int:
        return sum(map(_length, self.keys))

    @property
    def num_partial(self) -> int:
        return sum(map(_length, self.partial))

    def allowed(self, device: torch.device) -> Tensor:
        """Which of the pairs with `partial` keys the mask allows: (rows, keys)."""
        assert self.mask is not None
        rows, keys = _positions((self.rows,), device), _positions(self.partial, device)
        return self.mask.allows(rows[:, None], keys[None, :])

    def within(self, other: Mask, num_keys: int) -> Tile | None:
        """This tile under a second mask, its keys trimmed to what that mask can allow; None if nothing is left."""
        rows = self.rows.start, self.rows.stop
        hull, core = other.hull(*rows, num_keys), other.core(*rows, num_keys)
        whole = [part for s in self.whole if (part := trim(s, *hull))]
        partial = [part for s in self.partial if (part := trim(s, *hull))]
        inside = [part for s in whole if (part := trim(s, *core))]
        partial += [part for s in whole for part in outside(s, *core)]
        if not inside and not partial:
            return None
        mask = other if self.mask is None else self.mask & other
        return replace(self, whole=tuple(inside), partial=tuple(partial), mask=mask if partial else None)


def _positions(slices: Sequence[slice], device: torch.device) -> Tensor:
    parts = [torch.arange(s.start, s.stop, s.step, device=device) for s in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _length(s: slice) -> int:
    return len(range(s.start, s.stop, s.step or 1))


def trim(s: slice, low: int, up: int) -> slice | None:
    step = s.step or 1
    start = s.start if s.start >= low else s.start + -(-(low - s.start) // step) * step
    stop = min(s.stop, up)
    return slice(start, stop, step) if start < stop else None


def outside(s: slice, low: int, up: int) -> list[slice]:
    """What `trim` leaves over, before and after."""
    if trim(s, low, up) is None:
        return [s]
    return [part for edges in ((s.start, low), (up, s.stop)) if (part := trim(s, *edges))]


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


@lru_cache(maxsize=16)
def plan(mask: Mask, start: int, stop: int, num_keys: int, rows: int, keys: int) -> tuple[Tile, ...]:
    """Tiles of at most `rows` x `keys` that hold every allowed pair of the queries [start, stop) exactly once."""
    result = []
    for tile in mask.sized(num_keys).tiles(start, stop, num_keys, rows):
        first = tile.first
        for part in _split(tile, keys):
            result.append(replace(part, first=first))
            first = False
    return tuple(result)


@dataclass(frozen=True)
class TileGroup:
    """Tiles of one shape that hide the same pairs, which one batched product serves; `first` is that of each."""

    tiles: tuple[Tile, ...]

    @property
    def first(self) -> bool:
        return self.tiles[0].first

    @cached_property
    def key_runs(self) -> tuple[KeyRun, ...]:
        """The j-th slices of all tiles' keys, for every j; slices are cut until they are equally long."""
        keys = [tile.keys for tile in self.tiles]
        lengths = [[_length(s) for s in tile] for tile in keys]
        if any(own != lengths[0] for own in lengths):
            edges = sorted({edge for own in lengths for edge in accumulate(own)})
            keys = [tuple(_cut(tile, edges)) for tile in keys]
        return tuple(KeyRun.of(slices) for slices in zip(*keys, strict=True))

    @cached_property
    def key_blocks(self) -> tuple[int, Tensor] | None:
        """All keys as aligned blocks of one width, and their numbers (tiles, blocks); None if they are not such."""
        runs = self.key_runs
        width = runs[0].width
        starts = [[s.start for s in run.slices] for run in runs]
        aligned = all(start % width == 0 for run in starts for start in run)
        alike = all(run.width == width and all(s.step == 1 for s in run.slices) for run in runs)
        if not (alike and aligned) or all(run.gap for run in runs):
            return None
        return width, torch.tensor(starts).mT // width


@dataclass(frozen=True)
class KeyRun:
    """One slice of `width` keys from each tile of a group; `gap` is the distance of their starts, 0 if uneven."""

    slices: tuple[slice, ...]
    width: int
    gap: int

    @classmethod
    def of(cls, slices: tuple[slice, ...]) -> KeyRun:
        gaps = {b.start - a.start for a, b in pairwise(slices)} or {1}
        even = len(gaps) == 1 and all(s.step == 1 for s in slices)
        return cls(slices, _length(slices[0]), max(0, gaps.pop()) if even else 0)


def _cut(slices: Sequence[slice], edges: Sequence[int]) -> Iterator[slice]:
    """The slices, laid end to end, cut at every edge; each end of a slice is one."""
    column, ends = 0, iter(edges)
    for s in slices:
        start = s.start
        while start < s.stop:
            piece = slice(start, start + (next(ends) - column) * s.step, s.step)
            yield slice(start, min(s.stop, piece.stop), s.step)
            column += _length(piece)
            start = piece.stop


@lru_cache(maxsize=128)
def tile_groups(
    mask: Mask, start: int, stop: int, num_keys: int, rows: int, keys: int
) -> tuple[TileGroup, ...]:
    """The tiles of `plan` by shape; those whose result is stored come before those whose result is merged."""
    members: dict[tuple, list[Tile]] = {}
    for tile in plan(mask, start, stop, num_keys, rows, keys):
        shape = (not tile.first, tile.num_rows, tile.rows.step, tile.num_keys, tile.num_partial)
        members.setdefault((*shape, _hidden_pattern(tile)), []).append(tile)
    in_order = sorted(members, key=lambda shape: shape[0])
    return tuple(TileGroup(tuple(members[key])) for key in in_order)


def _hidden_pattern(tile: Tile) -> Hashable:
    """Equal for tiles of one shape only if they hide the same pairs."""
    if tile.mask is None:
        return None
    if tile.mask.stationary:
        return tile.mask, *((s.start - tile.rows.start, _length(s), s.step) for s in tile.partial)
    allowed = tile.allowed(torch.device("cpu")).flatten()
    bits = F.pad(allowed, (0, -len(allowed) % 62)).unflatten(0, (-1, 62)).long()
    return tuple((bits << torch.arange(62)).sum(1).tolist())


def tiles_from_spans(mask: Mask, start: int, stop: int, num_keys: int, size: int) -> Iterator[Tile]:
    """The plan that follows from `row_spans`: one tile a row range, its keys the union of the rows' intervals."""
    ranges = list(row_ranges(start, stop, size, mask.cuts(start, stop)))
    if not ranges:
        return
    bands = _Bands(mask, ranges, num_keys)
    for index, (low, up) in enumerate(ranges):
        whole, partial = _classed(bands.outer(index), bands.inner(index))
        if whole or partial:
            yield Tile(slice(low, up, 1), tuple(whole), tuple(partial), mask if partial else None)


def _classed(outer: list[tuple[int, int]], inner: list[tuple[int, int]]) -> tuple[list[slice], list[slice]]:
    """The intervals that every row has, and what other rows have besides; both are unions, `inner` in `outer`."""
    whole = [slice(low, up, 1) for low, up in inner]
    partial = []
    for low, up in outer:
        for a, b in inner:
            if low <= a and b <= up:
                if low < a:
                    partial.append(slice(low, a, 1))
                low = b
        if low < up:
            partial.append(slice(low, up, 1))
    return whole, partial


def _split(tile: Tile, most: int) -> Iterator[Tile]:
    """The tile in parts of at most `most` keys."""
    if tile.num_keys <= most:
        yield from (tile,) if tile.keys else ()
        return
    part: tuple[list[slice], list[slice]] = ([], [])
    room = most
    for kind, slices in enumerate((tile.whole, tile.partial)):
        for s in slices:
            start = s.start
            while start < s.stop:
                piece = slice(start, min(s.stop, start + room * s.step), s.step)
                part[kind].append(piece)
                room -= _length(piece)
                start += _length(piece) * s.step
                if room == 0:
                    yield _part(tile, *part)
                    part, room = ([], []), most
    if room < most:
        yield _part(tile, *part)


def _part(tile: Tile, whole: list[slice], partial: list[slice]) -> Tile:
    return replace(tile, whole=tuple(whole), partial=tuple(partial), mask=tile.mask if partial else None)


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
