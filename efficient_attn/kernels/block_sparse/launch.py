"""From tensors and a mask to launches: the parts of the mask in their order, each over the groups of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...masks import And, Causal, Mask
from ..configs import Config, lookup
from . import parts as limits
from .backward import delta_kernel, dkdv_kernel, dq_kernel
from .configs import CONFIGS
from .forward import forward_kernel
from .merge import merge_kernel, sum_kernel
from .parts import Band, Blocks, Part, parts_of, walk_of
from .table import Table, tables

_KEYS_AT_ONCE = 256
"""What causality hides anyway is tabled up to a multiple of this."""

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Group:
    """Rows of the batch, all if None, that walk one table: that of a sequence of `num_keys` keys."""

    rows: Tensor | None
    num_keys: int


@dataclass(frozen=True, kw_only=True)
class Call:
    """The tensors of one call, with a base-2 scale; positions of anchored masks count from `anchor` (B,), if given.

    segments (B, L) and (B, S) as int64, or None; `q_offset` a number, or a 0-d int64 tensor on the device.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_segment: Tensor | None
    k_segment: Tensor | None
    anchor: Tensor | None
    groups: tuple[Group, ...]
    q_offset: int | Tensor
    seed: int
    mask: Mask
    scale: float
    dropout_p: float

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to launch: no query, or no key."""
        return self.q.numel() == 0 or self.k.numel() == 0 or self.v.numel() == 0

    def parts(self, by_key: bool = False) -> tuple[Part, ...]:
        """The parts of the mask; a table cannot wait for an offset that is on the device."""
        few = self.q.shape[2] <= limits.FEW_QUERIES and self.k.shape[2] >= limits.MANY_KEYS
        return parts_of(self.mask, by_key, few and isinstance(self.q_offset, int))

    def config(self, part: Part, kernel: str) -> Config:
        walk = "dropout" if self.dropout_p else walk_of(part)
        sizes = self.q.shape[3], self.v.shape[3]
        return lookup(CONFIGS, f"{walk}_{kernel}", self.q.device, self.q.dtype, *sizes)

    def arguments(self, config: Config) -> dict[str, Any]:
        """What all kernels take of the call."""
        q, k, v = self.q, self.k, self.v
        block_e, block_ev = block_width(q.shape[3]), block_width(v.shape[3])
        return {
            "Q": q, "K": k, "V": v,
            "Q_SEGMENT": q if self.q_segment is None else self.q_segment,
            "K_SEGMENT": k if self.k_segment is None else self.k_segment,
            **strides("q", "l", q), **strides("k", "s", k), **strides("v", "s", v),
            "GROUP": q.shape[1] // k.shape[1], "L": q.shape[2], "S": k.shape[2], "E": q.shape[3], "EV": v.shape[3],
            "SCALE": self.scale * LOG2_E, "SEED": self.seed,
            "THRESHOLD": min(round(self.dropout_p * 2**32), 2**32 - 1), "KEPT_SCALE": 1 / (1 - self.dropout_p),
            "HAS_SEGMENT": self.k_segment is not None, "HAS_ROW_SEGMENT": self.q_segment is not None,
            "DROPOUT": self.dropout_p > 0, "ACC": triton_dtype(self.accumulator), "PRECISION": "ieee",
            "BLOCK_E": block_e, "BLOCK_EV": block_ev,
            "EVEN_E": block_e == q.shape[3], "EVEN_EV": block_ev == v.shape[3],
            **config.launch,
        }  # fmt: skip

    def walks(self, part: Part, config: Config, by_key: bool) -> Iterator[Walk]:
        """How the programs of `part` walk, by blocks of rows or of keys: one launch each."""
        if isinstance(part, Band):
            yield self._band_walk(part, config, by_key)
            return
        for group in self.groups:
            yield self._table_walk(part, config, by_key, group)

    def _band_walk(self, band: Band, config: Config, by_key: bool) -> Walk:
        length, block = (self.k if by_key else self.q).shape[2], config["BLOCK_K" if by_key else "BLOCK_Q"]
        per_residue = triton.cdiv(triton.cdiv(length, band.step), block)
        anchor = self.anchor if band.sinks else None
        arguments = {
            **self._place(anchor, None), "ITEMS": self.q, "BLOCKS": self.q, "PATTERN": self.q, "PATTERNS": self.q,
            "PROGRAMS": per_residue * min(band.step, self.k.shape[2]), "PER_RESIDUE": per_residue, "NUM_SLOTS": 0,
            "BACK": band.back, "AHEAD": band.ahead, "STEP": band.step, "RUN": 1, "KEY_START": 0,
            "TABLE": False, "GATHERED": False,
        }  # fmt: skip
        if not by_key:
            sinks = {"NUM_SINKS": band.sinks, "SINKS_AHEAD": band.sinks_ahead, "SINKS": band.sinks > 0}
            arguments |= sinks
        return Walk(arguments, len(self.q), None)

    def _table_walk(self, part: Blocks, config: Config, by_key: bool, group: Group) -> Walk:
        anchor = self.anchor if part.mask.anchored else None
        num_keys, offset, summaries = group.num_keys, int(self.q_offset), part.summaries
        both = tables(
            part.mask.sized(num_keys),
            offset - (0 if anchor is None else self.k.shape[2]),
            offset + self.q.shape[2],
            self._table_keys(group, offset) if summaries is None else summaries.num_keys(num_keys),
            config["BLOCK_Q"],
            config["BLOCK_K"],
            self.q.device,
        )
        table = both.by_key if by_key else both.by_row
        step, run = (1, 1) if summaries is None else (summaries.stride, summaries.count)
        arguments = {
            **self._place(anchor, group.rows), "ITEMS": table.items, "BLOCKS": table.blocks, "PATTERN": table.pattern,
            "PATTERNS": table.patterns, "PROGRAMS": len(table.items), "PER_RESIDUE": 1, "NUM_SLOTS": table.num_slots,
            "BACK": 0, "AHEAD": 0, "STEP": step, "RUN": run, "KEY_START": step - run,
            "TABLE": True, "GATHERED": summaries is not None,
        }  # fmt: skip
        if not by_key:
            arguments |= {"NUM_SINKS": 0, "SINKS_AHEAD": 0, "SINKS": False}
        return Walk(arguments, len(self.q) if group.rows is None else len(group.rows), table)

    def _table_keys(self, group: Group, offset: int) -> int:
        """The keys of a table: those of a growing cache rounded up, so that one table serves many steps."""
        num_keys = group.num_keys
        joined = (self.mask.a, self.mask.b) if isinstance(self.mask, And) else (self.mask,)
        hidden = Causal() in joined
        if hidden and group.rows is None and offset + self.q.shape[2] <= num_keys:
            return -(-num_keys // _KEYS_AT_ONCE) * _KEYS_AT_ONCE
        return num_keys

    def _place(self, anchor: Tensor | None, rows: Tensor | None) -> dict[str, Any]:
        return {
            "ANCHOR": self.q if anchor is None else anchor, "HAS_ANCHOR": anchor is not None,
            "ROWS": self.q if rows is None else rows, "HAS_ROWS": rows is not None,
            "OFFSET": self.q_offset, "OFFSET_ON_DEVICE": isinstance(self.q_offset, Tensor),
        }  # fmt: skip

    def slots(self, table: Table | None, heads: int, block: int, *widths: int) -> list[Tensor]:
        """Room for what the programs of cut blocks compute, the last dimension one of `widths` each (0: none)."""
        number = 0 if table is None else table.num_slots
        shape = len(self.q), heads, max(1, number) * block if number else 1
        return [
            self.q.new_empty(*shape, *((width,) if width else ()), dtype=self.accumulator) for width in widths
        ]


@dataclass(frozen=True)
class Walk:
    """The arguments that say how the programs walk, the batch rows they serve, and their table if they have one."""

    arguments: dict[str, Any]
    batch: int
    table: Table | None

    def launch(self, kernel: Any, heads: int, arguments: dict[str, Any]) -> None:
        programs = self.arguments["PROGRAMS"] * heads * self.batch
        if programs:
            arguments = arguments | self.arguments
            kernel[(programs,)](**arguments, WIDE=_is_wide(arguments))

    def merges(self, heads: int, names: tuple[str, ...]) -> tuple[tuple[int], dict[str, Any]] | None:
        """The grid and the arguments of the kernel that merges the slots; None if no block was cut."""
        if self.table is None or not len(self.table.merges) or not self.batch:
            return None
        chosen = {name: self.arguments[name] for name in (*names, *_PLACE, "NUM_SLOTS")}
        number = len(self.table.merges)
        return (number * heads * self.batch,), {**chosen, "MERGES": self.table.merges, "PROGRAMS": number}


_PLACE = ("ANCHOR", "HAS_ANCHOR", "ROWS", "HAS_ROWS", "OFFSET", "OFFSET_ON_DEVICE")
_KEYS = ("STEP", "RUN", "KEY_START", "GATHERED")


def _is_wide(arguments: dict[str, Any]) -> bool:
    """Whether a block reaches over 2^31 elements: then distances inside it take 64 bits."""
    rows = max(arguments["BLOCK_Q"], arguments["BLOCK_K"]) + arguments["RUN"]
    widest = max(
        arguments.get(name, 0) for name in ("stride_ql", "stride_ks", "stride_vs", "stride_gl", "E", "EV")
    )
    return rows * arguments["STEP"] * widest >= 1 << 31


def block_width(width: int) -> int:
    """The columns of a tile that holds `width` of them."""
    return max(16, 1 << (width - 1).bit_length())


def triton_dtype(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def strides(name: str, axis: str, x: Tensor) -> dict[str, int]:
    """The strides of the first three dimensions, as the kernels name them."""
    return dict(
        zip((f"stride_{name}b", f"stride_{name}h", f"stride_{name}{axis}"), x.stride()[:3], strict=True)
    )


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The output (B, H, L, Ev), and the base-2 log-sum-exp2 of each row's scores (B, H, L), -inf where it has none."""
    batch, heads, length, _ = call.q.shape
    width, parts = call.v.shape[3], call.parts()
    out = call.q.new_empty(
        batch, heads, length, width, dtype=call.q.dtype if len(parts) == 1 else call.accumulator
    )
    lse = call.q.new_empty(batch, heads, length, dtype=call.accumulator)
    if call.is_empty:
        return out.zero_().to(call.q.dtype), lse.fill_(-torch.inf)
    for number, part in enumerate(parts):
        config = call.config(part, "forward")
        common = call.arguments(config) | {"OUT": out, "LSE": lse, "H": heads, "RESUME": number > 0}
        for walk in call.walks(part, config, by_key=False):
            slot_out, slot_lse = call.slots(walk.table, heads, config["BLOCK_Q"], width, 0)
            walk.launch(forward_kernel, heads, common | {"SLOT_OUT": slot_out, "SLOT_LSE": slot_lse})
            merges = walk.merges(heads, ())
            if merges is not None:
                grid, arguments = merges
                shared = ("OUT", "LSE", "H", "L", "EV", "RESUME", "ACC", "BLOCK_Q", "BLOCK_EV")
                arguments |= {name: common[name] for name in shared}
                merge_kernel[grid](SLOT_OUT=slot_out, SLOT_LSE=slot_lse, **arguments)
    return out.to(call.q.dtype), lse


