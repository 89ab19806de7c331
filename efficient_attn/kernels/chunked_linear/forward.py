"""The outputs of each span, chunk by chunk, from the state before it."""

# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

from .features import features, numbers
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
def load_state(states, feature, column, EV: tl.constexpr, M: tl.constexpr):
    """The columns `feature` of a state: (kv, z)."""
    kv = load_rows(states, column, feature, M, EV, M)
    return kv, tl.load(states + EV * M + feature, mask=feature < M, other=0.0)


@triton.jit
def hide(
    pairs,
    position,
    own,
    peak,
    segment,
    STRICT: tl.constexpr,
    HAS_EXPONENT: tl.constexpr,
    HAS_SEGMENT: tl.constexpr,
):
    """pairs (keys, rows) with the keys' weights, zero where the key comes after the row or in another segment.

    If STRICT, a row does not see the key at its own position either.
    """
    if STRICT:
        seen = position[:, None] < position[None, :]
    else:
        seen = position[:, None] <= position[None, :]
    if HAS_SEGMENT:
        seen = seen & (segment[:, None] == segment[None, :])
    if HAS_EXPONENT:
        return pairs * weight(own[:, None] - peak[None, :], seen)
    else:
        return tl.where(seen, pairs, 0.0)


@triton.jit(do_not_specialize=["offset"])
def rows_kernel(
    q,
    k,
    v,
    valid,
    segment,
    row_shift,
    shift,
    exponent,
    peak,
    projection,
    states,
    part,
    part_total,
    out,
    lost,
    total,
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
    """out, what rounding took from it (if `lost` is given) and each row's total weight, or infinity.

    Of the features, the launch takes NUM_BLOCKS blocks from `first_feature` on; launches that do not END leave their
    sums in `part` and `total`; those that do not BEGIN add to what is in `part` and `part_total`.
    """
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
    out += at_rows * EV
    total += at_rows
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)

    states += (kv_head.to(tl.int64) * slots + slot) * (M * (EV + 1))
    before = ()
    for block in tl.static_range(NUM_BLOCKS):
        feature = first_feature + block * BLOCK_M + tl.arange(0, BLOCK_M)
        before += (load_state(states, feature, column, EV, M),)

    stop = tl.minimum(base + span, offset + length)
    for start in range(base, stop, CHUNK):
        position = start + tl.arange(0, CHUNK)
        rows = position - offset
        inside = (rows >= 0) & (rows < length)
        row_moved = tl.zeros((CHUNK,), tl.float32)
        if exponent is not None:
            row_moved = load_numbers(row_shift, rows, length, 0.0)
        own = row_moved
        row_peak = row_moved
        own_segment = rows
        old_factor = 1.0
        if IS_CAUSAL:
            alive, own = keys_alive(valid, exponent, position, num_keys)
            moved = own
            value = as_given(load_rows(v, position, column, v_row, num_keys, EV), PRECISION)
            key_weight = alive
            row_weight = inside
            if HAS_SEGMENT:
                own_segment = load_nearest(segment, position, num_keys)
                old, current = (
                    load_nearest(segment, start - 1, num_keys),
                    load_nearest(segment, start + CHUNK - 1, num_keys),
                )
                row_weight = own_segment == old
                key_weight = alive & (own_segment == current)
                old_factor = tl.where(old == current, 1.0, 0.0)
            if HAS_EXPONENT:
                moved = load_numbers(shift, position, num_keys, 0.0)
                row_peak = load_nearest(peak, position, num_keys)
                old_unit, unit = (
                    load_nearest(peak, start - 1, num_keys),
                    load_nearest(peak, start + CHUNK - 1, num_keys),
                )
                row_factor = weight(old_unit - row_peak, row_weight)
                key_factor = weight(own - unit, key_weight)
                old_factor *= tl.exp2(tl.minimum(old_unit - unit, 0.0))
            elif HAS_SEGMENT:
                row_factor = tl.where(row_weight, 1.0, 0.0)
                key_factor = tl.where(key_weight, 1.0, 0.0)

        sums = tl.zeros((BLOCK_V, CHUNK), tl.float32)
        weights = tl.zeros((CHUNK,), tl.float32)
        pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
        after = ()
        for block in tl.static_range(NUM_BLOCKS):
            kv, z = before[block]
            feature = first_feature + block * BLOCK_M + tl.arange(0, BLOCK_M)
            x = numbers(q, rows, q_row, length, projection, feature, scale, FEATURE, E, M, BLOCK_X, PRECISION)
            phi = features(x, row_moved, inside, feature, FEATURE, M)
            phi_q = operand(phi, PRECISION)
            sums = product_split(kv, tl.trans(phi_q), sums, PRECISION)
            weights += tl.sum(phi_q.to(tl.float32) * z[None, :], 1)
            if IS_CAUSAL:
                y = numbers(
                    k, position, k_row, num_keys, projection, feature, 1.0, FEATURE, E, M, BLOCK_X, PRECISION
                )
                phi = features(y, moved, alive, feature, FEATURE, M)
                phi_k = operand(phi, PRECISION)
                pairs = product(phi_k, tl.trans(phi_q), pairs, PRECISION)
                if HAS_EXPONENT or HAS_SEGMENT:
                    phi_k = operand(phi * key_factor[:, None], PRECISION)
                    kv *= old_factor
                    z *= old_factor
                kv = product(tl.trans(value), phi_k, kv, PRECISION)
                z += tl.sum(phi_k.to(tl.float32), 0)
            after += ((kv, z),)
        before = after
        if HAS_EXPONENT or HAS_SEGMENT:
            sums *= row_factor[None, :]
            weights *= row_factor
        if IS_CAUSAL:
            pairs = hide(pairs, position, own, row_peak, own_segment, STRICT, HAS_EXPONENT, HAS_SEGMENT)
            seen = operand(pairs, PRECISION)
            sums = product(tl.trans(value), seen, sums, PRECISION)
            weights += tl.sum(seen.to(tl.float32), 0)

        if not BEGIN:
            sums += tl.trans(load_rows(part + at_rows * EV, rows, column, EV, length, EV))
            weights += load_numbers(part_total + at_rows, rows, length, 0.0)
        if END:
            weights = tl.where(weights < 2.0**-100, float("inf"), weights)
            exact = tl.trans(sums / weights[None, :])
            rounded = exact.to(out.dtype.element_ty)
            store_rows(out, rows, column, EV, length, EV, rounded)
            if lost is not None:
                store_rows(lost + at_rows * EV, rows, column, EV, length, EV, exact - rounded.to(tl.float32))
        else:
            store_rows(part + at_rows * EV, rows, column, EV, length, EV, tl.trans(sums))
        if tl.program_id(1) == 0:
            tl.store(total + rows, weights, mask=inside)
