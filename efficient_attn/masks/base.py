"""The contract of a structured mask, and the algebra `&`, `|` over masks.

A mask is a set of pairs (query position, key position). It says so twice, and the tests hold the two equal:
`allows` is the predicate, `row_spans` lists a query's keys as intervals, which is what makes counting,
block layouts and tile plans linear in the pairs that exist instead of quadratic in the length.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from .layout import BlockLayout, Tile, tiles_from_spans

Spans = tuple[Tensor, Tensor]
"""Half-open key intervals [lower, upper) of each query: two (..., slots) tensors; empty where upper <= lower."""

_ROWS_AT_ONCE = 1 << 16


class Mask(ABC):
    """Which keys a query may attend to, as a function of positions alone. True means "may attend".

    Positions are counted from the row's anchor (its first valid key), so left padding moves nothing.
    """

    registry: ClassVar[dict[str, type[Mask]]] = {}
    anchored: ClassVar[bool] = False
    """Whether the pattern counts from the first key, rather than from the distance of query and key alone."""
    drawn_over_all: ClassVar[bool] = False
    """Whether the pattern depends on the number of keys: only then does `sized` change anything."""
    stationary: ClassVar[bool] = False
    """Whether a pair is allowed by the distance q - k alone."""
    has_plan: ClassVar[bool] = False
    """Whether `tiles` knows better than the plan that follows from `row_spans`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Mask.registry[cls._name()] = cls

    @abstractmethod
    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether query position `q` may attend to key position `k` (integer tensors that broadcast)."""

    @abstractmethod
    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        """The same set as intervals: for query positions (n,) the key intervals (n, slots), in [0, num_keys)."""

    def sized(self, num_keys: int | Tensor) -> Mask:
        """This mask for a sequence of `num_keys` keys; only patterns drawn over the whole sequence differ.

        A tensor that broadcasts with the positions gives each of them its own length.
        """
        return self

    def cuts(self, start: int, stop: int) -> list[int]:
        """Query positions in (start, stop) at which the pattern changes abruptly: tiles do not straddle them."""
        return []

    def hull(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        """One interval that holds every key of the queries [start, stop)."""
        return 0, num_keys

    def core(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        """One interval of keys that every query in [start, stop) has; empty if none is known."""
        return 0, 0

    def tiles(self, start: int, stop: int, num_keys: int, size: int) -> Iterator[Tile]:
        """Tiles of at most `size` queries that hold every allowed pair of [start, stop) exactly once."""
        return tiles_from_spans(self, start, stop, num_keys, size)

    def counts(self, q: Tensor, limit: Tensor) -> Tensor:
        """How many keys in [0, limit) each query may attend to; `q` and `limit` are (n,) integers."""
        lower, upper = self.row_spans(q, int(limit.max()) if limit.numel() else 0)
        return _measure(lower.clamp(min=0), torch.minimum(upper, limit[:, None]))

    def pairs(self, q_len: int, num_keys: int, q_offset: int | None = None) -> int:
        """The exact number of allowed pairs, without ever writing the (q_len, num_keys) matrix."""
        offset = num_keys - q_len if q_offset is None else q_offset
        mask, total = self.sized(num_keys), 0
        for start in range(offset, offset + q_len, _ROWS_AT_ONCE):
            q = torch.arange(start, min(start + _ROWS_AT_ONCE, offset + q_len))
            total += int(mask.counts(q, torch.full_like(q, num_keys)).sum())
        return total

    def dense(self, q_len: int, num_keys: int, q_offset: int | None = None, device: Any = None) -> Tensor:
        """The (q_len, num_keys) boolean matrix; queries are the last `q_len` positions unless told otherwise."""
        offset = num_keys - q_len if q_offset is None else q_offset
        q = torch.arange(offset, offset + q_len, device=device)[:, None]
        k = torch.arange(num_keys, device=device)[None, :]
        return self.sized(num_keys).allows(q, k).expand(q_len, num_keys)

    def block_layout(
        self, q_len: int, num_keys: int, block_size: int, q_offset: int | None = None
    ) -> BlockLayout:
        """The blocks that hold anything, full and partial, in time linear in rows and stored blocks."""
        return BlockLayout.of(self, q_len, num_keys, block_size, q_offset)

    def mask_mod(
        self, num_keys: int, q_offset: int = 0
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The predicate in the form that `torch.nn.attention.flex_attention.create_block_mask` takes."""
        mask = self.sized(num_keys)
        return lambda b, h, q_idx, kv_idx: mask.allows(q_idx + q_offset, kv_idx)

    def spec(self) -> str:
        """This mask as a string that `Mask.from_spec` reads: what custom ops and exported graphs carry."""
        return json.dumps(self._plain(), separators=(",", ":"))

    @classmethod
    def _name(cls) -> str:
        return f"{cls.__module__}.{cls.__qualname__}"

    def _plain(self) -> list[Any]:
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return [self._name(), *(v._plain() if isinstance(v, Mask) else v for v in values)]

    @staticmethod
    @lru_cache(maxsize=256)
    def from_spec(spec: str) -> Mask:
        """The mask that `spec` describes."""
        return _build(json.loads(spec))

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)


def _build(plain: list[Any]) -> Mask:
    name, *values = plain
    if name not in Mask.registry:
        raise ValueError(f"unknown mask {name!r}; known masks are {sorted(Mask.registry)}")
    is_mask = [isinstance(v, list) and bool(v) and isinstance(v[0], str) for v in values]
    return Mask.registry[name](
        *(
            _build(v) if m else tuple(v) if isinstance(v, list) else v
            for v, m in zip(values, is_mask, strict=True)
        )
    )


