"""What the operators cost: the counts that tests compare with brute force and with what torch counts."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..complexity import Cost, Flops, Shape
from ..complexity.counting import FORMULAS
from ..feature_maps import FeatureMap, formula_of
from ..inputs import accumulation_dtype
from ..kernels.block_sparse.pairs import multiplied_pairs
from ..kernels.block_sparse.parts import parts_of
from ..masks import Mask, plan
from .linear_kernel_costs import (
    chunked_linear_backward_flops,
    chunked_linear_forward_flops,
    chunked_linear_step_flops,
    chunked_linear_steps_backward_flops,
    chunked_linear_steps_forward_flops,
    linear_kernel_cost,
)
from .scan import CHUNK
from .tiles import TILE_KEYS, TILE_ROWS
from .workspaces import blocked_workspace, scan_workspace, sdpa_workspace


def tile_pairs(mask: Mask, q_len: int, num_keys: int, q_offset: int | None = None) -> int:
    """Pairs that the blocked backend multiplies: those of its tiles, allowed or not."""
    offset = num_keys - q_len if q_offset is None else q_offset
    tiles = plan(mask, offset, offset + q_len, num_keys, TILE_ROWS, TILE_KEYS)
    return sum(tile.num_rows * tile.num_keys for tile in tiles)


def softmax_cost(mask: Mask, shape: Shape, training: bool, basis: str, backend: str) -> Cost:
    """Scores and weighted values over the mask's pairs; backward two products for each of the two.

    Basis "model": the pairs of the mask. "hardware": the pairs of the tiles (blocked) or of the blocks (triton), or
    all L x S pairs (the others, whose kernels do not say what they skip), and the scores once more in the backward
    pass.
    "torch": as "hardware", since FlopCounterMode counts recomputation in the backward pass it belongs to.
    """
    if backend == "triton":
        return _kernel_cost(mask, shape, training, basis)
    if basis == "model":
        per_head = mask.pairs(shape.q_len, shape.kv_len)
    elif backend == "blocked":
        per_head = tile_pairs(mask, shape.q_len, shape.kv_len)
    else:
        per_head = shape.q_len * shape.kv_len
    pairs = shape.batch * shape.num_heads * per_head
    recomputes = basis != "model" and backend != "reference"
    flops = Flops(
        2 * pairs * (shape.head_dim + shape.v_head_dim),
        4 * pairs * (shape.head_dim + shape.v_head_dim) if training else 0,
        2 * pairs * shape.head_dim if training and recomputes else 0,
    )
    if basis == "torch":
        flops = Flops(flops.forward, flops.backward + flops.recompute)
    width = accumulation_dtype(shape.dtype).itemsize
    rows = shape.batch * shape.num_heads * shape.q_len
    log_sums = rows * width
    saved = shape.input_bytes + shape.output_bytes + log_sums
    if backend == "blocked":
        workspace = blocked_workspace(mask, shape, training)
    else:
        workspace = sdpa_workspace(shape, training)
    if backend == "reference":
        dense = shape.batch * shape.num_heads * shape.q_len * shape.kv_len * width
        saved += 2 * dense
        workspace += 4 * dense
    kept = saved - shape.input_bytes if training else shape.output_bytes
    return Cost(
        flops,
        bytes_read=shape.input_bytes,
        bytes_written=shape.output_bytes,
        saved_bytes=saved if training else 0,
        peak_bytes=kept + workspace,
        transient_bytes=workspace,
        terms={"scores": 2 * pairs * shape.head_dim, "values": 2 * pairs * shape.v_head_dim},
    )


def _kernel_cost(mask: Mask, shape: Shape, training: bool, basis: str) -> Cost:
    """The block-sparse kernels: widths rounded up to those of tiles, the scores and their gradient computed by two.

    "hardware" is cut by the configs of sm_90.
    """
    heads, size, v_size = shape.batch * shape.num_heads, shape.head_dim, shape.v_head_dim
    pairs = heads * mask.pairs(shape.q_len, shape.kv_len)
    flops = Flops(2 * pairs * (size + v_size), 4 * pairs * (size + v_size) if training else 0)
    if basis != "model":
        per_head = multiplied_pairs(
            mask,
            shape.q_len,
            shape.kv_len,
            shape.kv_len - shape.q_len,
            shape.dtype.itemsize,
            max(size, v_size),
        )
        size, v_size = _tile_width(size), _tile_width(v_size)
        pairs, by_row, by_key = (heads * x for x in (per_head.forward, per_head.dq, per_head.dkdv))
        flops = Flops(
            2 * pairs * (size + v_size),
            2 * (by_row + by_key) * (size + v_size) if training else 0,
            2 * (by_row * size + by_key * (size + v_size)) if training else 0,
        )
    if basis == "torch":
        flops = Flops(flops.forward, flops.backward + flops.recompute)
    width = accumulation_dtype(shape.dtype).itemsize
    sums = heads * shape.q_len * width
    # A mask that takes several launches sums their parts in full precision; backward there are three gradients.
    chained = len(parts_of(mask, by_key=training)) > 1
    numbers = shape.out_numel + (shape.q_numel + shape.k_numel + shape.v_numel) * training
    workspace = sums + chained * numbers * width + shape.input_bytes * training
    saved = shape.input_bytes + shape.output_bytes + sums
    kept = saved - shape.input_bytes if training else shape.output_bytes
    return Cost(
        flops,
        bytes_read=shape.input_bytes,
        bytes_written=shape.output_bytes,
        saved_bytes=saved if training else 0,
        peak_bytes=kept + workspace,
        transient_bytes=workspace,
        terms={"scores": 2 * pairs * size, "values": 2 * pairs * v_size},
    )


def step_traffic(cost: Cost, shape: Shape, grown: int, changed: int) -> Cost:
    """`cost` with the traffic of a step of `q_len` tokens: the state as it was is read, `changed` bytes are written.

    `grown` is by how many bytes the step makes the state larger.
    """
    new = replace(shape, kv_len=shape.q_len)
    read = new.input_bytes + cost.state_bytes - grown
    return replace(cost, bytes_read=read, bytes_written=shape.output_bytes + changed)


def _tile_width(size: int) -> int:
    """The power of two, 16 at least, up to which a tile's columns are filled with zeros."""
    return max(16, 1 << (size - 1).bit_length())


