"""The feature maps of `feature_maps.FORMULAS` on tiles, and their derivatives.

A map with exponents has phi(x) = values * 2^exponent, where `shift`, one number a token, is what brings the values
into (0, 1]: both come from the kernel `exponents`, because they need all features of a token.
"""

# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

from .products import as_given, load_rows, operand, product

NOTHING = tl.constexpr(-(2.0**100))
"""The exponent of a key with no weight."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(60)


@triton.jit
def _projected(
    x,
    projection,
    feature,
    scale,
    E: tl.constexpr,
    M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scale x E^(-1/4) times the rows `feature` of the projection: (1, M, E), or its high and low halves (2, M, E)."""
    x, column = as_given(x, PRECISION), tl.arange(0, BLOCK_X)
    y = tl.zeros((x.shape[0], feature.shape[0]), tl.float32)
    y = product(x, tl.trans(load_rows(projection, feature, column, E, M, E)), y, PRECISION)
    if PRECISION != "ieee":
        low = load_rows(projection + M * E, feature, column, E, M, E)
        y = product(x, tl.trans(low), y, PRECISION)
    return y * (scale * E**-0.25)


@triton.jit
def load_input(
    x, rows, stride, length, feature, FEATURE: tl.constexpr, E: tl.constexpr, BLOCK_X: tl.constexpr
):
    """What the features `feature` of these rows are made of: (rows, BLOCK_X), or one column a feature."""
    if FEATURE == "favor_softmax" or FEATURE == "favor_relu":
        return load_rows(x, rows, tl.arange(0, BLOCK_X), stride, length, E)
    else:
        return load_rows(x, rows, feature, stride, length, E)


@triton.jit
def features(
    x,
    shift,
    alive,
    projection,
    feature,
    scale,
    FEATURE: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The values of phi(scale x) in fp32, zero for features that do not exist and, if it is given, where not alive."""
    if FEATURE == "favor_softmax" or FEATURE == "favor_relu":
        y = _projected(x, projection, feature, scale, E, M, BLOCK_X, PRECISION)
    else:
        y = x.to(tl.float32) * scale
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
def pulled_back(x, phi, grad, shift, scale, FEATURE: tl.constexpr):
    """The gradient of scale x for maps without a projection; of what is projected, for those with one."""
    if FEATURE == "elu":
        return grad * tl.minimum(phi, 1.0)
    elif FEATURE == "relu" or FEATURE == "favor_relu":
        return tl.where(phi > 0, grad, 0.0)
    elif FEATURE == "squared_relu":
        unit = tl.exp2(-shift)[:, None]
        y = x.to(tl.float32) * scale
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
    for first in range(0, M, BLOCK_M):
        feature = first + tl.arange(0, BLOCK_M)
        tile = load_input(x, rows, x_row, length, feature, FEATURE, E, BLOCK_X)
        if FEATURE == "favor_softmax":
            y = _projected(tile, projection, feature, scale, E, M, BLOCK_X, PRECISION)
            z = tile.to(tl.float32) * (scale * E**-0.25)
            square = tl.sum(z * z, 1) / 2
        else:
            y = tile.to(tl.float32) * scale
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
