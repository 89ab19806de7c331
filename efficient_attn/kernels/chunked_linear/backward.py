"""The gradients: of queries by a walk in the forward's direction, of keys and values by one in the other direction.

With w_i = -grad_i . out_i, which is `delta`, and r_i the reciprocal of a row's total weight,

    d phi(q_i) = r_i sum_j (grad_i . v_j + w_i) phi(k_j)        dv_j = sum_i (r_i phi(q_i) . phi(k_j)) grad_i
    d phi(k_j) = sum_i (grad_i . v_j + w_i) r_i phi(q_i)

over pairs that see each other, each with its power of two. Inside a chunk grad_i . v_j + w_i is added in fp32, so that
what the two have in common cancels before anything is rounded.
"""

# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

from .features import features, numbers, pulled_back, through_projection
from .forward import hide, load_state
from .products import (
    as_given,
    load_nearest,
    load_numbers,
    load_rows,
    operand,
    product,
    product_split,
    store_rows,
)
from .states import first_position, keys_alive, load_offset, weight


@triton.jit
def delta_kernel(
    grad,
    out,
    lost,
    delta,
    g_batch,
    g_head,
    g_row,
    heads,
    length,
    blocks,
    EV: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """delta_i = -grad_i . out_i, the output as it was before rounding."""
    program = tl.program_id(0)
    batch_head = program // blocks
    batch, head = batch_head // heads, batch_head % heads
    rows, column = program % blocks * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BLOCK_V)
    at = batch_head.to(tl.int64) * length
    grad += batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head
    g = load_rows(grad, rows, column, g_row, length, EV).to(tl.float32)
    exact = load_rows(out + at * EV, rows, column, EV, length, EV).to(tl.float32)
    if lost is not None:
        exact += load_rows(lost + at * EV, rows, column, EV, length, EV).to(tl.float32)
    tl.store(delta + at + rows, -tl.sum(g * exact, 1), mask=rows < length)


@triton.jit
def finish(
    part,
    gradient,
    values,
    rows,
    length,
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
):
    """Store scale times the values, which several launches add up in `part`."""
    column = tl.arange(0, BLOCK)
    if not BEGIN:
        values += load_rows(part, rows, column, WIDTH, length, WIDTH)
    if END:
        store_rows(gradient, rows, column, WIDTH, length, WIDTH, values * scale)
    else:
        store_rows(part, rows, column, WIDTH, length, WIDTH, values)


