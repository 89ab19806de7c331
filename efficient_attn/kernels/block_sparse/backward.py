"""The backward pass: weights recomputed from the log-sum-exp, dQ by blocks of rows, dK and dV by blocks of keys."""

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
from .walks import key_block, key_pairs, key_walk, outer_indices, row_block, row_pairs, row_walk


@triton.jit(do_not_specialize=CHANGING)
def delta_kernel(
    GRAD, OUT, DELTA, stride_gb, stride_gh, stride_gl, H, L, EV, PROGRAMS,
    ACC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """DELTA (B, H, L) = the sum of grad * out over the columns."""
    head = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    first, row = (tl.program_id(0) % PROGRAMS).to(tl.int64) * BLOCK_Q, tl.arange(0, BLOCK_Q)
    column, valid = tl.arange(0, BLOCK_EV), precede(first, row, L)
    GRAD += head // H * stride_gb + head % H * stride_gh
    grad = load_rows(GRAD, first, row, stride_gl, column, valid, EV, False).to(ACC)
    out = load_rows(OUT + head * L * EV, first, row, EV, column, valid, EV, False).to(ACC)
    tl.store(DELTA + head * L + first + row, tl.sum(grad * out, 1), mask=valid)


@triton.jit(do_not_specialize=CHANGING)
def dq_kernel(
    Q, K, V, GRAD, LSE, DELTA, DQ, Q_SEGMENT, K_SEGMENT, ANCHOR, ROWS, OFFSET,
    ITEMS, BLOCKS, PATTERN, PATTERNS, SLOT_DQ,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gl,
    H, GROUP, L, S, E, EV, PROGRAMS, PER_RESIDUE, NUM_SLOTS,
    BACK, AHEAD, NUM_SINKS, SINKS_AHEAD, STEP, RUN, KEY_START, SCALE, OUT_SCALE, SEED, THRESHOLD, KEPT_SCALE,
    TABLE: tl.constexpr, GATHERED: tl.constexpr, WIDE: tl.constexpr, SINKS: tl.constexpr, RESUME: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_ANCHOR: tl.constexpr, HAS_SEGMENT: tl.constexpr, HAS_ROW_SEGMENT: tl.constexpr,
    OFFSET_ON_DEVICE: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    EVEN_E: tl.constexpr, EVEN_EV: tl.constexpr,
):  # fmt: skip
    """DQ (B, H, L, E) of one block of rows; RESUME adds to what stands there."""
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
    DQ += own_head * L * E
    K += batch * stride_kb + (head // GROUP) * stride_kh
    V += batch * stride_vb + (head // GROUP) * stride_vh
    Q += batch * stride_qb + head * stride_qh
    GRAD += batch * stride_gb + head * stride_gh
    q = load_rows(Q, first_row, row_within, stride_ql, column, valid, E, EVEN_E)
    grad = load_rows(GRAD, first_row, row_within, stride_gl, value_column, valid, EV, EVEN_EV)
    # A row without keys has weights of zero whatever is subtracted, if only it is finite.
    lse = tl.maximum(tl.load(LSE + own_head * L + rows, mask=valid, other=0.0), LOWEST)
    delta = tl.load(DELTA + own_head * L + rows, mask=valid, other=0.0)
    row_segment = row
    if HAS_SEGMENT:
        K_SEGMENT += batch * S
    if HAS_ROW_SEGMENT:
        row_segment = tl.load(Q_SEGMENT + batch * L + rows, mask=valid, other=-1)
    dq = tl.zeros((BLOCK_Q, BLOCK_E), ACC)
    for step in tl.range(0, masked + full_up - full_low):
        block = row_block(
            step, masked, full_low, full_up, low, before, beside, early, sink_low, late_low, BLOCKS, TABLE, SINKS
        )  # fmt: skip
        first, within = key_place(block * BLOCK_K, key, first_key, STEP, RUN, GATHERED, WIDE)
        present = precede(first, within, S)
        k = load_rows(K, first, within, stride_ks, column, present, E, EVEN_E)
        v = load_rows(V, first, within, stride_vs, value_column, present, EV, EVEN_EV)
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
        # No weight exceeds 1, but a score of 1e10 may come out above its log-sum-exp by rounding.
        weights = tl.exp2(tl.minimum(scores - lse[:, None], 0.0))
        d_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        if DROPOUT:
            alive = survives(SEED, rows[:, None], (first + within)[None, :], own_head, THRESHOLD)
            d_weights = tl.where(alive, d_weights * KEPT_SCALE, 0.0)
        d_scores = weights * (d_weights - delta[:, None])
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
    dq *= OUT_SCALE
    if TABLE and slot >= 0:
        own_slot = (own_head * NUM_SLOTS + slot) * BLOCK_Q
        store_rows(SLOT_DQ + own_slot * E, 0, row, E, column, valid, E, dq)
        return
    if RESUME:
        dq += load_rows(DQ, first_row, row_within, E, column, valid, E, EVEN_E)
    store_rows(DQ, first_row, row_within, E, column, valid, E, dq)


@triton.jit(do_not_specialize=CHANGING)
def dkdv_kernel(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, Q_SEGMENT, K_SEGMENT, ANCHOR, ROWS, OFFSET,
    ITEMS, BLOCKS, PATTERN, PATTERNS, SLOT_DK, SLOT_DV,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gl,
    KV_HEADS, GROUP, L, S, E, EV, PROGRAMS, PER_RESIDUE, NUM_SLOTS,
    BACK, AHEAD, STEP, RUN, KEY_START, SCALE, OUT_SCALE, SEED, THRESHOLD, KEPT_SCALE,
    TABLE: tl.constexpr, GATHERED: tl.constexpr, WIDE: tl.constexpr, RESUME: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_ANCHOR: tl.constexpr, HAS_SEGMENT: tl.constexpr, HAS_ROW_SEGMENT: tl.constexpr,
    OFFSET_ON_DEVICE: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    EVEN_E: tl.constexpr, EVEN_EV: tl.constexpr,
):  # fmt: skip
    """DK (B, Hkv, S, E) and DV (B, Hkv, S, EV) of one block of keys, over the heads that share it, in order."""
    program, batch, kv_head = outer_indices(PROGRAMS, KV_HEADS, ROWS, HAS_ROWS)
    offset = load_offset(OFFSET, OFFSET_ON_DEVICE)
    anchor = offset * 0
    if HAS_ANCHOR:
        anchor = tl.load(ANCHOR + batch)
    number, first_key, first_row, row_step, start, slot, masked, full_low, full_up, low, before = key_walk(
        program,
        offset,
        anchor,
        ITEMS,
        L,
        S,
        PER_RESIDUE,
        BACK,
        AHEAD,
        STEP,
        KEY_START,
        TABLE,
        BLOCK_Q,
        BLOCK_K,
    )
    row, key = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    column, value_column = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_EV)
    first_index, within = key_place(number, key, first_key, STEP, RUN, GATHERED, WIDE)
    present = precede(first_index, within, S)
    row_within = spread(row, row_step, WIDE)
    own_head = batch * KV_HEADS + kv_head
    K += batch * stride_kb + kv_head * stride_kh
    V += batch * stride_vb + kv_head * stride_vh
    k = load_rows(K, first_index, within, stride_ks, column, present, E, EVEN_E)
    v = load_rows(V, first_index, within, stride_vs, value_column, present, EV, EVEN_EV)
    key_segment = key
    if HAS_SEGMENT:
        key_segment = tl.load(K_SEGMENT + batch * S + first_index + within, mask=present, other=-1)
    if HAS_ROW_SEGMENT:
        Q_SEGMENT += batch * L
    dk = tl.zeros((BLOCK_K, BLOCK_E), ACC)
    dv = tl.zeros((BLOCK_K, BLOCK_EV), ACC)
    steps = masked + full_up - full_low
    for turn in tl.range(0, steps * GROUP):
        step = turn % steps
        head = kv_head * GROUP + turn // steps
        head_number = batch * KV_HEADS * GROUP + head
        block = key_block(step, masked, full_low, full_up, low, before, BLOCKS, TABLE)
        first = first_row + tl.cast(block, tl.int64) * BLOCK_Q * row_step
        valid = precede(first, row_within, L)
        if TABLE:
            # Which rows of a table's block exist depends on the anchor.
            valid &= first + row_within >= 0
        Q_HEAD, GRAD_HEAD = (
            Q + batch * stride_qb + head * stride_qh,
            GRAD + batch * stride_gb + head * stride_gh,
        )
        q = load_rows(Q_HEAD, first, row_within, stride_ql, column, valid, E, EVEN_E)
        grad = load_rows(GRAD_HEAD, first, row_within, stride_gl, value_column, valid, EV, EVEN_EV)
        # Rows that are not there weigh nothing: 2^-inf.
        lse = tl.maximum(
            tl.load(LSE + (head_number * L + first) + row_within, mask=valid, other=float("inf")), LOWEST
        )
        delta = tl.load(DELTA + (head_number * L + first) + row_within, mask=valid, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * SCALE
        if step < masked:
            seen = key_pairs(
                step, block, number, start, low, PATTERN, PATTERNS, BACK, AHEAD, TABLE, BLOCK_Q, BLOCK_K
            )
            scores = tl.where(seen, scores, float("-inf"))
        if HAS_SEGMENT:
            row_segment = row_within
            if HAS_ROW_SEGMENT:
                row_segment = tl.load(Q_SEGMENT + first + row_within, mask=valid, other=-1)
            same = same_segment(row_segment[None, :], key_segment[:, None], HAS_ROW_SEGMENT)
            scores = tl.where(same, scores, float("-inf"))
        weights = tl.exp2(tl.minimum(scores - lse[None, :], 0.0))
        d_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION, out_dtype=ACC)
        kept = weights
        if DROPOUT:
            alive = survives(
                SEED, (first + row_within)[None, :], (first_index + within)[:, None], head_number, THRESHOLD
            )
            kept = tl.where(alive, weights * KEPT_SCALE, 0.0)
            d_weights = tl.where(alive, d_weights * KEPT_SCALE, 0.0)
        dv = tl.dot(kept.to(grad.dtype), grad, dv, input_precision=PRECISION, out_dtype=ACC)
        d_scores = weights * (d_weights - delta[None, :])
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
    dk *= OUT_SCALE
    if TABLE and slot >= 0:
        own_slot = (own_head * NUM_SLOTS + slot) * BLOCK_K
        store_rows(SLOT_DK + own_slot * E, 0, key, E, column, present, E, dk)
        store_rows(SLOT_DV + own_slot * EV, 0, key, EV, value_column, present, EV, dv)
        return
    DK += own_head * S * E
    DV += own_head * S * EV
    if RESUME:
        dk += load_rows(DK, first_index, within, E, column, present, E, EVEN_E)
        dv += load_rows(DV, first_index, within, EV, value_column, present, EV, EVEN_EV)
    store_rows(DK, first_index, within, E, column, present, E, dk)
    store_rows(DV, first_index, within, EV, value_column, present, EV, dv)