def backward(call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    if call.is_empty:
        dq, dk, dv = (x.new_zeros(x.shape) for x in (call.q, call.k, call.v))
        return dq, dk, dv
    grad, out = unit_columns(grad), out.contiguous()
    delta = torch.empty_like(lse)
    batch, heads, length, width = grad.shape
    programs = triton.cdiv(length, 64)
    arguments: dict[str, Any] = {
        "GRAD": grad, "OUT": out, "DELTA": delta, **strides("g", "l", grad), "H": heads, "L": length, "EV": width,
        "PROGRAMS": programs, "ACC": triton_dtype(call.accumulator), "BLOCK_Q": 64, "BLOCK_EV": block_width(width),
    }  # fmt: skip
    delta_kernel[(programs * batch * heads,)](**arguments)
    rows = {"GRAD": grad, **strides("g", "l", grad), "LSE": lse, "DELTA": delta}
    return _row_gradients(call, rows), *_key_gradients(call, rows)


def _row_gradients(call: Call, rows: dict[str, Any]) -> Tensor:
    heads, width, parts = call.q.shape[1], call.q.shape[3], call.parts()
    dq = call.q.new_empty(call.q.shape, dtype=call.q.dtype if len(parts) == 1 else call.accumulator)
    for number, part in enumerate(parts):
        config = call.config(part, "dq")
        common = call.arguments(config) | rows
        common |= {"DQ": dq, "H": heads, "RESUME": number > 0, "OUT_SCALE": call.scale}
        for walk in call.walks(part, config, by_key=False):
            (slot_dq,) = call.slots(walk.table, heads, config["BLOCK_Q"], width)
            walk.launch(dq_kernel, heads, common | {"SLOT_DQ": slot_dq})
            merges = walk.merges(heads, ())
            if merges is not None:
                place = {"STEP": 1, "RUN": 1, "KEY_START": 0, "GATHERED": False}
                _add_slots(
                    call, merges, dq, slot_dq, config["BLOCK_Q"], number > 0, by_key=False, place=place
                )
    return dq.to(call.q.dtype)


def _key_gradients(call: Call, rows: dict[str, Any]) -> tuple[Tensor, Tensor]:
    heads, parts = call.k.shape[1], call.parts(by_key=True)
    dtype = call.q.dtype if len(parts) == 1 else call.accumulator
    # Keys before the anchor have no block.
    make = torch.empty if isinstance(parts[0], Band) or call.anchor is None else torch.zeros
    dk, dv = (make(x.shape, dtype=dtype, device=x.device) for x in (call.k, call.v))
    for number, part in enumerate(parts):
        config = call.config(part, "dkdv")
        common = call.arguments(config) | rows
        common |= {"DK": dk, "DV": dv, "KV_HEADS": heads, "RESUME": number > 0, "OUT_SCALE": call.scale}
        for walk in call.walks(part, config, by_key=True):
            slots = call.slots(walk.table, heads, config["BLOCK_K"], dk.shape[3], dv.shape[3])
            walk.launch(dkdv_kernel, heads, common | {"SLOT_DK": slots[0], "SLOT_DV": slots[1]})
            merges = walk.merges(heads, _KEYS)
            if merges is not None:
                for target, slot in zip((dk, dv), slots, strict=True):
                    _add_slots(
                        call, merges, target, slot, config["BLOCK_K"], number > 0, by_key=True, place={}
                    )
    return dk.to(call.q.dtype), dv.to(call.q.dtype)


def _add_slots(
    call: Call,
    merges: tuple[tuple[int], dict[str, Any]],
    target: Tensor,
    slots: Tensor,
    block: int,
    resume: bool,
    *,
    by_key: bool,
    place: dict[str, Any],
) -> None:
    grid, arguments = merges
    if by_key:
        # Keys stand at their own positions, rows at theirs less the offset.
        arguments = arguments | {"OFFSET": 0, "OFFSET_ON_DEVICE": False}
    arguments = arguments | place | {
        "OUT": target, "SLOTS": slots, "HEADS": target.shape[1], "LENGTH": target.shape[2], "WIDTH": target.shape[3],
        "RESUME": resume, "ACC": triton_dtype(call.accumulator), "BLOCK": block,
        "BLOCK_WIDTH": block_width(target.shape[3]),
    }  # fmt: skip
    sum_kernel[grid](**arguments)


def unit_columns(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as the kernels read it."""
    return x if x.stride(3) == 1 else x.contiguous()
