"""The launches of one pass: states, their running sums, then rows or keys."""

# pyright: basic, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..configs import INTERPRETER, Config, architecture_of, lookup
from .backward import delta_kernel, row_gradients_kernel
from .configs import TABLE, ceil_div, named, padded, span_of
from .features import exponents_kernel
from .forward import rows_kernel
from .key_gradients import key_gradients_kernel
from .states import key_states_kernel, row_states_kernel, running_sum_kernel


def precision_of(dtype: torch.dtype) -> str:
    """In what the matrix units multiply inputs of `dtype`; see products.py."""
    return {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "ieee"}[dtype]


def halves(projection: Tensor | None, precision: str) -> Tensor | None:
    """The projection as an operand, and what rounding took from it as another: (2, M, E); (1, M, E) in "ieee"."""
    if projection is None:
        return None
    projection = projection.float()
    if precision == "ieee":
        return projection[None].contiguous()
    high = _rounded(projection, precision)
    return torch.stack([high, _rounded(projection - high.float(), precision)])


def _rounded(x: Tensor, precision: str) -> Tensor:
    if precision == "tf32":
        return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return x.to(torch.bfloat16 if precision == "bf16" else torch.float16)


def _numbered(segment: Tensor) -> Tensor:
    """Segments (B, S) by their number in each row, in 32 bits, which take half of the registers."""
    begins = torch.nn.functional.pad(segment[:, 1:] != segment[:, :-1], (1, 0))
    return begins.cumsum(1, dtype=torch.int32)


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


@dataclass
class Exponents:
    """What maps with exponents need to know of each token: fp32, (B, H, L) for queries and (B, Hkv, S) for keys.

    `peak` is the running maximum of `exponent`, its overall maximum without causality.
    """

    row_shift: Tensor
    shift: Tensor
    exponent: Tensor
    peak: Tensor


