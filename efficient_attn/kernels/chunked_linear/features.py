"""The feature maps of `feature_maps.FORMULAS` on tiles, and their derivatives.

A map with exponents has phi(x) = values * 2^exponent, where `shift`, one number a token, is what brings the values
into (0, 1]: both come from the kernel `exponents`, because they need all features of a token.
"""

# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

from .configs import COLUMNS
from .products import as_given, load_rows, operand, product

NOTHING = tl.constexpr(-(2.0**100))
"""The exponent of a key with no weight."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(60)
_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit
def _projected(
    x,
    rows,
    stride,
    length,
    projection,
    feature,
    scale,
    E: tl.constexpr,
    M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scale x E^(-1/4) times the rows `feature` of the projection: (1, M, E), or its high and low halves (2, M, E).

    Wide heads go in blocks of columns, by a loop that is not unrolled: whole, they would not fit into registers.
    """
    BLOCK: tl.constexpr = BLOCK_X if BLOCK_X < _COLUMNS else _COLUMNS
    y = tl.zeros((rows.shape[0], feature.shape[0]), tl.float32)
    for first in range(0, E, BLOCK):
        column = first + tl.arange(0, BLOCK)
        tile = as_given(load_rows(x, rows, column, stride, length, E), PRECISION)
        y = product(tile, tl.trans(load_rows(projection, feature, column, E, M, E)), y, PRECISION)
        if PRECISION != "ieee":
            low = load_rows(projection + M * E, feature, column, E, M, E)
            y = product(tile, tl.trans(low), y, PRECISION)
    return y * (scale * E**-0.25)


@triton.jit
def numbers(
    x,
    rows,
    stride,
    length,
    projection,
    feature,
    scale,
    FEATURE: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the features `feature` of these rows of x are functions of, one number each: inputs, or projections."""
    if FEATURE == "favor_softmax" or FEATURE == "favor_relu":
        return _projected(x, rows, stride, length, projection, feature, scale, E, M, BLOCK_X, PRECISION)
    else:
        return load_rows(x, rows, feature, stride, length, E).to(tl.float32) * scale


@triton.jit
def features(y, shift, alive, feature, FEATURE: tl.constexpr, M: tl.constexpr):
    """The values of phi of `numbers`, zero for features that do not exist and, if it is given, where not alive."""
    phi = values_of(y, shift[:, None], FEATURE, M)
    if ((feature.shape[0] - 1) & M) != 0:
        phi = tl.where((feature < M)[None, :], phi, 0.0)
    if alive is not None:
        phi = tl.where(alive[:, None], phi, 0.0)
    return phi


@triton.jit
def values_of(y, shift, FEATURE: tl.constexpr, M: tl.constexpr):
    """The values of features that are functions of one number each: an input, or a projection."""
    if FEATURE == "favor_softmax" or FEATURE == "exp":
        return tl.exp2(y * _LOG2_E - shift)
    else:
        positive = tl.where(y > 0, y, tl.where(y == y, 0.0, y))
        if FEATURE == "elu":
            return tl.exp2((y - positive) * _LOG2_E) + positive
        elif FEATURE == "relu":
            return positive
        elif FEATURE == "favor_relu":
            return positive * M**-0.5
        else:
            tl.static_assert(FEATURE == "squared_relu")
            root = positive * tl.exp2(-shift)
            return root * root


@triton.jit
def exponent_of(largest, square, FEATURE: tl.constexpr, M: tl.constexpr):
    """A token's shift and exponent from the largest number its features are made of, and |x|^2 / 2 of favor_softmax."""
    if FEATURE == "squared_relu":
        root = tl.ceil(tl.log2(tl.maximum(largest, 2.0**-_LARGEST)))
        root = tl.minimum(root, _LARGEST)
        return root, 2 * root
    else:
        largest *= _LOG2_E
        peak = largest
        if FEATURE == "favor_softmax":
            peak = largest - (square * _LOG2_E + tl.log2(M * 1.0) / 2)
        exponent = tl.ceil(peak)
        return largest - (peak - exponent), tl.maximum(exponent, NOTHING)


@triton.jit
def pulled_back(y, phi, grad, shift, FEATURE: tl.constexpr):
    """The gradient of `numbers`."""
    if FEATURE == "elu":
        return grad * tl.minimum(phi, 1.0)
    elif FEATURE == "relu" or FEATURE == "favor_relu":
        return tl.where(phi > 0, grad, 0.0)
    elif FEATURE == "squared_relu":
        unit = tl.exp2(-shift)[:, None]
        return grad * (2 * tl.maximum(y, 0.0) * unit) * unit
    else:
        return grad * phi


@triton.jit
def through_projection(
    total,
    h,
    projection,
    feature,
    FEATURE: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total and the gradient of scale x from that of its projections; for favor_softmax without what |x|^2 adds."""
    w = load_rows(projection, feature, tl.arange(0, BLOCK_X), E, M, E)
    factor = E**-0.25
    if FEATURE == "favor_relu":
        factor = factor * M**-0.5
    return product(operand(h * factor, PRECISION), w, total, PRECISION)


@triton.jit
def exponents_kernel(
    x,
    valid,
    projection,
    shift,
    exponent,
    scale,
    x_batch,
    x_head,
    x_row,
    heads,
    length,
    blocks,
    FEATURE: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Each token's shift, and its exponent if asked for: NOTHING where not valid."""
    program = tl.program_id(0)
    batch_head = program // blocks
    batch, head = batch_head // heads, batch_head % heads
    rows = program % blocks * CHUNK + tl.arange(0, CHUNK)
    x += batch.to(tl.int64) * x_batch + head.to(tl.int64) * x_head
    largest = tl.full((CHUNK,), -float("inf"), tl.float32)
    square = tl.zeros((CHUNK,), tl.float32)
    if FEATURE == "favor_softmax":
        tile = load_rows(x, rows, tl.arange(0, BLOCK_X), x_row, length, E)
        z = tile.to(tl.float32) * (scale * E**-0.25)
        square = tl.sum(z * z, 1) / 2
    for first in range(0, M, BLOCK_M):
        feature = first + tl.arange(0, BLOCK_M)
        y = numbers(x, rows, x_row, length, projection, feature, scale, FEATURE, E, M, BLOCK_X, PRECISION)
        if M % BLOCK_M != 0:
            y = tl.where((feature < M)[None, :], y, -float("inf"))
        largest = tl.maximum(largest, tl.max(y, 1))
    shifts, own = exponent_of(largest, square, FEATURE, M)
    inside = rows < length
    at = batch_head.to(tl.int64) * length + rows
    tl.store(shift + at, shifts, mask=inside)
    if exponent is not None:
        if valid is not None:
            seen = tl.load(valid + batch.to(tl.int64) * length + rows, mask=inside, other=0)
            own = tl.where(seen != 0, own, NOTHING)
        tl.store(exponent + at, own, mask=inside)