def _measure(lower: Tensor, upper: Tensor) -> Tensor:
    """The length of the union of each row's intervals."""
    upper = torch.maximum(lower, upper)
    lower, order = lower.sort(-1)
    upper = upper.gather(-1, order)
    reached = torch.cat([torch.full_like(upper[..., :1], -1), upper.cummax(-1).values[..., :-1]], -1)
    return (upper - torch.maximum(lower, reached)).clamp(min=0).sum(-1)


@dataclass(frozen=True)
class _Pair(Mask):
    """Two masks made one: what intersection and union have in common."""

    a: Mask
    b: Mask

    @property
    def anchored(self) -> bool:  # type: ignore[override]
        return self.a.anchored or self.b.anchored

    @property
    def drawn_over_all(self) -> bool:  # type: ignore[override]
        return self.a.drawn_over_all or self.b.drawn_over_all

    @property
    def stationary(self) -> bool:  # type: ignore[override]
        return self.a.stationary and self.b.stationary

    @property
    def has_plan(self) -> bool:  # type: ignore[override]
        return self.a.has_plan or self.b.has_plan

    def sized(self, num_keys: int | Tensor) -> Mask:
        return type(self)(self.a.sized(num_keys), self.b.sized(num_keys))

    def cuts(self, start: int, stop: int) -> list[int]:
        return self.a.cuts(start, stop) + self.b.cuts(start, stop)


@dataclass(frozen=True)
class And(_Pair):
    """Pairs that both masks allow."""

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.a.allows(q, k) & self.b.allows(q, k)

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        (a_low, a_up), (b_low, b_up) = self.a.row_spans(q, num_keys), self.b.row_spans(q, num_keys)
        lower = torch.maximum(a_low[..., :, None], b_low[..., None, :]).flatten(-2)
        return lower, torch.minimum(a_up[..., :, None], b_up[..., None, :]).flatten(-2)

    def hull(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        (a_low, a_up), (b_low, b_up) = self.a.hull(start, stop, num_keys), self.b.hull(start, stop, num_keys)
        return max(a_low, b_low), min(a_up, b_up)

    def core(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        (a_low, a_up), (b_low, b_up) = self.a.core(start, stop, num_keys), self.b.core(start, stop, num_keys)
        return max(a_low, b_low), min(a_up, b_up)

    def tiles(self, start: int, stop: int, num_keys: int, size: int) -> Iterator[Tile]:
        if not self.has_plan:
            return super().tiles(start, stop, num_keys, size)
        plan, other = (self.a, self.b) if self.a.has_plan else (self.b, self.a)
        tiles = plan.tiles(start, stop, num_keys, size)
        return (trimmed for tile in tiles if (trimmed := tile.within(other, num_keys)) is not None)

    def counts(self, q: Tensor, limit: Tensor) -> Tensor:
        for mask, other in ((self.a, self.b), (self.b, self.a)):
            if isinstance(other, Causal):
                return mask.counts(q, torch.minimum(limit, q + 1).clamp(min=0))
        return super().counts(q, limit)


@dataclass(frozen=True)
class Or(_Pair):
    """Pairs that either mask allows."""

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.a.allows(q, k) | self.b.allows(q, k)

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        (a_low, a_up), (b_low, b_up) = self.a.row_spans(q, num_keys), self.b.row_spans(q, num_keys)
        return torch.cat([a_low, b_low], -1), torch.cat([a_up, b_up], -1)

    def hull(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        (a_low, a_up), (b_low, b_up) = self.a.hull(start, stop, num_keys), self.b.hull(start, stop, num_keys)
        return min(a_low, b_low), max(a_up, b_up)

    def tiles(self, start: int, stop: int, num_keys: int, size: int) -> Iterator[Tile]:
        if not self.has_plan:
            yield from super().tiles(start, stop, num_keys, size)
            return
        yield from self.a.tiles(start, stop, num_keys, size)
        for tile in self.b.tiles(start, stop, num_keys, size):
            mask = _Minus(tile.mask or Everything(), self.a)
            yield Tile(tile.rows, (), tile.keys, mask, first=False)


@dataclass(frozen=True)
class _Minus(Mask):
    """Pairs of `a` that `b` does not allow: what the second half of a union has left to do."""

    a: Mask
    b: Mask

    @property
    def stationary(self) -> bool:  # type: ignore[override]
        return self.a.stationary and self.b.stationary

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.a.allows(q, k) & ~self.b.allows(q, k)

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        raise NotImplementedError("a difference lives inside a tile, where only its predicate is asked")


@dataclass(frozen=True)
class Causal(Mask):
    """Keys at or before the query."""

    stationary = True

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        return torch.zeros_like(q)[:, None], (q + 1).clamp(max=num_keys)[:, None]

    def hull(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        return 0, max(0, min(stop, num_keys))

    def core(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        return 0, max(0, min(start + 1, num_keys))


@dataclass(frozen=True)
class Everything(Mask):
    """Every pair."""

    stationary = True

    def core(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        return 0, num_keys

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.ones_like(q + k, dtype=torch.bool)

    def row_spans(self, q: Tensor, num_keys: int) -> Spans:
        return torch.zeros_like(q)[:, None], torch.full_like(q, num_keys)[:, None]
