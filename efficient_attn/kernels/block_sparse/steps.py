"""What the kernels of all passes share: where a program stands, what it walks, and which pairs count.

A program has a block of one axis and walks blocks of the other. Numbers of rows and keys count along a *view* of the
tensors: index = start + number * step. Distances of positions are held within 32 bits by cutting off what lies
beyond any block.
"""

# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Stands for a maximum over nothing: finite, so that weights of such a row are zero rather than NaN."""

_FAR = tl.constexpr(1 << 20)


@triton.jit
def near(x):
    """An int64 distance as int32; beyond any block, one is as far as another."""
    return tl.minimum(tl.maximum(x, -_FAR), _FAR).to(tl.int32)


@triton.jit
def edges(first, last, before, after, count, BLOCK: tl.constexpr):
    """Blocks of an axis of `count` that [first, last] sees, each from `before` before itself to `after` after.

    Returns (low, inner_low, inner_up, up): in the blocks [low, up) somebody sees something, and in those of
    [inner_low, inner_up) everybody sees everything.
    """
    low = tl.maximum(first - before, 0) // BLOCK
    up = tl.maximum((tl.maximum(tl.minimum(last + after + 1, count), 0) + BLOCK - 1) // BLOCK, low)
    inner_low = tl.minimum(tl.maximum((tl.maximum(last - before, 0) + BLOCK - 1) // BLOCK, low), up)
    inner_up = tl.maximum(tl.minimum(first + after + 1, count), 0) // BLOCK
    inner_up = tl.minimum(tl.maximum(inner_up, inner_low), up)
    return low, inner_low, inner_up, up


@triton.jit
def load_offset(OFFSET, ON_DEVICE: tl.constexpr):
    """The position of the first query, a number or one that lies on the device."""
    if ON_DEVICE:
        return tl.load(OFFSET).to(tl.int64)
    return tl.cast(OFFSET, tl.int64)


@triton.jit
def residue_view(residue, offset, step, num_rows, num_keys):
    """The rows and keys whose position leaves `residue` modulo `step`: (first row, rows, keys, position of row 0).

    The position counts in steps, and so do the numbers of keys.
    """
    first = (residue - offset) % step
    first = tl.where(first < 0, first + step, first)
    rows = tl.maximum(num_rows - first + step - 1, 0) // step
    keys = tl.maximum(num_keys - residue + step - 1, 0) // step
    return first, rows, keys, (first + offset - residue) // step


@triton.jit
def key_index(number, start, STEP, RUN, GATHERED: tl.constexpr):
    """Where key `number` of a view stands: one of every `STEP`, or `RUN` adjacent ones of every `STEP`."""
    number = number.to(tl.int64)
    if GATHERED:
        return start + number // RUN * STEP + number % RUN
    return start + number * STEP


@triton.jit
def load_rows(base, index, stride, column, valid, width, BOUNDED: tl.constexpr, EVEN: tl.constexpr):
    """Rows `index` of a matrix as a tile (rows, columns); zero where not `valid`, and beyond `width` unless EVEN."""
    address = base + index[:, None] * stride + column[None, :]
    if BOUNDED and EVEN:
        return tl.load(address, mask=valid[:, None], other=0.0)
    if BOUNDED:
        return tl.load(address, mask=valid[:, None] & (column < width)[None, :], other=0.0)
    if EVEN:
        return tl.load(address)
    return tl.load(address, mask=(column < width)[None, :], other=0.0)


@triton.jit
def store_rows(base, index, stride, column, valid, width, value):
    """The tile `value` into rows `index`, where `valid`."""
    address = base + index[:, None] * stride + column[None, :]
    mask = valid[:, None] & (column < width)[None, :]
    tl.store(address, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def band_allows(row, key, shift, sink_stop, BACK, AHEAD, SINKS_AHEAD, SINKS: tl.constexpr):
    """Pairs of a band: `row` and `key` count inside their blocks, whose first positions lie `shift` = key - row apart.

    `sink_stop` is the number inside the block at which the sinks end.
    """
    distance = key - row
    seen = (distance >= near(-BACK - shift)) & (distance <= near(AHEAD - shift))
    if SINKS:
        seen = seen | ((key < near(sink_stop)) & (distance <= near(SINKS_AHEAD - shift)))
    return seen


@triton.jit
def pattern_allows(PATTERNS, pattern, row, key, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pairs of a partial block, from the bits of its pattern."""
    words = PATTERNS + pattern.to(tl.int64) * (BLOCK_Q * BLOCK_K // 32)
    word = tl.load(words + (row * (BLOCK_K // 32) + key // 32))
    return ((word >> (key % 32)) & 1) != 0


@triton.jit
def same_segment(row_segment, key_segment, HAS_ROWS: tl.constexpr):
    """Pairs of one segment; a negative one is padding, which nobody sees."""
    seen = key_segment >= 0
    if HAS_ROWS:
        seen = seen & (row_segment == key_segment)
    return seen


@triton.jit
def survives(seed, row, key, head, threshold):
    """Dropout's draw for each pair, the same in every pass: Philox keyed by batch, head, query and key."""
    row, key = row.to(tl.int32), key.to(tl.int32)
    zero = (row + key) * 0
    bits, _, _, _ = tl.philox(seed, zero + row, zero + key, zero + head.to(tl.int32), zero)
    return bits >= threshold.to(tl.uint32)
