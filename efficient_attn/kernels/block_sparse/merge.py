"""Putting together what several programs computed of one block, always in the order of their slots."""

# pyright: basic, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from .steps import CHANGING, LOWEST, key_place, load_offset, load_rows, store_rows
from .walks import outer_indices


@triton.jit(do_not_specialize=CHANGING)
def merge_kernel(
    OUT, LSE, SLOT_OUT, SLOT_LSE, MERGES, ANCHOR, ROWS, OFFSET, H, L, EV, PROGRAMS, NUM_SLOTS,
    RESUME: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_ANCHOR: tl.constexpr, OFFSET_ON_DEVICE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """Outputs over disjoint keys into one, weighted by 2^lse; RESUME takes what stands in OUT for another slot."""
    program, batch, head = outer_indices(PROGRAMS, H, ROWS, HAS_ROWS)
    first = tl.load(MERGES + program * 3).to(tl.int64) * BLOCK_Q - load_offset(OFFSET, OFFSET_ON_DEVICE)
    if HAS_ANCHOR:
        first += tl.load(ANCHOR + batch)
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_EV)
    rows = first + row
    valid = (rows >= 0) & (rows < L)
    own_head = batch * H + head
    OUT += own_head * L * EV
    LSE += own_head * L
    acc = tl.zeros((BLOCK_Q, BLOCK_EV), ACC)
    lse = tl.full((BLOCK_Q,), float("-inf"), ACC)
    if RESUME:
        acc = load_rows(OUT, first, row, EV, column, valid, EV, False).to(ACC)
        lse = tl.load(LSE + rows, mask=valid, other=float("-inf"))
    for slot in tl.range(tl.load(MERGES + program * 3 + 1), tl.load(MERGES + program * 3 + 2)):
        own_slot = (own_head * NUM_SLOTS + slot) * BLOCK_Q
        part = load_rows(SLOT_OUT + own_slot * EV, 0, row, EV, column, valid, EV, False)
        part_lse = tl.load(SLOT_LSE + own_slot + row, mask=valid, other=float("-inf"))
        peak = tl.maximum(tl.maximum(lse, part_lse), LOWEST)
        old, new = tl.exp2(lse - peak), tl.exp2(part_lse - peak)
        total = old + new
        acc = (acc * old[:, None] + part * new[:, None]) / tl.maximum(total, 1.0)[:, None]
        lse = tl.where(total > 0, peak + tl.log2(tl.maximum(total, 1.0)), float("-inf"))
    store_rows(OUT, first, row, EV, column, valid, EV, acc)
    tl.store(LSE + rows, lse, mask=valid)


@triton.jit(do_not_specialize=CHANGING)
def sum_kernel(
    OUT, SLOTS, MERGES, ANCHOR, ROWS, OFFSET, HEADS, LENGTH, WIDTH, PROGRAMS, NUM_SLOTS, STEP, RUN, KEY_START,
    GATHERED: tl.constexpr, RESUME: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_ANCHOR: tl.constexpr,
    OFFSET_ON_DEVICE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The sum of each block's slots into OUT (batch, heads, LENGTH, WIDTH); RESUME adds it to what stands there."""
    program, batch, head = outer_indices(PROGRAMS, HEADS, ROWS, HAS_ROWS)
    start = KEY_START - load_offset(OFFSET, OFFSET_ON_DEVICE)
    if HAS_ANCHOR:
        start += tl.load(ANCHOR + batch)
    within, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_WIDTH)
    number = tl.load(MERGES + program * 3) * BLOCK
    first, places = key_place(number, within, start, STEP, RUN, GATHERED, True)
    index = first + places
    valid = (index >= 0) & (index < LENGTH)
    own_head = batch * HEADS + head
    OUT += own_head * LENGTH * WIDTH
    acc = tl.zeros((BLOCK, BLOCK_WIDTH), ACC)
    if RESUME:
        acc = load_rows(OUT, first, places, WIDTH, column, valid, WIDTH, False).to(ACC)
    for slot in tl.range(tl.load(MERGES + program * 3 + 1), tl.load(MERGES + program * 3 + 2)):
        part = SLOTS + (own_head * NUM_SLOTS + slot) * BLOCK * WIDTH
        acc += load_rows(part, 0, within, WIDTH, column, valid, WIDTH, False)
    store_rows(OUT, first, places, WIDTH, column, valid, WIDTH, acc)
