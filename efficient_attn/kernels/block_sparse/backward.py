"""The backward pass: weights recomputed from the log-sum-exp, dQ by blocks of rows, dK and dV by blocks of keys."""

# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

from .steps import LOWEST, key_index, load_offset, load_rows, same_segment, store_rows, survives
from .walks import key_block, key_walk, outer_indices, row_block, row_walk


@triton.jit
def delta_kernel(
    GRAD, OUT, DELTA, stride_gb, stride_gh, stride_gl, H, L, EV, PROGRAMS,
    ACC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """DELTA (B, H, L) = the sum of grad * out over the columns."""
    head = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    rows = (tl.program_id(0) % PROGRAMS).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column, valid = tl.arange(0, BLOCK_EV), rows < L
    GRAD += head // H * stride_gb + head % H * stride_gh
    grad = load_rows(GRAD, rows, stride_gl, column, valid, EV, True, False).to(ACC)
    out = load_rows(OUT + head * L * EV, rows, EV, column, valid, EV, True, False).to(ACC)
    tl.store(DELTA + head * L + rows, tl.sum(grad * out, 1), mask=valid)


@triton.jit
def _pull_rows(
    dq, q, grad, lse, delta, rows, row_segment, index, seen, K, V, K_SEGMENT, stride_k, stride_v, column, value_column,
    S, E, EV, scale, head, seed, threshold, kept_scale,
    MASKED: tl.constexpr, HAS_SEGMENT: tl.constexpr, HAS_ROW_SEGMENT: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN_E: tl.constexpr, EVEN_EV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys `index` into the gradient of every row's query, but for the scale of the scores."""
    BOUNDED: tl.constexpr = MASKED or HAS_SEGMENT
    present = index < S
    k = load_rows(K, index, stride_k, column, present, E, BOUNDED, EVEN_E)
    v = load_rows(V, index, stride_v, value_column, present, EV, BOUNDED, EVEN_EV)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=dq.dtype) * scale
    if MASKED:
        scores = tl.where(seen & present[None, :], scores, float("-inf"))
    if HAS_SEGMENT:
        key_segment = tl.load(K_SEGMENT + index, mask=present, other=-1)
        same = same_segment(row_segment[:, None], key_segment[None, :], HAS_ROW_SEGMENT)
        scores = tl.where(same, scores, float("-inf"))
    weights = tl.exp2(scores - lse[:, None])
    d_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION, out_dtype=dq.dtype)
    if DROPOUT:
        alive = survives(seed, rows[:, None], index[None, :], head, threshold)
        d_weights = tl.where(alive, d_weights * kept_scale, 0.0)
    d_scores = weights * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)