def scan_pairs(length: int) -> int:
    """Pairs that the scan multiplies: whole chunks, on both sides of the diagonal."""
    return length // CHUNK * CHUNK**2 + (length % CHUNK) ** 2


def linear_cost(
    phi: FeatureMap, is_causal: bool, shape: Shape, training: bool, phase: str, basis: str, backend: str
) -> Cost:
    """Features, the state phi(k)^T v, and its reading by phi(q); a causal scan adds the pairs inside its chunks.

    Basis "model": one state update and one reading a token, the normaliser left out. "hardware" and "torch":
    what the backend multiplies, the normaliser's column included.

    Raises:
        ValueError: for the kernels' products with a feature map that they do not know.
    """
    if backend == "triton" and basis != "model":
        return linear_kernel_cost(phi, is_causal, shape, training, phase, basis)
    width = accumulation_dtype(shape.dtype).itemsize
    size, heads, kv_heads = phi.num_features(shape.head_dim), shape.num_heads, shape.num_kv_heads
    rows, keys = shape.batch * heads * shape.q_len, shape.batch * kv_heads * shape.kv_len
    new_keys = shape.batch * kv_heads * shape.q_len if phase == "decode" else keys
    values = shape.v_head_dim + (basis != "model")
    streamed = formula_of(phi) is not None
    terms = {
        "features": phi.flops(shape.head_dim) * (rows + new_keys),
        "state": 2 * new_keys * size * values,
        "reading": 2 * rows * size * values,
    }
    pairs = 0
    if basis != "model" and backend == "reference":
        pairs = shape.batch * heads * shape.q_len * shape.kv_len
        terms |= {"state": 0, "reading": 0, "pairs": 2 * pairs * (size + shape.v_head_dim)}
    elif basis != "model" and is_causal and not (phase == "decode" and shape.q_len == 1):
        pairs = shape.batch * heads * scan_pairs(shape.q_len)
        terms["pairs"] = 2 * pairs * (size + values)
        if phase == "decode" or (not streamed and shape.q_len != shape.kv_len):
            # The earlier keys' state and its reading come on top of the scan's own.
            terms["state"] += 2 * shape.batch * kv_heads * shape.q_len * size * values
            terms["reading"] *= 2
    forward = sum(terms.values())
    flops = Flops(forward)
    if training and streamed and basis != "model" and backend != "reference":
        # Three scans: that of v has no normaliser, and reads the state of that of the keys. Features are computed
        # again for the pass over the queries and for that over the keys; a projection is not learnt, so its
        # derivative is one product.
        saved_in_v = 2 * (pairs + rows * size * values + new_keys * size)
        backward = 3 * (forward - terms["features"]) - saved_in_v + terms["features"]
        flops = Flops(forward, backward, 2 * terms["features"])
    elif training:
        # Each product of two matrices has two in its backward pass, each scan has three scans.
        scans = is_causal and basis != "model" and backend != "reference"
        flops = Flops(forward, (3 if scans else 2) * (forward - terms["features"]) + terms["features"])
    if basis == "torch":
        flops = Flops(flops.forward, flops.backward + flops.recompute)
    # Of each row its total weight; in half precision also what rounding took from the output.
    saved = shape.input_bytes + shape.output_bytes * (2 if shape.dtype.itemsize < width else 1) + rows * width
    if not streamed:
        saved = (
            _features_saved(phi, is_causal, shape) * width + rows
        )  # a byte a row says which rows are empty
    # A step holds the new tokens, and the state before and after them.
    held = replace(shape, kv_len=shape.q_len) if phase == "decode" else shape
    workspace = scan_workspace(phi, is_causal, held, training)
    kept = saved - shape.input_bytes if training else shape.output_bytes
    return Cost(
        flops,
        bytes_read=shape.input_bytes,
        bytes_written=shape.output_bytes,
        params=phi.params(),
        saved_bytes=saved if training else 0,
        peak_bytes=kept + workspace,
        transient_bytes=workspace,
        terms=terms,
    )


