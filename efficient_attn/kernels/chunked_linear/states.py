"""What spans add to the state, and the running sums of that.

A state (EV + 1, M) holds sum_j v_j phi_j^T, then sum_j phi_j, in units of 2^u: u is the running maximum of the
exponents at the last position that was summed up, or, for sums over later rows, at the first one. So a unit depends on
a position, on nothing behind it, and every weight is at most 1.
"""

# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

from .features import NOTHING, features, numbers
from .products import as_given, load_nearest, load_numbers, load_rows, operand, product, store_rows


@triton.jit
def first_position(offset, span):
    """The start of the span in which the first query stands: rounded down, for negative offsets too."""
    return tl.where(offset >= 0, offset // span, -((span - 1 - offset) // span)) * span


@triton.jit
def load_offset(offset, length, num_keys):
    """The position of the first query, a number or in memory; what lies further out changes nothing."""
    if offset.dtype.is_ptr():
        offset = tl.load(offset)
    return tl.minimum(tl.maximum(offset, -length), num_keys).to(tl.int32)


@triton.jit
def keys_alive(valid, exponent, position, num_keys):
    """Which positions hold a key that counts, and the keys' exponents."""
    alive = (position >= 0) & (position < num_keys)
    own = tl.zeros(position.shape, tl.float32)
    if exponent is not None:
        own = load_numbers(exponent, position, num_keys, NOTHING)
        alive = alive & (own > NOTHING)
    elif valid is not None:
        alive = alive & (load_numbers(valid, position, num_keys, 0) != 0)
    return alive, own


@triton.jit
def weight(exponent, where):
    """2^exponent where that is asked for, else 0; pairs that are hidden may exceed every bound."""
    return tl.where(where, tl.exp2(tl.minimum(exponent, 0.0)), 0.0)


@triton.jit
def key_states_kernel(
    k,
    v,
    valid,
    segment,
    shift,
    exponent,
    peak,
    projection,
    states,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    heads,
    num_keys,
    span,
    spans,
    FEATURE: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The sum over the keys of each span, into the slot after it."""
    program = tl.program_id(0)
    batch_head, number = program // spans, program % spans
    batch = batch_head // heads
    feature = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    first = number * span
    stop = tl.minimum(first + span, num_keys)
    k += batch.to(tl.int64) * k_batch + (batch_head % heads).to(tl.int64) * k_head
    v += batch.to(tl.int64) * v_batch + (batch_head % heads).to(tl.int64) * v_head
    at = batch_head.to(tl.int64) * num_keys
    if exponent is not None:
        shift += at
        exponent += at
        unit = tl.load(peak + at + stop - 1)
    if valid is not None:
        valid += batch.to(tl.int64) * num_keys
    if segment is not None:
        segment += batch.to(tl.int64) * num_keys
        current = tl.load(segment + stop - 1)

    kv = tl.zeros((BLOCK_V, BLOCK_M), tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, stop, CHUNK):
        position = start + tl.arange(0, CHUNK)
        alive, own = keys_alive(valid, exponent, position, num_keys)
        if segment is not None:
            alive = alive & (load_numbers(segment, position, num_keys, 0) == current)
        moved = own
        if exponent is not None:
            moved = load_numbers(shift, position, num_keys, 0.0)
        x = numbers(k, position, k_row, num_keys, projection, feature, 1.0, FEATURE, E, M, BLOCK_X, PRECISION)
        phi = features(x, moved, alive, feature, FEATURE, M)
        if exponent is not None:
            phi *= weight(own - unit, alive)[:, None]
        phi = operand(phi, PRECISION)
        value = as_given(load_rows(v, position, column, v_row, num_keys, EV), PRECISION)
        kv = product(tl.trans(value), phi, kv, PRECISION)
        z += tl.sum(phi.to(tl.float32), 0)

    states += (batch_head.to(tl.int64) * (spans + 1) + number + 1) * (M * (EV + 1))
    store_rows(states, column, feature, M, EV, M, kv)
    if tl.program_id(2) == 0:
        tl.store(states + EV * M + feature, z, mask=feature < M)


@triton.jit(do_not_specialize=["offset"])
def row_states_kernel(
    q,
    grad,
    total,
    delta,
    segment,
    shift,
    peak,
    projection,
    states,
    offset,
    scale,
    q_batch,
    q_head,
    q_row,
    g_batch,
    g_head,
    g_row,
    kv_heads,
    length,
    num_keys,
    span,
    spans,
    GROUPS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    FEATURE: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The sum over the rows of each span: sum_i phi_i [grad_i, delta_i] / total_i, all heads of a group together."""
    program = tl.program_id(0)
    batch_head, number = program // spans, program % spans
    batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
    feature = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    offset = load_offset(offset, length, num_keys if IS_CAUSAL else num_keys + span)
    first = first_position(offset, span) + number * span
    stop = tl.minimum(first + span, offset + length)
    if shift is not None:
        peak += batch_head.to(tl.int64) * num_keys
        unit = load_nearest(peak, first, num_keys)
    if segment is not None:
        segment += batch.to(tl.int64) * num_keys
        current = load_nearest(segment, first, num_keys)

    kv = tl.zeros((BLOCK_V, BLOCK_M), tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, stop, CHUNK):
        position = start + tl.arange(0, CHUNK)
        rows = position - offset
        for group in range(GROUPS):
            head = batch_head * GROUPS + group
            q_here = q + batch.to(tl.int64) * q_batch + (kv_head * GROUPS + group).to(tl.int64) * q_head
            g_here = grad + batch.to(tl.int64) * g_batch + (kv_head * GROUPS + group).to(tl.int64) * g_head
            at = head.to(tl.int64) * length
            alive = rows < length
            if segment is not None:
                alive = alive & (load_nearest(segment, position, num_keys) == current)
            moved = tl.zeros((CHUNK,), tl.float32)
            share = 1.0 / load_numbers(total + at, rows, length, float("inf"))
            if shift is not None:
                moved = load_numbers(shift + at, rows, length, 0.0)
                share *= weight(unit - load_nearest(peak, position, num_keys), alive)
            share = tl.where(alive, share, 0.0)
            x = numbers(
                q_here, rows, q_row, length, projection, feature, scale, FEATURE, E, M, BLOCK_X, PRECISION
            )
            phi = features(x, moved, None, feature, FEATURE, M)
            phi = operand(phi * share[:, None], PRECISION)
            gradient = as_given(load_rows(g_here, rows, column, g_row, length, EV), PRECISION)
            kv = product(tl.trans(gradient), phi, kv, PRECISION)
            z += tl.sum(phi.to(tl.float32) * load_numbers(delta + at, rows, length, 0.0)[:, None], 0)

    states += (batch_head.to(tl.int64) * (spans + 1) + number) * (M * (EV + 1))
    store_rows(states, column, feature, M, EV, M, kv)
    if tl.program_id(2) == 0:
        tl.store(states + EV * M + feature, z, mask=feature < M)


@triton.jit
def running_sum_kernel(
    states,
    factors,
    slots,
    SIZE: tl.constexpr,
    REVERSE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """states[t] += states[t - 1] * factors[t], from the first slot, cleared unless KEEP; or from the last one back."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    states += tl.program_id(0).to(tl.int64) * slots * SIZE + column
    if factors is not None:
        factors += tl.program_id(0) * slots
    carry = tl.zeros((BLOCK,), tl.float32)
    for step in range(slots):
        slot = slots - 1 - step if REVERSE else step
        at = states + slot.to(tl.int64) * SIZE
        own = tl.load(at, mask=inside & (KEEP | (step > 0)), other=0.0)
        if factors is not None:
            carry *= tl.load(factors + slot)
        carry += own
        tl.store(at, carry, mask=inside)