class Pass:
    """What the launches of a forward or backward pass share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        segment: Tensor | None,
        offset: int | Tensor,
        exponents: Exponents | None,
        projection: Tensor | None,
        feature: str,
        scale: float,
        is_causal: bool,
        precision: str | None = None,
        before: Tensor | None = None,
    ) -> None:
        """`before` is the state (B, Hkv, M, Ev + 1) of earlier keys, in the unit of the first `peak`."""
        self.before = before
        self.walk = {"IS_CAUSAL": is_causal, "STRICT": False}
        self.q, self.k, self.v = _rows(q), _rows(k), _rows(v)
        self.batch, self.heads, self.length, width = q.shape
        self.kv_heads, self.num_keys, self.values = v.shape[1:]
        self.groups = self.heads // self.kv_heads
        self.valid = None if valid is None else valid.contiguous().view(torch.int8)
        self.segment = _numbered(segment) if segment is not None and is_causal else None
        self.projection = halves(projection, precision or precision_of(q.dtype))
        self.exponents, self.scale, self.is_causal = exponents, scale, is_causal
        self.size = width if projection is None else projection.shape[0]
        self.precision = precision or precision_of(q.dtype)
        operand = torch.float32 if self.precision in ("tf32", "ieee") else torch.float16
        self._key = q.device, operand, width, self.values
        self.shapes: dict[str, Any] = {
            "FEATURE": feature, "E": width, "EV": self.values, "M": self.size, "PRECISION": self.precision,
        }  # fmt: skip
        self.padded = {"BLOCK_X": padded(width), "BLOCK_V": padded(self.values)}
        interpreted = architecture_of(q.device) == INTERPRETER
        self.span = span_of(self.batch * self.kv_heads, max(self.num_keys, self.length), interpreted)
        self.key_spans = ceil_div(self.num_keys, self.span)
        if not is_causal:
            offset = self.key_spans * self.span
        self.offset = offset
        # Where the first query stands in its span is known on the device alone, if it moves.
        if isinstance(offset, int):
            start = min(max(offset, -self.length), self.num_keys if is_causal else offset) % self.span
        else:
            start = self.span - 1
        self.row_spans = ceil_div(start + self.length, self.span)

    def config(self, kernel: str) -> Config:
        return lookup(TABLE, named(kernel, self.projection is not None), *self._key)

    def blocks(self, config: Config) -> dict[str, int]:
        """The constants of a config, no wider than the tensors need."""
        constants = {name: size for name, size in config.constants.items() if name != "FEATURES"}
        constants["BLOCK_M"] = min(constants["BLOCK_M"], padded(self.size))
        if "BLOCK_V" in constants:
            constants["BLOCK_V"] = min(constants["BLOCK_V"], self.padded["BLOCK_V"])
        return {**self.padded, **constants, "num_warps": config.num_warps, "num_stages": config.num_stages}

    def parts(self, config: Config) -> Iterator[dict[str, Any]]:
        """The launches that together take all features."""
        block = min(config["BLOCK_M"], padded(self.size))
        for first in range(0, self.size, config["FEATURES"]):
            last = min(first + config["FEATURES"], self.size)
            yield {
                "first_feature": first,
                "NUM_BLOCKS": ceil_div(last - first, block),
                "BEGIN": first == 0,
                "END": last == self.size,
            }

    @property
    def of_keys(self) -> tuple[Tensor | None, ...]:
        """shift, exponent, peak."""
        e = self.exponents
        return (None, None, None) if e is None else (e.shift, e.exponent, e.peak)

    def key_states(self) -> Tensor:
        """Slot t holds the sum of the keys before span t: (B Hkv, spans + 1, M (EV + 1))."""
        states = self._new_states(self.key_spans)
        config = self.config("states")
        blocks = self.blocks(config)
        grid = self._state_grid(self.key_spans, blocks)
        key_states_kernel[grid](
            self.k, self.v, self.valid, self.segment, *self.of_keys, self.projection, states,
            *_strides(self.k), *_strides(self.v),
            self.kv_heads, self.num_keys, self.span, self.key_spans, **self.shapes, **blocks,
        )  # fmt: skip
        position = torch.arange(self.key_spans + 1, device=self.q.device) * self.span - 1
        self._sum_up(states, position, False, self.before)
        return states

    def row_states(self, grad: Tensor, total: Tensor, delta: Tensor, after: Tensor | None = None) -> Tensor:
        """Slot t holds the sum of the rows of span t and all later ones, spans counted from the first row's.

        `after`, in the unit of the last `peak`, is the gradient of the state after all keys: of later rows, as it were.
        """
        states = self._new_states(self.row_spans)
        config = self.config("states")
        blocks = self.blocks(config)
        row_shift, peak = None, None
        if self.exponents is not None:
            row_shift, peak = self.exponents.row_shift, self.exponents.peak
        row_states_kernel[self._state_grid(self.row_spans, blocks)](
            self.q, grad, total, delta, self.segment, row_shift, peak, self.projection, states,
            self.offset, self.scale, *_strides(self.q), *_strides(grad),
            self.kv_heads, self.length, self.num_keys, self.span, self.row_spans,
            GROUPS=self.groups, IS_CAUSAL=self.is_causal, **self.shapes, **blocks,
        )  # fmt: skip
        number = torch.arange(self.row_spans + 1, device=self.q.device)
        clamped = self.offset
        if isinstance(clamped, Tensor):
            clamped = clamped.clamp(-self.length, self.num_keys)
        elif self.is_causal:
            clamped = min(max(clamped, -self.length), self.num_keys)
        self._sum_up(states, (clamped // self.span + number) * self.span, True, after)
        return states

    def state_of(self, states: Tensor, slot: int) -> Tensor:
        """One slot as (B, Hkv, M, Ev + 1)."""
        return states[:, slot].view(self.batch, self.kv_heads, self.values + 1, self.size).mT

    def part(self, gradient: Tensor, parts: list[dict[str, Any]]) -> Tensor | None:
        """Where launches that are several add up a gradient."""
        if len(parts) == 1:
            return None
        return torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device)

    def _new_states(self, spans: int) -> Tensor:
        shape = self.batch * self.kv_heads, spans + 1, self.size * (self.values + 1)
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def _state_grid(self, spans: int, blocks: dict[str, int]) -> tuple[int, int, int]:
        programs = self.batch * self.kv_heads * spans
        return (
            programs,
            ceil_div(self.size, blocks["BLOCK_M"]),
            ceil_div(self.values, blocks["BLOCK_V"]),
        )

    def _sum_up(self, states: Tensor, position: Tensor, reverse: bool, first: Tensor | None) -> None:
        """Running sums over slots, whose units are those at `position`, from the state `first` on."""
        if first is not None:
            self.state_of(states, -1 if reverse else 0).copy_(first)
        factors = self._factors(position, reverse) if self.is_causal else None
        block = 32 if architecture_of(self.q.device) == INTERPRETER else 512
        slots, size = states.shape[1:]
        grid = len(states), ceil_div(size, block)
        running_sum_kernel[grid](
            states,
            factors,
            slots,
            SIZE=size,
            REVERSE=reverse,
            KEEP=first is not None,
            BLOCK=block,
            num_warps=4,
        )

    def _factors(self, position: Tensor, reverse: bool) -> Tensor | None:
        """What each slot keeps of the one before it: (B Hkv, slots)."""
        position = position.clamp(0, self.num_keys - 1)
        kept = None
        if self.exponents is not None:
            unit = self.exponents.peak[:, :, position]
            step = unit[:, :, 1:] - unit[:, :, :-1] if reverse else unit[:, :, :-1] - unit[:, :, 1:]
            kept = torch.exp2(-step.abs() if reverse else step.clamp(max=0))
        if self.segment is not None:
            own = self.segment[:, position]
            same = (own[:, 1:] == own[:, :-1])[:, None].expand(-1, self.kv_heads, -1).float()
            kept = same if kept is None else kept * same
        if kept is None:
            return None
        first = kept.new_zeros(*kept.shape[:2], 1)
        return torch.cat([kept, first] if reverse else [first, kept], 2).flatten(0, 1).contiguous()


def exponents(
    x: Tensor, valid: Tensor | None, projection: Tensor | None, feature: str, scale: float, of_keys: bool
) -> tuple[Tensor, Tensor | None]:
    """The shift of each token of x (B, H, L, E) and, of keys, the exponent: (B, H, L), fp32."""
    x = _rows(x)
    batch, heads, length, width = x.shape
    shift = torch.empty(batch, heads, length, dtype=torch.float32, device=x.device)
    exponent = torch.empty_like(shift) if of_keys else None
    config = lookup(TABLE, "exponents", x.device, x.dtype, width)
    blocks = ceil_div(length, config["CHUNK"])
    size = width if projection is None else projection.shape[0]
    constants = {**config.launch, "BLOCK_M": min(config["BLOCK_M"], padded(size))}
    exponents_kernel[(batch * heads * blocks,)](
        x,
        None if valid is None else valid.contiguous().view(torch.int8),
        halves(projection, precision_of(x.dtype)),
        shift, exponent, scale, *_strides(x), heads, length, blocks,
        FEATURE=feature, E=width, M=size, PRECISION=precision_of(x.dtype), BLOCK_X=padded(width), **constants,
    )  # fmt: skip
    return shift, exponent


def forward(
    p: Pass, keep: bool, states: Tensor | None = None, begun: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, L, Ev), what rounding took from it if that is to be kept, and each row's total weight (B, H, L).

    `states` are those of the keys, if they are there already; `begun` is what `sums` gave for other keys.
    """
    q = p.q
    out = torch.empty(*q.shape[:3], p.values, dtype=q.dtype, device=q.device)
    lost = torch.empty_like(out) if keep and q.dtype != torch.float32 else None
    part, weights = begun or (None, None)
    total = _walk_rows(p, p.key_states() if states is None else states, part, weights, out, lost)
    return out, q.new_empty(0) if lost is None else lost, total