@triton.jit(do_not_specialize=["OFFSET", "SEED", "THRESHOLD", "BACK", "AHEAD", "NUM_SINKS", "SINKS_AHEAD", "KEY_START"])
def dq_kernel(
    Q, K, V, GRAD, LSE, DELTA, DQ, Q_SEGMENT, K_SEGMENT, ANCHOR, ROWS, OFFSET,
    ITEMS, BLOCKS, PATTERN, PATTERNS, SLOT_DQ,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gl,
    H, GROUP, L, S, E, EV, PROGRAMS, PER_RESIDUE, NUM_SLOTS,
    BACK, AHEAD, NUM_SINKS, SINKS_AHEAD, STEP, RUN, KEY_START, SCALE, OUT_SCALE, SEED, THRESHOLD, KEPT_SCALE,
    TABLE: tl.constexpr, GATHERED: tl.constexpr, SINKS: tl.constexpr, RESUME: tl.constexpr,
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
    if (first_row >= L) | (first_row + (BLOCK_Q - 1) * row_step < 0):
        return
    row, key = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    column, value_column = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_EV)
    rows = first_row + row.to(tl.int64) * row_step
    valid = (rows >= 0) & (rows < L)
    own_head = batch * H + head
    DQ += own_head * L * E
    K += batch * stride_kb + (head // GROUP) * stride_kh
    V += batch * stride_vb + (head // GROUP) * stride_vh
    q = load_rows(Q + batch * stride_qb + head * stride_qh, rows, stride_ql, column, valid, E, True, EVEN_E)
    grad = load_rows(
        GRAD + batch * stride_gb + head * stride_gh, rows, stride_gl, value_column, valid, EV, True, EVEN_EV
    )
    # A row without keys has weights of zero whatever is subtracted, if only it is finite.
    lse = tl.maximum(tl.load(LSE + own_head * L + rows, mask=valid, other=0.0), LOWEST)
    delta = tl.load(DELTA + own_head * L + rows, mask=valid, other=0.0)
    row_segment = row
    if HAS_SEGMENT:
        K_SEGMENT += batch * S
    if HAS_ROW_SEGMENT:
        row_segment = tl.load(Q_SEGMENT + batch * L + rows, mask=valid, other=-1)
    dq = tl.zeros((BLOCK_Q, BLOCK_E), ACC)
    for step in tl.range(0, masked):
        block, seen = row_block(
            step, position, anchor, full_up, low, before, beside, early, sink_low, late_low, BLOCKS, PATTERN, PATTERNS,
            BACK, AHEAD, NUM_SINKS, SINKS_AHEAD, TABLE, SINKS, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        index = key_index(block * BLOCK_K + key, first_key, STEP, RUN, GATHERED)
        dq = _pull_rows(
            dq, q, grad, lse, delta, rows, row_segment, index, seen, K, V, K_SEGMENT, stride_ks, stride_vs,
            column, value_column, S, E, EV, SCALE, own_head, SEED, THRESHOLD, KEPT_SCALE,
            True, HAS_SEGMENT, HAS_ROW_SEGMENT, DROPOUT, EVEN_E, EVEN_EV, PRECISION,
        )  # fmt: skip
    for step in tl.range(full_low, full_up):
        block = step
        if TABLE:
            block = tl.load(BLOCKS + step)
        index = key_index(block * BLOCK_K + key, first_key, STEP, RUN, GATHERED)
        dq = _pull_rows(
            dq, q, grad, lse, delta, rows, row_segment, index, True, K, V, K_SEGMENT, stride_ks, stride_vs,
            column, value_column, S, E, EV, SCALE, own_head, SEED, THRESHOLD, KEPT_SCALE,
            False, HAS_SEGMENT, HAS_ROW_SEGMENT, DROPOUT, EVEN_E, EVEN_EV, PRECISION,
        )  # fmt: skip
    dq *= OUT_SCALE
    if TABLE:
        if slot >= 0:
            own_slot = (own_head * NUM_SLOTS + slot) * BLOCK_Q
            store_rows(SLOT_DQ + own_slot * E, row, E, column, row >= 0, E, dq)
            return
    if RESUME:
        dq += load_rows(DQ, rows, E, column, valid, E, True, EVEN_E)
    store_rows(DQ, rows, E, column, valid, E, dq)


@triton.jit
def _pull_keys(
    dk, dv, k, v, index, key_segment, rows, seen, Q, GRAD, LSE, DELTA, Q_SEGMENT, stride_q, stride_g,
    column, value_column, L, E, EV, scale, head, seed, threshold, kept_scale,
    BOUNDED: tl.constexpr, MASKED: tl.constexpr, HAS_SEGMENT: tl.constexpr, HAS_ROW_SEGMENT: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_E: tl.constexpr, EVEN_EV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows `rows` into the gradients of every key and value, but for the scale; tiles are (keys, rows)."""
    valid = (rows >= 0) & (rows < L)
    q = load_rows(Q, rows, stride_q, column, valid, E, BOUNDED, EVEN_E)
    grad = load_rows(GRAD, rows, stride_g, value_column, valid, EV, BOUNDED, EVEN_EV)
    # Rows that are not there weigh nothing: 2^-inf.
    lse = tl.maximum(tl.load(LSE + rows, mask=valid, other=float("inf")), LOWEST)
    delta = tl.load(DELTA + rows, mask=valid, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=dk.dtype) * scale
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    if HAS_SEGMENT:
        row_segment = rows
        if HAS_ROW_SEGMENT:
            row_segment = tl.load(Q_SEGMENT + rows, mask=valid, other=-1)
        same = same_segment(row_segment[None, :], key_segment[:, None], HAS_ROW_SEGMENT)
        scores = tl.where(same, scores, float("-inf"))
    weights = tl.exp2(scores - lse[None, :])
    d_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION, out_dtype=dk.dtype)
    kept = weights
    if DROPOUT:
        alive = survives(seed, rows[None, :], index[:, None], head, threshold)
        kept = tl.where(alive, weights * kept_scale, 0.0)
        d_weights = tl.where(alive, d_weights * kept_scale, 0.0)
    dv = tl.dot(kept.to(grad.dtype), grad, dv, input_precision=PRECISION, out_dtype=dk.dtype)
    d_scores = weights * (d_weights - delta[None, :])
    dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)
    return dk, dv


@triton.jit(do_not_specialize=["OFFSET", "SEED", "THRESHOLD", "BACK", "AHEAD", "KEY_START"])
def dkdv_kernel(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, Q_SEGMENT, K_SEGMENT, ANCHOR, ROWS, OFFSET,
    ITEMS, BLOCKS, PATTERN, PATTERNS, SLOT_DK, SLOT_DV,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gl,
    KV_HEADS, GROUP, L, S, E, EV, PROGRAMS, PER_RESIDUE, NUM_SLOTS,
    BACK, AHEAD, STEP, RUN, KEY_START, SCALE, OUT_SCALE, SEED, THRESHOLD, KEPT_SCALE,
    TABLE: tl.constexpr, GATHERED: tl.constexpr, RESUME: tl.constexpr,
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
        program, offset, anchor, ITEMS, L, S, PER_RESIDUE, BACK, AHEAD, STEP, KEY_START, TABLE, BLOCK_Q, BLOCK_K
    )
    row, key = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    column, value_column = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_EV)
    index = key_index(number + key, first_key, STEP, RUN, GATHERED)
    present = index < S
    own_head = batch * KV_HEADS + kv_head
    k = load_rows(K + batch * stride_kb + kv_head * stride_kh, index, stride_ks, column, present, E, True, EVEN_E)
    v = load_rows(V + batch * stride_vb + kv_head * stride_vh, index, stride_vs, value_column, present, EV, True, EVEN_EV)
    key_segment = key
    if HAS_SEGMENT:
        key_segment = tl.load(K_SEGMENT + batch * S + index, mask=present, other=-1)
    if HAS_ROW_SEGMENT:
        Q_SEGMENT += batch * L
    dk = tl.zeros((BLOCK_K, BLOCK_E), ACC)
    dv = tl.zeros((BLOCK_K, BLOCK_EV), ACC)
    for shared in tl.range(0, GROUP):
        head = kv_head * GROUP + shared
        head_number = batch * KV_HEADS * GROUP + head
        Q_HEAD, GRAD_HEAD = Q + batch * stride_qb + head * stride_qh, GRAD + batch * stride_gb + head * stride_gh
        LSE_HEAD, DELTA_HEAD = LSE + head_number * L, DELTA + head_number * L
        for step in tl.range(0, masked):
            block, seen = key_block(
                step, number, start, full_up, low, before, BLOCKS, PATTERN, PATTERNS, BACK, AHEAD,
                TABLE, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
            rows = first_row + (block * BLOCK_Q + row).to(tl.int64) * row_step
            dk, dv = _pull_keys(
                dk, dv, k, v, index, key_segment, rows, seen, Q_HEAD, GRAD_HEAD, LSE_HEAD, DELTA_HEAD, Q_SEGMENT,
                stride_ql, stride_gl, column, value_column, L, E, EV, SCALE, head_number, SEED, THRESHOLD, KEPT_SCALE,
                True, True, HAS_SEGMENT, HAS_ROW_SEGMENT, DROPOUT, EVEN_E, EVEN_EV, PRECISION,
            )  # fmt: skip
        for step in tl.range(full_low, full_up):
            block = step
            if TABLE:
                block = tl.load(BLOCKS + step)
            rows = first_row + (block * BLOCK_Q + row).to(tl.int64) * row_step
            # Which rows of a table's block exist depends on the anchor.
            dk, dv = _pull_keys(
                dk, dv, k, v, index, key_segment, rows, True, Q_HEAD, GRAD_HEAD, LSE_HEAD, DELTA_HEAD, Q_SEGMENT,
                stride_ql, stride_gl, column, value_column, L, E, EV, SCALE, head_number, SEED, THRESHOLD, KEPT_SCALE,
                TABLE, False, HAS_SEGMENT, HAS_ROW_SEGMENT, DROPOUT, EVEN_E, EVEN_EV, PRECISION,
            )  # fmt: skip
    dk *= OUT_SCALE
    if TABLE:
        if slot >= 0:
            own_slot = (own_head * NUM_SLOTS + slot) * BLOCK_K
            store_rows(SLOT_DK + own_slot * E, key, E, column, key >= 0, E, dk)
            store_rows(SLOT_DV + own_slot * EV, key, EV, value_column, key >= 0, EV, dv)
            return
    DK += own_head * S * E
    DV += own_head * S * EV
    if RESUME:
        dk += load_rows(DK, index, E, column, present, E, True, EVEN_E)
        dv += load_rows(DV, index, EV, value_column, present, EV, True, EVEN_EV)
    store_rows(DK, index, E, column, present, E, dk)
    store_rows(DV, index, EV, value_column, present, EV, dv)