def _features_saved(phi: FeatureMap, is_causal: bool, shape: Shape) -> int:
    """Numbers that autograd keeps of a map it looks into: features, values with ones, sums, totals, exponents."""
    size, values = phi.num_features(shape.head_dim), shape.v_head_dim + 1
    rows = shape.batch * shape.num_heads * shape.q_len
    keys = shape.batch * shape.num_kv_heads * shape.kv_len
    numbers = (rows + keys) * (size + phi.saved(shape.head_dim)) + keys * values + rows * (values + 1)
    if not is_causal:
        numbers += shape.batch * shape.num_kv_heads * size * values  # the state
    if phi.has_exponent:
        # Both exponents, or rescaled features and their factor.
        numbers += 2 * keys if is_causal else keys * (size + 1)
    return numbers


def register_flop_formulas() -> None:
    """Teach torch's FlopCounterMode what the package's operators multiply; call it before making the mode.

    Not done on import, because torch.utils.flop_counter imports Triton.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in FORMULAS.items():
        operator = getattr(torch.ops.efficient_attn, name.removeprefix("efficient_attn::"))
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)


def _blocked_forward_flops(q, k, v, q_seg, k_seg, offset, seed, mask, *rest, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    pairs = q[0] * q[1] * tile_pairs(Mask.from_spec(mask), q[2], k[2])
    return 2 * pairs * (q[3] + v[3])


def _blocked_backward_flops(
    grad, q, k, v, out, lse, q_seg, k_seg, offset, seed, mask, *rest, out_shape=None, **kwargs
) -> int:  # type: ignore[no-untyped-def]
    pairs = q[0] * q[1] * tile_pairs(Mask.from_spec(mask), q[2], k[2])
    return 2 * pairs * (3 * q[3] + 2 * v[3])


def _block_sparse_forward_flops(
    q, k, v, q_seg, k_seg, offset, seed, mask, *rest, out_shape=None, **kwargs
) -> int:  # type: ignore[no-untyped-def]
    return _kernel_flops(q, k, v, mask).forward


def _block_sparse_backward_flops(
    grad, q, k, v, out, lse, q_seg, k_seg, offset, seed, mask, *rest, out_shape=None, **kwargs
) -> int:  # type: ignore[no-untyped-def]
    return _kernel_flops(q, k, v, mask).backward


def _kernel_flops(q, k, v, mask) -> Flops:  # type: ignore[no-untyped-def]
    # A formula sees no dtype: the kernels are for 16 bits.
    shape = Shape(q[0], q[1], q[2], k[2], q[3], num_kv_heads=k[1], v_head_dim=v[3])
    return _kernel_cost(Mask.from_spec(mask), shape, True, "torch").flops


def _linear_forward_flops(
    q, k, v, valid, segment, offset, projection, feature, scale, is_causal, out_shape=None, **kwargs
) -> int:  # type: ignore[no-untyped-def]
    return _pass_flops(q, k, projection, is_causal, v[3] + 1) + _feature_flops(q, k, projection)


def _linear_backward_flops(
    grad, q, k, v, out, lost, total, valid, segment, offset, projection, feature, scale, is_causal, **kwargs
) -> int:  # type: ignore[no-untyped-def]
    scan, tokens = _pass_flops(q, k, projection, is_causal, v[3] + 1), q[0] * k[1] * k[2]
    size = q[3] if projection is None else projection[0]
    of_v = _pair_flops(q, size, is_causal, v[3]) + 2 * tokens * size * v[3]
    return 2 * scan + of_v + 3 * _feature_flops(q, k, projection)


def _pair_flops(q, size, is_causal, values) -> int:  # type: ignore[no-untyped-def]
    return 2 * q[0] * q[1] * scan_pairs(q[2]) * (size + values) if is_causal else 0


def _pass_flops(q, k, projection, is_causal, values) -> int:  # type: ignore[no-untyped-def]
    """One scan, the queries being the last positions."""
    batch, heads, length, width = q
    size = width if projection is None else projection[0]
    tokens = batch * (heads * length + k[1] * k[2])
    return _pair_flops(q, size, is_causal, values) + 2 * tokens * size * values


def _feature_flops(q, k, projection) -> int:  # type: ignore[no-untyped-def]
    tokens = q[0] * (q[1] * q[2] + k[1] * k[2])
    return 0 if projection is None else 2 * tokens * projection[0] * projection[1]


def _scan_flops(q, k, v, *rest, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    batch, heads, groups, length, size = q
    values, copies = v[4], k[2]
    inside = groups * copies * scan_pairs(length) * (size + values)
    return 2 * batch * heads * (inside + (groups + copies) * length * size * values)


FORMULAS.update(
    {
        "efficient_attn::blocked_forward": _blocked_forward_flops,
        "efficient_attn::blocked_backward": _blocked_backward_flops,
        "efficient_attn::block_sparse_forward": _block_sparse_forward_flops,
        "efficient_attn::block_sparse_backward": _block_sparse_backward_flops,
        "efficient_attn::linear_forward": _linear_forward_flops,
        "efficient_attn::linear_backward": _linear_backward_flops,
        "efficient_attn::linear_scan": _scan_flops,
        "efficient_attn::chunked_linear_forward": chunked_linear_forward_flops,
        "efficient_attn::chunked_linear_backward": chunked_linear_backward_flops,
        "efficient_attn::chunked_linear_step": chunked_linear_step_flops,
        "efficient_attn::chunked_linear_steps_forward": chunked_linear_steps_forward_flops,
        "efficient_attn::chunked_linear_steps_backward": chunked_linear_steps_backward_flops,
    }
)