def sums(p: Pass) -> tuple[Tensor, Tensor]:
    """What the outputs are before they are divided (B, H, L, Ev), and by what (B, H, L): fp32."""
    part = torch.empty(*p.q.shape[:3], p.values, dtype=torch.float32, device=p.q.device)
    return part, _walk_rows(p, p.key_states(), part, None, None, None)


def _walk_rows(
    p: Pass,
    states: Tensor,
    part: Tensor | None,
    begun: Tensor | None,
    out: Tensor | None,
    lost: Tensor | None,
) -> Tensor:
    """The total weights, after launches that add up in `part` and end in `out`, if it is given.

    `begun` are the weights that belong to what is in `part` already, if anything is.
    """
    q, config = p.q, p.config("rows")
    parts, blocks = list(p.parts(config)), p.blocks(config)
    if part is None and len(parts) > 1:
        part = torch.empty(*q.shape[:3], p.values, dtype=torch.float32, device=q.device)
    row_shift = None if p.exponents is None else p.exponents.row_shift
    grid = p.batch * p.heads * p.row_spans, ceil_div(p.values, blocks["BLOCK_V"])
    previous = begun
    for features in parts:
        features["BEGIN"] &= begun is None
        features["END"] &= out is not None
        total = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        rows_kernel[grid](
            q, p.k, p.v, p.valid, p.segment, row_shift, *p.of_keys, p.projection, states,
            part, previous, part if out is None else out, lost, total,
            p.offset, p.scale, *_strides(q), *_strides(p.k), *_strides(p.v),
            p.heads, p.length, p.num_keys, p.span, p.row_spans, p.key_spans + 1,
            GROUPS=p.groups, **p.walk, **features, **p.shapes, **blocks,
        )  # fmt: skip
        previous = total
    assert previous is not None
    return previous


