"""A mask as a chain of parts, disjoint sets of pairs that one walk of the kernels serves each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...masks import And, BlockWindow, Causal, Everything, Fixed, Mask, Or, Sinks, Strided, Window
from ...masks.base import Spans

UNBOUNDED = 1 << 62
"""A distance that no pair exceeds."""

FEW_QUERIES, MANY_KEYS = 16, 4096
"""No more queries over no fewer keys than these: too few programs, unless the keys are split among them."""

LONGEST = 1 << 30
"""Fewer queries and keys than this keep what the kernels count inside 32 bits."""


@dataclass(frozen=True)
class Band:
    """Keys from `back` before the query to `ahead` after it; and the first `sinks` keys, to `sinks_ahead` after it.

    With `step` > 1, only pairs whose distance is a multiple of it, and the bounds count in steps.
    """

    back: int
    ahead: int
    sinks: int = 0
    sinks_ahead: int = UNBOUNDED
    step: int = 1


@dataclass(frozen=True)
class Blocks:
    """Any mask, by a table of blocks; with `summaries`, over the last keys of each stride-block alone."""

    mask: Mask
    summaries: Summaries | None = None


Part = Band | Blocks


def walk_of(part: Part) -> str:
    """How a part is walked, by the name that its configs have."""
    if isinstance(part, Blocks):
        return "table"
    return "band" if part.step == 1 else "strided"


@dataclass(frozen=True)
class Summaries(Mask):
    """Key u is the (u % count)-th of the last `count` positions of block u // count of `stride` positions.

    Queries see those of all blocks but their own, of the earlier ones if `causal`.
    """

    stride: int
    count: int
    causal: bool
    anchored = True

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        own, block = q.div(self.stride, rounding_mode="floor"), k.div(self.count, rounding_mode="floor")
        return block < own if self.causal else block != own

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        own = q.div(self.stride, rounding_mode="floor")[:, None] * self.count
        before = own.clamp(0, num_keys)
        if self.causal:
            return torch.zeros_like(before), before
        after = (own + self.count).clamp(0, num_keys)
        lower, upper = torch.zeros_like(own), torch.full_like(own, num_keys)
        return torch.cat([lower, after], 1), torch.cat([before, upper], 1)

    def num_keys(self, length: int) -> int:
        """Summaries among the first `length` positions."""
        return length // self.stride * self.count + max(0, length % self.stride - self.stride + self.count)


@dataclass(frozen=True)
class FarSinks(Mask):
    """Pairs of a band's sinks that lie outside its window."""

    band: tuple[int, int, int, int]
    anchored = True

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        back, ahead, sinks, sinks_ahead = self.band
        near = (k >= q - back) & (k <= q + ahead)
        return (k < sinks) & (k - q <= sinks_ahead) & ~near

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        back, ahead, sinks, sinks_ahead = self.band
        stop = (q + sinks_ahead + 1).clamp(0, min(sinks, num_keys))
        before = torch.minimum((q - back).clamp(min=0), stop)
        after = torch.maximum((q + ahead + 1).clamp(min=0), before)
        return torch.stack([torch.zeros_like(q), after], 1), torch.stack([before, stop], 1)


def as_band(mask: Mask) -> Band | None:
    """The band that `mask` is, if it is one: intersections of Causal, Window and Everything, joined by Sinks."""
    if isinstance(mask, Everything):
        return Band(UNBOUNDED, UNBOUNDED)
    if isinstance(mask, Causal):
        return Band(UNBOUNDED, 0)
    if isinstance(mask, Window):
        return Band(mask.size - 1, mask.size - 1)
    if not isinstance(mask, And | Or):
        return None
    for one, other in ((mask.a, mask.b), (mask.b, mask.a)):
        band = as_band(one)
        if band is None:
            continue
        if isinstance(mask, Or):
            if isinstance(other, Sinks) and not band.sinks:
                return Band(band.back, band.ahead, other.count)
            continue
        bound = as_band(other)
        # A bound on how far back would cut the sinks as well, which no band says.
        if bound is None or bound.sinks or (band.sinks and bound.back < UNBOUNDED):
            continue
        ahead = min(band.sinks_ahead, bound.ahead) if band.sinks else UNBOUNDED
        return Band(min(band.back, bound.back), min(band.ahead, bound.ahead), band.sinks, ahead)
    return None


def parts_of(mask: Mask, by_key: bool = False, few_queries: bool = False) -> tuple[Part, ...]:
    """The parts of `mask`; the first one covers every row and every key, if only with nothing.

    Seen `by_key`, sinks are a part of their own, because every row sees them. With `few_queries`, a band goes by a
    table, whose rows are split among programs.
    """
    band = as_band(mask)
    if band is not None and few_queries:
        return (Blocks(mask),)
    if band is not None and band.sinks and by_key:
        far = FarSinks((band.back, band.ahead, band.sinks, band.sinks_ahead))
        return Band(band.back, band.ahead), Blocks(far)
    if band is not None:
        return (band,)
    pattern, causal = _causal_part(mask)
    if isinstance(pattern, Strided):
        near = Band(pattern.stride - 1, 0 if causal else pattern.stride - 1)
        before, after = Band(UNBOUNDED, -1, step=pattern.stride), Band(-1, UNBOUNDED, step=pattern.stride)
        return (near, before) if causal else (near, before, after)
    if isinstance(pattern, Fixed):
        own: Mask = BlockWindow(pattern.stride, 1)
        summaries = Summaries(pattern.stride, pattern.summary, causal)
        return Blocks(own & Causal() if causal else own), Blocks(summaries, summaries)
    return (Blocks(mask),)


def _causal_part(mask: Mask) -> tuple[Mask, bool]:
    if isinstance(mask, And):
        for one, other in ((mask.a, mask.b), (mask.b, mask.a)):
            if isinstance(other, Causal):
                return one, True
    return mask, False


def refusals(mask: Mask) -> list[str]:
    """Why no chain of parts serves `mask`."""
    if any(isinstance(part, Blocks) and _jumps(part.mask) for part in parts_of(mask)):
        return ["strided and fixed patterns are served alone or under causality, not joined with others"]
    return []


def _jumps(mask: Mask) -> bool:
    if isinstance(mask, And | Or):
        return _jumps(mask.a) or _jumps(mask.b)
    return isinstance(mask, Strided | Fixed)
