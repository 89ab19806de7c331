"""What the kernels of all passes share: where a program stands, what it walks, and which pairs count.

A program has a block of one axis and walks blocks of the other. Numbers of rows and keys count along a *view* of the
tensors: index = start + number * step. Distances of positions are held within 32 bits by cutting off what lies
beyond any block.
"""

# pyright: basic, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Stands for a maximum over nothing: finite, so that weights of such a row are zero rather than NaN."""

CHANGING = (
    "OFFSET", "SEED", "THRESHOLD", "BACK", "AHEAD", "NUM_SINKS", "SINKS_AHEAD", "KEY_START",
    "L", "S", "LENGTH", "PROGRAMS", "PER_RESIDUE", "NUM_SLOTS",
)  # fmt: skip
"""Arguments for whose values no kernel is compiled anew: lengths, which change from call to call, among them."""

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
def key_place(number, within, start, STEP, RUN, GATHERED: tl.constexpr, WIDE: tl.constexpr):
    """Where the keys `number + within` of a view stand: (index of the first one, distances of the others from it).

    A view takes one key of every `STEP` from `start` on, or `RUN` adjacent ones of every `STEP`. Distances are int32
    unless WIDE, and the same for every block of a view that is not GATHERED.
    """
    number = number.to(tl.int64)
    if WIDE:
        within = within.to(tl.int64)
    if GATHERED:
        first = start + number // RUN * STEP + number % RUN
        index = start + (number + within) // RUN * STEP + (number + within) % RUN
        return first, (index - first).to(within.dtype)
    return start + number * STEP, within * STEP


@triton.jit
def precede(first, within, count):
    """Which of the indices `first + within` come before `count`."""
    return within < tl.minimum(tl.maximum(count - first, 0), 1 << 30).to(within.dtype)


@triton.jit
def spread(number, step, WIDE: tl.constexpr):
    """Distances of rows that lie `step` apart, in int32 unless WIDE."""
    if WIDE:
        return number.to(tl.int64) * step
    return number * step


@triton.jit
def load_rows(base, first, within, stride, column, valid, width, EVEN: tl.constexpr):
    """Rows `first + within` of a matrix as a tile (rows, columns); zero where not `valid`.

    Also zero beyond `width` columns, unless they are known to be EVEN: as many as the tile has.
    """
    address = base + first * stride + ((within * stride)[:, None] + column[None, :])
    if EVEN:
        return tl.load(address, mask=valid[:, None], other=0.0)
    return tl.load(address, mask=valid[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def store_rows(base, first, within, stride, column, valid, width, value):
    """The tile `value` into rows `first + within`, where `valid`."""
    address = base + first * stride + ((within * stride)[:, None] + column[None, :])
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
    words = PATTERNS + pattern.to(tl.int64) * (BLOCK_Q * BLOCK_K // 32) + row * (BLOCK_K // 32)
    bits = tl.load(words) >> (key % 32)
    for word in tl.static_range(1, BLOCK_K // 32):
        bits = tl.where(key // 32 == word, tl.load(words + word) >> (key % 32), bits)
    return (bits & 1) != 0


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
