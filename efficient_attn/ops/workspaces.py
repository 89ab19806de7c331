"""What the torch implementations hold beyond inputs, output and what they save, at the worst moment, in bytes.

Bounds, from the sizes of the blocks that they walk: the tests hold them against what is allocated.
"""

from __future__ import annotations

from functools import lru_cache

from ..complexity import Shape
from ..feature_maps import FeatureMap
from ..inputs import accumulation_dtype
from ..masks import Mask, tile_groups
from .scan import BLOCK_ROWS, CHUNK
from .tiles import BATCH_SCORES, TILE_KEYS, TILE_ROWS

_HIDDEN_BYTES = 36
"""Of a pair that a tile may hide: int64 positions, their difference, comparisons, and what bounds the score."""

OFFSET_BYTES = 8
"""The position of the first query, which operators take as a tensor."""

FUSED_SCRATCH_BYTES = 5 << 18
"""What a thread of torch's fused CPU kernel holds at most: scores and their gradients, of 256 rows and 512 keys."""

SAMPLED = 4096
"""Positions whose tiles stand for those of longer sequences."""


def _width(shape: Shape) -> int:
    return accumulation_dtype(shape.dtype).itemsize


def _gradient_bytes(shape: Shape) -> int:
    """The gradients of q, k and v, and where sums are kept in another dtype these, too."""
    numbers = shape.q_numel + shape.k_numel + shape.v_numel
    rounds = _width(shape) != shape.dtype.itemsize
    return shape.input_bytes + numbers * _width(shape) * rounds


def sdpa_workspace(shape: Shape, training: bool) -> int:
    """torch's fused kernels: a log-sum of each row; backward the gradients, those of q once more in full precision.

    On a CPU each of its threads also holds the scores of a block, up to `FUSED_SCRATCH_BYTES`, which is not in here.
    """
    rows = shape.batch * shape.num_heads * shape.q_len * _width(shape)
    return rows + (shape.input_bytes + shape.q_numel * _width(shape)) * training


def blocked_workspace(mask: Mask, shape: Shape, training: bool) -> int:
    """Outputs or gradients in the accumulation dtype, and the buffers of a batch of tiles."""
    width, rounds = _width(shape), _width(shape) != shape.dtype.itemsize
    rows = shape.batch * shape.num_heads * shape.q_len * width
    forward = OFFSET_BYTES + rows + shape.out_numel * width * rounds + _buffers(mask, shape, False)
    if not training:
        return forward
    # Row sums of grad * out are taken before the first buffer.
    backward = OFFSET_BYTES + 2 * rows + _gradient_bytes(shape)
    products = shape.out_numel * width * (3 if rounds else 1)
    return max(forward, backward + max(products, _buffers(mask, shape, True)))


def _buffers(mask: Mask, shape: Shape, training: bool) -> int:
    """The largest of each buffer that a batch of tiles uses, over all kinds of tiles."""
    heads = shape.batch * shape.num_kv_heads
    shared = shape.num_heads // shape.num_kv_heads
    more_follow = shape.q_len > SAMPLED
    largest = {"rows": 0, "keys": 0, "pairs": 0, "hidden": 0}
    kinds = _tile_sizes(mask, min(shape.q_len, SAMPLED), _keys_sampled(shape))
    for rows, keys, partial, count in kinds:
        one = shared * rows * keys
        tiles = max(1, BATCH_SCORES // one)
        if not more_follow:
            tiles = min(tiles, heads * count)
        sizes = tiles * shared * rows, tiles * keys, tiles * one, rows * partial
        largest = {name: max(a, b) for (name, a), b in zip(largest.items(), sizes, strict=True)}
    both, widest = shape.head_dim + shape.v_head_dim, max(shape.head_dim, shape.v_head_dim)
    # Queries and outputs, keys and values, scores; backward each with its gradient, and sums of rows.
    times = 2 if training else 1
    numbers = largest["rows"] * (times * both + 6) + largest["keys"] * times * both
    numbers += largest["pairs"] * times
    numbers += largest["keys"] * widest + largest["rows"] * shape.v_head_dim
    # A buffer that must grow is held until the larger one is there.
    numbers += max(largest["pairs"], largest["keys"] * widest) * times * (len(kinds) > 1)
    return numbers * _width(shape) + largest["hidden"] * _HIDDEN_BYTES


def _keys_sampled(shape: Shape) -> int:
    """Keys such that the sampled queries are the last positions, as all are."""
    return max(0, shape.kv_len - max(0, shape.q_len - SAMPLED))


@lru_cache(maxsize=256)
def _tile_sizes(mask: Mask, q_len: int, num_keys: int) -> tuple[tuple[int, int, int, int], ...]:
    """(rows, keys, keys that are hidden from some row, tiles) of each kind of tile."""
    offset = num_keys - q_len
    groups = tile_groups(mask, offset, offset + q_len, num_keys, TILE_ROWS, TILE_KEYS)
    tiles = ((group.tiles[0], len(group.tiles)) for group in groups)
    return tuple((t.num_rows, t.num_keys, t.num_partial, count) for t, count in tiles if t.num_keys)


def scan_workspace(phi: FeatureMap, is_causal: bool, shape: Shape, training: bool) -> int:
    """Features, values and products of one block of rows, the states of its chunks, and a number for each row."""
    heads = shape.batch * shape.num_heads
    tokens = max(1, BLOCK_ROWS // max(1, CHUNK * heads)) * CHUNK
    rows = heads * min(tokens, max(shape.q_len, shape.kv_len))
    size, values, width = phi.num_features(shape.head_dim), shape.v_head_dim + 1, _width(shape)
    state = size * values
    block = 3 * size + 2 * shape.head_dim + 5 * values
    if is_causal:
        block += CHUNK * (2 if phi.has_exponent else 1) + 3 * state // CHUNK
    if training:
        block = 2 * block + 2 * size
    numbers = rows * block + 3 * shape.batch * shape.num_kv_heads * state
    weights = heads * shape.q_len * (1 + training * phi.has_exponent)
    # What rounding took from the output is computed whether or not it is kept.
    lost = shape.output_bytes * (width != shape.dtype.itemsize)
    return (numbers + weights) * width + (shape.input_bytes if training else lost)


def compressed_workspace(rank: int, heads: int, num_params: int, shape: Shape, training: bool) -> int:
    """Operands in the accumulation dtype, compressed keys and values, and a log-sum of each row.

    Backward also the gradients of the projections, first one for each row and head.
    """
    width, rounds = _width(shape), _width(shape) != shape.dtype.itemsize
    small = shape.batch * shape.num_kv_heads * rank * (shape.head_dim + shape.v_head_dim)
    rows = shape.batch * shape.num_heads * shape.q_len
    copies = shape.q_numel + shape.k_numel + shape.out_numel + heads * shape.kv_len * rank
    numbers = 2 * small + rows + copies * rounds
    if training:
        each = shape.batch * shape.num_kv_heads * shape.kv_len * rank
        numbers += small + 2 * shape.q_numel + shape.k_numel + shape.v_numel + each + 2 * num_params
    return numbers * width + shape.input_bytes * training
