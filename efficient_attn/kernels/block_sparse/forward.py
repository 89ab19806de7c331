"""The forward pass: online softmax over the blocks that a block of queries sees, with its log-sum-exp."""

# pyright: basic, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from .steps import (
    CHANGING,
    LOWEST,
    key_place,
    load_offset,
    load_rows,
    precede,
    same_segment,
    spread,
    store_rows,
    survives,
)
from .walks import outer_indices, row_block, row_pairs, row_walk


@triton.jit(do_not_specialize=CHANGING)
def forward_kernel(
    Q, K, V, OUT, LSE, Q_SEGMENT, K_SEGMENT, ANCHOR, ROWS, OFFSET,
    ITEMS, BLOCKS, PATTERN, PATTERNS, SLOT_OUT, SLOT_LSE,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    H, GROUP, L, S, E, EV, PROGRAMS, PER_RESIDUE, NUM_SLOTS,
    BACK, AHEAD, NUM_SINKS, SINKS_AHEAD, STEP, RUN, KEY_START, SCALE, SEED, THRESHOLD, KEPT_SCALE,
    TABLE: tl.constexpr, GATHERED: tl.constexpr, WIDE: tl.constexpr, SINKS: tl.constexpr, RESUME: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_ANCHOR: tl.constexpr, HAS_SEGMENT: tl.constexpr, HAS_ROW_SEGMENT: tl.constexpr,
    OFFSET_ON_DEVICE: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    EVEN_E: tl.constexpr, EVEN_EV: tl.constexpr,
):  # fmt: skip
    """OUT (B, H, L, EV) and LSE (B, H, L) of one block of rows; RESUME takes up what stands there."""
    program, batch, head = outer_indices(PROGRAMS, H, ROWS, HAS_ROWS)
    offset = load_offset(OFFSET, OFFSET_ON_DEVICE)
    anchor = offset * 0
    if HAS_ANCHOR:
        anchor = tl.load(ANCHOR + batch)
    (
        first_row, row_step, position, first_key, slot, masked, full_low, full_up,
        low, before, beside, early, sink_low, late_low,
    ) = row_walk(
        program, offset, anchor, ITEMS, L, S, PER_RESIDUE, BACK, AHEAD, NUM_SINKS, SINKS_AHEAD, STEP, KEY_START,
        TABLE, SINKS, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    # Only a table's block may begin before row 0, and its rows lie one apart.
    if (first_row >= L) | (first_row + BLOCK_Q <= 0):
        return
    row, key = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    column, value_column = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_EV)
    row_within = spread(row, row_step, WIDE)
    rows = first_row + row_within
    valid = (rows >= 0) & (rows < L)
    own_head = batch * H + head
    OUT += own_head * L * EV
    LSE += own_head * L
    K += batch * stride_kb + (head // GROUP) * stride_kh
    V += batch * stride_vb + (head // GROUP) * stride_vh
    Q += batch * stride_qb + head * stride_qh
    q = load_rows(Q, first_row, row_within, stride_ql, column, valid, E, EVEN_E)
    row_segment = row
    if HAS_SEGMENT:
        K_SEGMENT += batch * S
    if HAS_ROW_SEGMENT:
        row_segment = tl.load(Q_SEGMENT + batch * L + rows, mask=valid, other=-1)
    acc = tl.zeros((BLOCK_Q, BLOCK_EV), ACC)
    peak = tl.full((BLOCK_Q,), LOWEST, ACC)
    total = tl.zeros((BLOCK_Q,), ACC)
    if RESUME:
        # A cut row's slots are merged with what stands there.
        resumed = valid & (slot < 0)
        acc = load_rows(OUT, first_row, row_within, EV, value_column, resumed, EV, EVEN_EV).to(ACC)
        lse = tl.load(LSE + rows, mask=resumed, other=float("-inf"))
        total = tl.where(lse == float("-inf"), total, 1.0)
        peak = tl.maximum(lse, peak)
    for step in tl.range(0, masked + full_up - full_low):
        block = row_block(
            step, masked, full_low, full_up, low, before, beside, early, sink_low, late_low, BLOCKS, TABLE, SINKS
        )  # fmt: skip
        first, within = key_place(block * BLOCK_K, key, first_key, STEP, RUN, GATHERED, WIDE)
        present = precede(first, within, S)
        k = load_rows(K, first, within, stride_ks, column, present, E, EVEN_E)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * SCALE
        if step < masked:
            seen = row_pairs(
                step, block, position, anchor, low, PATTERN, PATTERNS, BACK, AHEAD, NUM_SINKS, SINKS_AHEAD,
                TABLE, SINKS, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
            scores = tl.where(seen & present[None, :], scores, float("-inf"))
        if HAS_SEGMENT:
            key_segment = tl.load(K_SEGMENT + first + within, mask=present, other=-1)
            same = same_segment(row_segment[:, None], key_segment[None, :], HAS_ROW_SEGMENT)
            scores = tl.where(same, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        rescale = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[:, None])
        total = total * rescale + tl.sum(weights, 1)
        peak = new_peak
        if DROPOUT:
            alive = survives(SEED, rows[:, None], (first + within)[None, :], own_head, THRESHOLD)
            weights = tl.where(alive, weights * KEPT_SCALE, 0.0)
        v = load_rows(V, first, within, stride_vs, value_column, present, EV, EVEN_EV)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION, out_dtype=ACC)
    # Where there is a key at all, the largest weight is 1.
    acc = acc / tl.maximum(total, 1.0)[:, None]
    lse = tl.where(total > 0, peak + tl.log2(tl.maximum(total, 1.0)), float("-inf"))
    if TABLE and slot >= 0:
        own_slot = (own_head * NUM_SLOTS + slot) * BLOCK_Q
        store_rows(SLOT_OUT + own_slot * EV, 0, row, EV, value_column, valid, EV, acc)
        tl.store(SLOT_LSE + own_slot + row, lse)
        return
    store_rows(OUT, first_row, row_within, EV, value_column, valid, EV, acc)
    tl.store(LSE + rows, lse, mask=valid)