def backward(
    p: Pass, grad: Tensor, out: Tensor, lost: Tensor | None, total: Tensor, after: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, and of a state before the first key, if all rows come after it: (B, Hkv, M, Ev + 1).

    `after` is the gradient of the state after all keys; both are of states in units of the nearest `peak`.
    """
    grad, delta = _rows(grad), delta_of(p, grad, out, lost)
    dq = row_gradients(p, grad, total, delta, p.q.dtype)
    states = p.row_states(grad, total, delta, after)
    return dq, *key_gradients(p, grad, total, delta, states, p.q.dtype), p.state_of(states, 0)


def delta_of(p: Pass, grad: Tensor, out: Tensor, lost: Tensor | None) -> Tensor:
    """-grad . out of each row (B, H, L)."""
    grad = _rows(grad)
    delta = torch.empty(grad.shape[:3], dtype=torch.float32, device=grad.device)
    chunk = 16 if architecture_of(grad.device) == INTERPRETER else 64
    blocks = ceil_div(p.length, chunk)
    delta_kernel[(p.batch * p.heads * blocks,)](
        grad, out, lost, delta, *_strides(grad), p.heads, p.length, blocks,
        EV=p.values, CHUNK=chunk, BLOCK_V=p.padded["BLOCK_V"], num_warps=4,
    )  # fmt: skip
    return delta


def row_gradients(p: Pass, grad: Tensor, total: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """dq in `dtype`."""
    dq = torch.empty(p.q.shape, dtype=dtype, device=p.q.device)
    states, config = p.key_states(), p.config("row_gradients")
    parts = list(p.parts(config))
    part = p.part(dq, parts)
    row_shift = None if p.exponents is None else p.exponents.row_shift
    for features in parts:
        row_gradients_kernel[(p.batch * p.heads * p.row_spans,)](
            p.q, p.k, p.v, grad, total, delta, p.valid, p.segment, row_shift, *p.of_keys, p.projection, states,
            part, dq, p.offset, p.scale,
            *_strides(p.q), *_strides(p.k), *_strides(p.v), *_strides(grad),
            p.heads, p.length, p.num_keys, p.span, p.row_spans, p.key_spans + 1,
            GROUPS=p.groups, **p.walk, **features, **p.shapes, **p.blocks(config),
        )  # fmt: skip
    return dq


def key_gradients(
    p: Pass, grad: Tensor, total: Tensor, delta: Tensor, states: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dk and dv in `dtype`, from the states of the rows."""
    dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (p.k, p.v))
    config = p.config("key_gradients")
    parts = list(p.parts(config))
    part, part_v = p.part(dk, parts), p.part(dv, parts)
    row_shift = None if p.exponents is None else p.exponents.row_shift
    for features in parts:
        key_gradients_kernel[(p.batch * p.kv_heads * p.key_spans,)](
            p.q, p.k, p.v, grad, total, delta, p.valid, p.segment, row_shift, *p.of_keys, p.projection, states,
            part, part_v, dk, dv, p.offset, p.scale,
            *_strides(p.q), *_strides(p.k), *_strides(p.v), *_strides(grad),
            p.kv_heads, p.length, p.num_keys, p.span, p.key_spans, p.row_spans + 1,
            GROUPS=p.groups, **p.walk, **features, **p.shapes, **p.blocks(config),
        )  # fmt: skip
    return dk, dv
