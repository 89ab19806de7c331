"""The patterns of the mechanisms. Each states its predicate and the same set as key intervals per query."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Mask, Spans
from .layout import Tile, outside, row_ranges, trim
from .random_blocks import random_blocks


def _clip(lower: Tensor, upper: Tensor, num_keys: int) -> Spans:
    return lower.clamp(min=0), upper.clamp(max=num_keys)


@dataclass(frozen=True)
class Window(Mask):
    """|q - k| < size: the query itself and `size - 1` positions on each side."""

    size: int
    stationary = True

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).abs() < self.size

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        return _clip((q - self.size + 1)[:, None], (q + self.size)[:, None], num_keys)

    def hull(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        return max(0, start - self.size + 1), max(0, min(num_keys, stop + self.size - 1))

    def core(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        return max(0, stop - self.size), max(0, min(num_keys, start + self.size))


@dataclass(frozen=True)
class Sinks(Mask):
    """The first `count` positions are keys of every query; as queries they are ordinary."""

    count: int
    anchored = True

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return (k < self.count) & (q == q)

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        return torch.zeros_like(q)[:, None], torch.full_like(q, min(self.count, num_keys))[:, None]


@dataclass(frozen=True)
class GlobalTokens(Mask):
    """Pairs in which the query or the key is one of `positions`, given as ascending half-open runs."""

    runs: tuple[int, ...]
    anchored = True

    @classmethod
    def first(cls, count: int) -> GlobalTokens:
        """The first `count` positions."""
        return cls((0, count) if count else ())

    @classmethod
    def at(cls, positions: tuple[int, ...]) -> GlobalTokens:
        """These positions, in any order."""
        runs: list[int] = []
        for position in sorted(set(positions)):
            if runs and runs[-1] == position:
                runs[-1] += 1
            else:
                runs += [position, position + 1]
        return cls(tuple(runs))

    def _is_global(self, x: Tensor) -> Tensor:
        if len(self.runs) <= 16:  # plain comparisons, which flex_attention can compile
            edges = zip(self.runs[::2], self.runs[1::2], strict=True)
            return sum(((x >= low) & (x < up) for low, up in edges), torch.zeros_like(x, dtype=torch.bool))
        # Inside a run an odd number of edges lies at or before the position.
        edges = torch.tensor(self.runs, dtype=x.dtype, device=x.device)
        return torch.bucketize(x.contiguous(), edges, right=True) % 2 == 1

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return self._is_global(q) | self._is_global(k)

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        everything = torch.where(self._is_global(q), num_keys, 0)[:, None]
        runs = torch.tensor(self.runs, dtype=q.dtype, device=q.device).view(1, -1, 2).expand(len(q), -1, -1)
        return _clip(
            torch.cat([torch.zeros_like(everything), runs[..., 0]], -1),
            torch.cat([everything, runs[..., 1]], -1),
            num_keys,
        )

    def cuts(self, start: int, stop: int) -> list[int]:
        return [edge for edge in self.runs if start < edge < stop]


@dataclass(frozen=True)
class BlockWindow(Mask):
    """The query's own block of `block` positions and `(num_blocks - 1) / 2` blocks on each side."""

    block: int
    num_blocks: int
    anchored = True

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        distance = q.div(self.block, rounding_mode="floor") - k.div(self.block, rounding_mode="floor")
        return distance.abs() <= self.num_blocks // 2

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        own = q.div(self.block, rounding_mode="floor")[:, None]
        side = self.num_blocks // 2
        return _clip((own - side) * self.block, (own + side + 1) * self.block, num_keys)

    def cuts(self, start: int, stop: int) -> list[int]:
        return list(range((start // self.block + 1) * self.block, stop, self.block))


@dataclass(frozen=True)
class RandomBlocks(Mask):
    """Each row block attends to `count` blocks drawn by `random_blocks`: earlier ones if causal, else any."""

    block: int
    count: int
    seed: int
    causal: bool
    num_blocks: int | Tensor | None = None
    anchored = True

    @property
    def drawn_over_all(self) -> bool:  # type: ignore[override]
        return not self.causal

    def sized(self, num_keys: int | Tensor) -> Mask:
        return self if self.causal else replace(self, num_blocks=-(-num_keys // self.block))

    def choices(self, row_blocks: Tensor) -> Tensor:
        """The blocks (..., count) that each row block attends to; -1 where fewer exist."""
        if not self.causal and self.num_blocks is None:
            raise ValueError(
                "a non-causal RandomBlocks draws over the whole sequence: call sized(num_keys) first"
            )
        available = row_blocks if self.causal else self.num_blocks
        return random_blocks(row_blocks, count=self.count, seed=self.seed, num_choices=available)  # type: ignore[arg-type]

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        chosen = self.choices(q.div(self.block, rounding_mode="floor"))
        key_block = k.div(self.block, rounding_mode="floor")
        found = torch.zeros_like(q + k, dtype=torch.bool)
        for draw in range(self.count):
            found = found | ((chosen[..., draw] == key_block) & (k >= 0))
        return found

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        chosen = self.choices(q.div(self.block, rounding_mode="floor"))
        lower = torch.where(chosen >= 0, chosen * self.block, 0)
        return _clip(lower, torch.where(chosen >= 0, lower + self.block, 0), num_keys)

    def cuts(self, start: int, stop: int) -> list[int]:
        return list(range((start // self.block + 1) * self.block, stop, self.block))


@dataclass(frozen=True)
class Strided(Mask):
    """|q - k| < stride, or q and k a multiple of `stride` apart (Child et al. 2019, section 4.3)."""

    stride: int
    stationary = True
    has_plan = True

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        distance = (q - k).abs()
        return (distance < self.stride) | (distance % self.stride == 0)

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        low, up = Window(self.stride).row_spans(q, num_keys)
        column = (
            torch.arange(-(-num_keys // self.stride), device=q.device) * self.stride
            + (q % self.stride)[:, None]
        )
        return torch.cat([low, column], -1), torch.cat([up, (column + 1).clamp(max=num_keys)], -1)

    def counts(self, q: Tensor, limit: Tensor) -> Tensor:
        window = (torch.minimum(q + self.stride, limit) - (q - self.stride + 1).clamp(min=0)).clamp(min=0)
        column = (
            (limit - q % self.stride + self.stride - 1).div(self.stride, rounding_mode="floor").clamp(min=0)
        )
        return window + column - ((q >= 0) & (q < limit)).to(q.dtype)

    def tiles(self, start: int, stop: int, num_keys: int, size: int) -> Iterator[Tile]:
        """The band, then one dense problem for each residue class: N^2 / stride pairs, not N^2."""
        window = Window(self.stride)
        for low, up in row_ranges(start, stop, size, []):
            tile = Tile(slice(low, up, 1), (slice(0, num_keys, 1),), (), None).within(window, num_keys)
            if tile is not None:
                yield tile
        for residue in range(min(self.stride, num_keys)):
            first = start + (residue - start) % self.stride
            for low in range(first, stop, size * self.stride):
                rows = range(low, min(stop, low + size * self.stride), self.stride)
                keys = range(residue, num_keys, self.stride)
                if len(keys) > 1 or rows != keys:
                    query_slice = slice(rows.start, rows.stop, rows.step)
                    key_slice = slice(keys.start, keys.stop, keys.step)
                    own = trim(key_slice, rows.start, rows.stop)
                    others = tuple(outside(key_slice, rows.start, rows.stop))
                    partial, mask = ((), None) if own is None else ((own,), _OffDiagonal())
                    yield Tile(query_slice, others, partial, mask, first=False)


@dataclass(frozen=True)
class _OffDiagonal(Mask):
    """q != k: within a residue class the band has already taken the diagonal, and nothing else."""

    stationary = True

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return q != k

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        lower = torch.stack([torch.zeros_like(q), (q + 1).clamp(min=0)], -1)
        return lower, torch.stack([q.clamp(max=num_keys), torch.full_like(q, num_keys)], -1)


@dataclass(frozen=True)
class Fixed(Mask):
    """The query's own stride-block, and the last `summary` keys of every one (Child et al. 2019, section 4.3)."""

    stride: int
    summary: int
    anchored = True
    has_plan = True

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        own = q.div(self.stride, rounding_mode="floor") == k.div(self.stride, rounding_mode="floor")
        return own | (k % self.stride >= self.stride - self.summary)

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        own = (q.div(self.stride, rounding_mode="floor") * self.stride)[:, None]
        ends = torch.arange(1, 1 + num_keys // self.stride + 1, device=q.device) * self.stride
        ends = ends.expand(len(q), -1)
        return _clip(
            torch.cat([own, ends - self.summary], -1), torch.cat([own + self.stride, ends], -1), num_keys
        )

    def counts(self, q: Tensor, limit: Tensor) -> Tensor:
        def summaries(x: Tensor) -> Tensor:
            x = x.clamp(min=0)
            return x // self.stride * self.summary + (x % self.stride - self.stride + self.summary).clamp(
                min=0
            )

        low = (q.div(self.stride, rounding_mode="floor") * self.stride).clamp(min=0)
        up = torch.minimum(q.div(self.stride, rounding_mode="floor") * self.stride + self.stride, limit)
        up = torch.maximum(up, torch.minimum(low, limit))
        low = torch.minimum(low, limit)
        return summaries(limit) - (summaries(up) - summaries(low)) + (up - low)

    def cuts(self, start: int, stop: int) -> list[int]:
        return list(range((start // self.stride + 1) * self.stride, stop, self.stride))

    def tiles(self, start: int, stop: int, num_keys: int, size: int) -> Iterator[Tile]:
        """The summaries of all blocks as strided slices, the same for every tile; then the rest of the own block."""
        first = self.stride - self.summary
        summaries = [slice(at, num_keys, self.stride) for at in range(first, self.stride)]
        for low, up in row_ranges(start, stop, size, self.cuts(start, stop)):
            own = low // self.stride * self.stride
            rest = slice(max(0, own), min(own + first, num_keys), 1)
            yield Tile(slice(low, up, 1), tuple(s for s in (*summaries, rest) if s.start < s.stop), (), None)