@triton.jit(do_not_specialize=["offset"])
def row_gradients_kernel(
    q,
    k,
    v,
    grad,
    total,
    delta,
    valid,
    segment,
    row_shift,
    shift,
    exponent,
    peak,
    projection,
    states,
    part,
    dq,
    offset,
    scale,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    g_batch,
    g_head,
    g_row,
    heads,
    length,
    num_keys,
    span,
    spans,
    slots,
    first_feature,
    GROUPS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    STRICT: tl.constexpr,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    FEATURE: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dq of the rows of each span; the walk is that of `rows_kernel`."""
    program = tl.program_id(0)
    batch_head, number = program // spans, program % spans
    batch, head = batch_head // heads, batch_head % heads
    kv_head = batch_head // GROUPS
    offset = load_offset(offset, length, num_keys if IS_CAUSAL else (slots - 1) * span)
    base = first_position(offset, span) + number * span
    slot = tl.minimum(tl.maximum(base // span, 0), slots - 1)
    HAS_EXPONENT: tl.constexpr = IS_CAUSAL and exponent is not None
    HAS_SEGMENT: tl.constexpr = IS_CAUSAL and segment is not None

    q += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    grad += batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head
    k += batch.to(tl.int64) * k_batch + (head // GROUPS).to(tl.int64) * k_head
    v += batch.to(tl.int64) * v_batch + (head // GROUPS).to(tl.int64) * v_head
    at_rows, at_keys = batch_head.to(tl.int64) * length, kv_head.to(tl.int64) * num_keys
    if exponent is not None:
        row_shift += at_rows
        shift += at_keys
        exponent += at_keys
        peak += at_keys
    if valid is not None:
        valid += batch.to(tl.int64) * num_keys
    if segment is not None:
        segment += batch.to(tl.int64) * num_keys
    if part is not None:
        part += at_rows * E
    column = tl.arange(0, BLOCK_V)

    states += (kv_head.to(tl.int64) * slots + slot) * (M * (EV + 1))
    before = ()
    for block in tl.static_range(NUM_BLOCKS):
        feature = first_feature + block * BLOCK_M + tl.arange(0, BLOCK_M)
        turned, first_z = load_state(states, feature, column, EV, M)
        before += ((tl.trans(turned), first_z),)

    stop = tl.minimum(base + span, offset + length)
    for start in range(base, stop, CHUNK):
        position = start + tl.arange(0, CHUNK)
        rows = position - offset
        inside = (rows >= 0) & (rows < length)
        gradient = as_given(load_rows(grad, rows, column, g_row, length, EV), PRECISION)
        w = load_numbers(delta + at_rows, rows, length, 0.0)
        share = 1.0 / load_numbers(total + at_rows, rows, length, float("inf"))
        row_moved = tl.zeros((CHUNK,), tl.float32)
        if exponent is not None:
            row_moved = load_numbers(row_shift, rows, length, 0.0)
        row_factor = share
        old_factor = 1.0
        if IS_CAUSAL:
            alive, own = keys_alive(valid, exponent, position, num_keys)
            moved = own
            row_peak = own
            own_segment = position
            value = as_given(load_rows(v, position, column, v_row, num_keys, EV), PRECISION)
            key_weight = alive
            if HAS_SEGMENT:
                own_segment = load_nearest(segment, position, num_keys)
                old = load_nearest(segment, start - 1, num_keys)
                current = load_nearest(segment, start + CHUNK - 1, num_keys)
                row_factor = tl.where(own_segment == old, row_factor, 0.0)
                key_weight = alive & (own_segment == current)
                old_factor = tl.where(old == current, 1.0, 0.0)
            if HAS_EXPONENT:
                moved = load_numbers(shift, position, num_keys, 0.0)
                row_peak = load_nearest(peak, position, num_keys)
                old_unit = load_nearest(peak, start - 1, num_keys)
                unit = load_nearest(peak, start + CHUNK - 1, num_keys)
                row_factor *= weight(old_unit - row_peak, inside)
                old_factor *= tl.exp2(tl.minimum(old_unit - unit, 0.0))
            if HAS_EXPONENT or HAS_SEGMENT:
                key_factor = (
                    weight(own - unit, key_weight) if HAS_EXPONENT else tl.where(key_weight, 1.0, 0.0)
                )
            pairs = tl.zeros((CHUNK, CHUNK), tl.float32) + w[None, :]
            pairs = product(value, tl.trans(gradient), pairs, PRECISION)
            pairs = hide(pairs, position, own, row_peak, own_segment, STRICT, HAS_EXPONENT, HAS_SEGMENT)
            seen = operand(pairs * share[None, :], PRECISION)

        projected = tl.zeros((CHUNK, BLOCK_X), tl.float32)
        after = ()
        for block in tl.static_range(NUM_BLOCKS):
            kv, z = before[block]
            feature = first_feature + block * BLOCK_M + tl.arange(0, BLOCK_M)
            d = product_split(kv, tl.trans(gradient), tl.zeros((BLOCK_M, CHUNK), tl.float32), PRECISION)
            d = (d + z[:, None] * w[None, :]) * row_factor[None, :]
            if IS_CAUSAL:
                y = numbers(
                    k, position, k_row, num_keys, projection, feature, 1.0, FEATURE, E, M, BLOCK_X, PRECISION
                )
                phi = features(y, moved, alive, feature, FEATURE, M)
                phi_k = operand(phi, PRECISION)
                d = product(tl.trans(phi_k), seen, d, PRECISION)
                if HAS_EXPONENT or HAS_SEGMENT:
                    phi_k = operand(phi * key_factor[:, None], PRECISION)
                    kv *= old_factor
                    z *= old_factor
                kv = product(tl.trans(phi_k), value, kv, PRECISION)
                z += tl.sum(phi_k.to(tl.float32), 0)
            after += ((kv, z),)
            x = numbers(q, rows, q_row, length, projection, feature, scale, FEATURE, E, M, BLOCK_X, PRECISION)
            phi = features(x, row_moved, None, feature, FEATURE, M)
            h = pulled_back(x, phi, tl.trans(d), row_moved, FEATURE)
            if FEATURE == "favor_softmax" or FEATURE == "favor_relu":
                # What |x|^2 adds is nothing: a row's outputs do not depend on the scale of its features.
                projected = through_projection(
                    projected, h, projection, feature, FEATURE, E, M, BLOCK_X, PRECISION
                )
            else:
                store_rows(dq + at_rows * E, rows, feature, E, length, E, h * scale)
        before = after
        if FEATURE == "favor_softmax" or FEATURE == "favor_relu":
            finish(part, dq + at_rows * E, projected, rows, length, scale, E, BLOCK_X, BEGIN, END)
