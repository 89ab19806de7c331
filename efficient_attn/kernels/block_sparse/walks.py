"""Where a program stands and which blocks it walks: a band in closed form, or the entries of a table.

First come blocks in which a predicate decides, then a range of blocks in which every pair counts.
"""

# pyright: basic, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from .steps import band_allows, edges, pattern_allows, residue_view


@triton.jit
def outer_indices(PROGRAMS, HEADS, ROWS, HAS_ROWS: tl.constexpr):
    """(program within its head, batch row, head) of this program, the latter two in int64."""
    outer = tl.program_id(0) // PROGRAMS
    batch = outer // HEADS
    if HAS_ROWS:
        batch = tl.load(ROWS + batch)
    return tl.program_id(0) % PROGRAMS, batch.to(tl.int64), (outer % HEADS).to(tl.int64)


@triton.jit
def item_walk(ITEMS, program):
    """The item of a table: (block, partial entries, their number, full entries [low, up), slot)."""
    item = ITEMS + program * 6
    partial = tl.load(item + 3)
    number = tl.load(item + 4) - partial
    return (
        tl.load(item).to(tl.int64),
        partial,
        number,
        tl.load(item + 1),
        tl.load(item + 2),
        tl.load(item + 5),
    )


@triton.jit
def band_of_rows(
    program, offset, anchor, L, S, PER_RESIDUE, BACK, AHEAD, NUM_SINKS, SINKS_AHEAD, STEP,
    SINKS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The keys of a block of rows.

    Returns (first row, position of that row, residue, masked blocks, full blocks [low, up), and for `band_block`:
    first masked block, number before the full ones, number beside them, number of sink blocks before the band, first
    of these, first of the others).
    """
    residue = (program // PER_RESIDUE).to(tl.int64)
    # Backwards, because under causality the last block has the most to do.
    block = (PER_RESIDUE - 1 - program % PER_RESIDUE).to(tl.int64) * BLOCK_Q
    first, num_rows, num_keys, start = residue_view(residue, offset, STEP, L, S)
    position, last = start + block, start + tl.minimum(block + BLOCK_Q, num_rows) - 1
    low, inner_low, inner_up, up = edges(position, last, BACK, AHEAD, num_keys, BLOCK_K)
    before, beside = inner_low - low, inner_low - low + up - inner_up
    masked, early, sink_low, late_low = beside, beside * 0, low, low
    if SINKS:
        stop = tl.minimum(tl.minimum(anchor + NUM_SINKS, last + SINKS_AHEAD + 1), num_keys)
        sink_low = anchor // BLOCK_K
        sink_up = tl.maximum((tl.maximum(stop, 0) + BLOCK_K - 1) // BLOCK_K, sink_low)
        early = tl.maximum(tl.minimum(sink_up, low) - sink_low, 0)
        late_low = tl.maximum(sink_low, up)
        masked = beside + early + tl.maximum(sink_up - late_low, 0)
    return (
        first + block * STEP, position, residue, masked, inner_low, inner_up,
        low, before, beside, early, sink_low, late_low,
    )  # fmt: skip


@triton.jit
def band_block(step, inner_up, low, before, beside, early, sink_low, late_low, SINKS: tl.constexpr):
    """The block of keys that comes at `step` of the masked ones."""
    block = tl.where(step < before, low + step, inner_up + step - before)
    if SINKS:
        beyond = step - beside
        sink = tl.where(beyond < early, sink_low + beyond, late_low + beyond - early)
        block = tl.where(beyond < 0, block, sink)
    return block


@triton.jit
def row_walk(
    program, offset, anchor, ITEMS, L, S, PER_RESIDUE, BACK, AHEAD, NUM_SINKS, SINKS_AHEAD, STEP, KEY_START,
    TABLE: tl.constexpr, SINKS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`band_of_rows`, or an item of a table in its place; then the distance of rows, the first key and the slot."""
    if TABLE:
        block, partial, masked, full_low, full_up, slot = item_walk(ITEMS, program)
        position = block * BLOCK_Q
        first_row, row_step, first_key = position + anchor - offset, 1, KEY_START + anchor
        low, before, beside, early, sink_low, late_low = partial, 0, 0, 0, 0, 0
    else:
        (
            first_row, position, first_key, masked, full_low, full_up, low, before, beside, early, sink_low, late_low,
        ) = band_of_rows(
            program, offset, anchor, L, S, PER_RESIDUE, BACK, AHEAD, NUM_SINKS, SINKS_AHEAD, STEP,
            SINKS, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        row_step, slot = STEP, -1
    return (
        first_row, row_step, position, first_key, slot, masked.to(tl.int32), full_low.to(tl.int32),
        full_up.to(tl.int32), low, before, beside, early, sink_low, late_low,
    )  # fmt: skip


@triton.jit
def row_block(
    step, masked, full_low, full_up, low, before, beside, early, sink_low, late_low, BLOCKS,
    TABLE: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The block of keys at `step`: the masked ones come first."""
    full = full_low + step - masked
    if TABLE:
        return tl.load(BLOCKS + tl.where(step < masked, low + step, full))
    block = band_block(step, full_up, low, before, beside, early, sink_low, late_low, SINKS)
    return tl.where(step < masked, block, full)


@triton.jit
def row_pairs(
    step, block, position, anchor, low, PATTERN, PATTERNS, BACK, AHEAD, NUM_SINKS, SINKS_AHEAD,
    TABLE: tl.constexpr, SINKS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Which pairs of a masked block count: a tile (rows, keys)."""
    row, key = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
    if TABLE:
        return pattern_allows(PATTERNS, tl.load(PATTERN + low + step), row, key, BLOCK_Q, BLOCK_K)
    first = tl.cast(block, tl.int64) * BLOCK_K
    return band_allows(
        row, key, first - position, anchor + NUM_SINKS - first, BACK, AHEAD, SINKS_AHEAD, SINKS
    )


@triton.jit
def key_walk(
    program, offset, anchor, ITEMS, L, S, PER_RESIDUE, BACK, AHEAD, STEP, KEY_START,
    TABLE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows that see a block of keys.

    Returns (number of the first key, index of key 0, index of row 0, distance of rows, position of row 0, slot, masked
    blocks, full blocks [low, up), and for `key_block`: first masked block, number of those before the full ones).
    """
    if TABLE:
        block, low, masked, full_low, full_up, slot = item_walk(ITEMS, program)
        number, first_key = block * BLOCK_K, KEY_START + anchor
        first_row, row_step, start, before = anchor - offset, 1, offset * 0, 0
    else:
        residue = (program // PER_RESIDUE).to(tl.int64)
        number, first_key = (program % PER_RESIDUE).to(tl.int64) * BLOCK_K, residue
        first_row, num_rows, num_keys, start = residue_view(residue, offset, STEP, L, S)
        last = tl.minimum(number + BLOCK_K, num_keys) - 1
        low, full_low, full_up, up = edges(number - start, last - start, AHEAD, BACK, num_rows, BLOCK_Q)
        before = full_low - low
        masked, row_step, slot = before + up - full_up, STEP, -1
    return (
        number, first_key, first_row, row_step, start, slot, masked.to(tl.int32), full_low.to(tl.int32),
        full_up.to(tl.int32), low, before,
    )  # fmt: skip


@triton.jit
def key_block(step, masked, full_low, full_up, low, before, BLOCKS, TABLE: tl.constexpr):
    """The block of rows at `step`: the masked ones come first."""
    full = full_low + step - masked
    if TABLE:
        return tl.load(BLOCKS + tl.where(step < masked, low + step, full))
    return tl.where(step < masked, tl.where(step < before, low + step, full_up + step - before), full)


@triton.jit
def key_pairs(
    step, block, number, start, low, PATTERN, PATTERNS, BACK, AHEAD,
    TABLE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Which pairs of a masked block count: a tile (keys, rows)."""
    row, key = tl.arange(0, BLOCK_Q)[None, :], tl.arange(0, BLOCK_K)[:, None]
    if TABLE:
        return pattern_allows(PATTERNS, tl.load(PATTERN + low + step), row, key, BLOCK_Q, BLOCK_K)
    first = tl.cast(block, tl.int64) * BLOCK_Q
    return band_allows(row, key, number - start - first, 0, BACK, AHEAD, 0, False)
