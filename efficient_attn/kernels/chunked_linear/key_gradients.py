"""The gradients of keys and values: a walk from the last chunk back; see backward.py for the equations."""

# pyright: basic, reportGeneralTypeIssues=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from .backward import finish
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


@triton.jit(do_not_specialize=["offset"])
def key_gradients_kernel(
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
    part_v,
    dk,
    dv,
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
    kv_heads,
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
    """dk and dv of the keys of each span, from the last chunk back; the state holds the later rows of the group."""
    program = tl.program_id(0)
    batch_head, number = program // spans, program % spans
    batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
    base = number * span
    slot = 0
    stop = tl.minimum(base + span, num_keys)
    if IS_CAUSAL:
        offset = load_offset(offset, length, num_keys)
        after_span = (base - first_position(offset, span)) // span + 1
        slot = tl.minimum(tl.maximum(after_span, 0), slots - 1)
        # Rows after the last key, if they share its span, come first.
        stop = tl.minimum(base + span, tl.maximum(num_keys, offset + length))
    HAS_EXPONENT: tl.constexpr = IS_CAUSAL and exponent is not None
    HAS_SEGMENT: tl.constexpr = IS_CAUSAL and segment is not None

    at_keys = batch_head.to(tl.int64) * num_keys
    k += batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    v += batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    q += batch.to(tl.int64) * q_batch
    grad += batch.to(tl.int64) * g_batch
    if exponent is not None:
        shift += at_keys
        exponent += at_keys
        peak += at_keys
    if valid is not None:
        valid += batch.to(tl.int64) * num_keys
    if segment is not None:
        segment += batch.to(tl.int64) * num_keys
    if part is not None:
        part += at_keys * E
    if part_v is not None:
        part_v += at_keys * EV
    column = tl.arange(0, BLOCK_V)
    chunks = (stop - base + CHUNK - 1) // CHUNK
    if HAS_EXPONENT:
        # The first rows may be spans away, where the unit of their sum is that of their own position.
        there = first_position(offset, span) + slot * span
        here = load_nearest(peak, base + chunks * CHUNK, num_keys)
        nearer = tl.exp2(tl.minimum(here - load_nearest(peak, there, num_keys), 0.0))

    states += (batch_head.to(tl.int64) * slots + slot) * (M * (EV + 1))
    later = ()
    for block in tl.static_range(NUM_BLOCKS):
        feature = first_feature + block * BLOCK_M + tl.arange(0, BLOCK_M)
        first_kv, first_z = load_state(states, feature, column, EV, M)
        if HAS_EXPONENT:
            first_kv *= nearer
            first_z *= nearer
        later += ((first_kv, first_z),)

    for step in range(chunks):
        start = base + (chunks - 1 - step) * CHUNK
        position = start + tl.arange(0, CHUNK)
        alive, own = keys_alive(valid, exponent, position, num_keys)
        value = as_given(load_rows(v, position, column, v_row, num_keys, EV), PRECISION)
        moved = own
        row_peak = own
        own_segment = position
        row_weight = position >= 0
        key_factor = tl.where(alive, 1.0, 0.0)
        old_factor = 1.0
        if exponent is not None:
            moved = load_numbers(shift, position, num_keys, 0.0)
            old_unit = load_nearest(peak, start + CHUNK, num_keys)
            key_factor = weight(own - old_unit, alive)
        if HAS_SEGMENT:
            own_segment = load_nearest(segment, position, num_keys)
            old = load_nearest(segment, start + CHUNK, num_keys)
            current = load_nearest(segment, start, num_keys)
            row_weight = own_segment == current
            key_factor = tl.where(own_segment == old, key_factor, 0.0)
            old_factor = tl.where(old == current, 1.0, 0.0)
        if HAS_EXPONENT:
            row_peak = load_nearest(peak, position, num_keys)
            unit = load_nearest(peak, start, num_keys)
            old_factor *= tl.exp2(tl.minimum(unit - old_unit, 0.0))
        row_factor = tl.where(row_weight, 1.0, 0.0)
        if HAS_EXPONENT:
            row_factor = weight(unit - row_peak, row_weight)

        d_value = tl.zeros((BLOCK_V, CHUNK), tl.float32)
        projected = tl.zeros((CHUNK, BLOCK_X), tl.float32)
        sums = tl.zeros((CHUNK,), tl.float32)
        earlier = ()
        for block in tl.static_range(NUM_BLOCKS):
            kv, z = later[block]
            feature = first_feature + block * BLOCK_M + tl.arange(0, BLOCK_M)
            y = numbers(
                k, position, k_row, num_keys, projection, feature, 1.0, FEATURE, E, M, BLOCK_X, PRECISION
            )
            phi = features(y, moved, alive, feature, FEATURE, M)
            phi_k = operand(phi, PRECISION)
            read = product_split(kv, tl.trans(phi_k), tl.zeros((BLOCK_V, CHUNK), tl.float32), PRECISION)
            d_value += read * key_factor[None, :]
            d = product_split(
                tl.trans(kv), tl.trans(value), tl.zeros((BLOCK_M, CHUNK), tl.float32), PRECISION
            )
            d = tl.trans((d + z[:, None]) * key_factor[None, :])
            if IS_CAUSAL:
                kv *= old_factor
                z *= old_factor
                for group in range(GROUPS):
                    head = batch_head * GROUPS + group
                    at_rows = head.to(tl.int64) * length
                    q_here = q + (kv_head * GROUPS + group).to(tl.int64) * q_head
                    g_here = grad + (kv_head * GROUPS + group).to(tl.int64) * g_head
                    rows = position - offset
                    w = load_numbers(delta + at_rows, rows, length, 0.0)
                    share = 1.0 / load_numbers(total + at_rows, rows, length, float("inf"))
                    row_moved = w
                    if exponent is not None:
                        row_moved = load_numbers(row_shift + at_rows, rows, length, 0.0)
                    gradient = as_given(load_rows(g_here, rows, column, g_row, length, EV), PRECISION)
                    x = numbers(
                        q_here, rows, q_row, length, projection, feature, scale,
                        FEATURE, E, M, BLOCK_X, PRECISION,
                    )  # fmt: skip
                    psi = features(x, row_moved, None, feature, FEATURE, M)
                    psi *= share[:, None]
                    phi_q = operand(psi, PRECISION)

                    pairs = tl.zeros((CHUNK, CHUNK), tl.float32) + w[None, :]
                    pairs = product(value, tl.trans(gradient), pairs, PRECISION)
                    pairs = hide(
                        pairs, position, own, row_peak, own_segment, STRICT, HAS_EXPONENT, HAS_SEGMENT
                    )
                    d = product(operand(pairs, PRECISION), phi_q, d, PRECISION)
                    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
                    scores = product(phi_k, tl.trans(phi_q), scores, PRECISION)
                    scores = hide(
                        scores, position, own, row_peak, own_segment, STRICT, HAS_EXPONENT, HAS_SEGMENT
                    )
                    seen = tl.trans(operand(scores, PRECISION))
                    d_value = product(tl.trans(gradient), seen, d_value, PRECISION)
                    if HAS_EXPONENT or HAS_SEGMENT:
                        phi_q = operand(psi * row_factor[:, None], PRECISION)
                    kv = product(tl.trans(gradient), phi_q, kv, PRECISION)
                    z += tl.sum(phi_q.to(tl.float32) * w[:, None], 0)
            earlier += ((kv, z),)
            h = pulled_back(y, phi, tl.where(alive[:, None], d, 0.0), moved, FEATURE)
            if FEATURE == "favor_softmax" or FEATURE == "favor_relu":
                projected = through_projection(
                    projected, h, projection, feature, FEATURE, E, M, BLOCK_X, PRECISION
                )
                sums += tl.sum(h, 1)
            else:
                store_rows(dk + at_keys * E, position, feature, E, num_keys, E, h)
        later = earlier

        if FEATURE == "favor_softmax":
            tile = load_rows(k, position, tl.arange(0, BLOCK_X), k_row, num_keys, E)
            projected -= tile.to(tl.float32) * (sums * E**-0.5)[:, None]
        if FEATURE == "favor_softmax" or FEATURE == "favor_relu":
            finish(part, dk + at_keys * E, projected, position, num_keys, 1.0, E, BLOCK_X, BEGIN, END)
        finish(part_v, dv + at_keys * EV, tl.trans(d_value), position, num_keys, 1.0, EV, BLOCK_V, BEGIN, END)
