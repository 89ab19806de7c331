"""Linformer: full attention to keys and values that a projection along the sequence has compressed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import Backend
from ..complexity import Cost, Flops, Shape
from ..inputs import accumulation_dtype, full_precision
from .dense import grouped_matmul, safe_softmax
from .problem import Problem, anchors
from .softmax import attend_where
from .workspaces import compressed_workspace


@dataclass(kw_only=True)
class CompressedProblem(Problem):
    """softmax(scale q (E^T k)^T) (F^T v); E and F are (max_seq_len, rank) or (Hkv, max_seq_len, rank)."""

    key_projection: Tensor
    value_projection: Tensor
    dropout_p: float = 0.0


def compress(x: Tensor, projection: Tensor, start: Tensor | None) -> Tensor:
    """projection^T x for x (B, Hkv, S, E): (B, Hkv, rank, E); the projection's rows count from `start` (B,)."""
    length = x.shape[2]
    if start is not None and length:
        index = start[:, None] + torch.arange(length, device=x.device)
        inside = (index < length)[:, None, :, None]
        index = index.clamp(max=length - 1)[:, None, :, None]
        x = torch.where(inside, x.gather(2, index.expand(x.shape)), 0.0)
    # Half precision holds no sums along a sequence: float16 not their size, bfloat16 not their digits.
    dtype = accumulation_dtype(x.dtype)
    projection, x = projection[..., :length, :].to(dtype), x.to(dtype)
    if projection.dim() == 2:
        return projection.mT @ x
    # One product a head, over the whole batch: broadcasting would copy the projection for every row.
    together = projection.mT @ x.permute(1, 2, 0, 3).flatten(2)
    return together.unflatten(2, (x.shape[0], x.shape[3])).permute(2, 0, 1, 3)


def compressed(p: CompressedProblem) -> Tensor:
    """Time and memory O((L + S) rank)."""
    start = None if p.key_mask is None else anchors(p.key_mask)[0]
    with full_precision(p.q.device):
        k = compress(p.k, p.key_projection, start)
        v = compress(p.v, p.value_projection, start)
        return attend_where(p.q.to(k.dtype), k, v, None, p.scale, p.dropout_p).to(p.q.dtype)


def compressed_matrix(p: CompressedProblem) -> Tensor:
    """softmax(scale q (E^T k)^T) F^T (B, H, L, S), zero at masked keys."""
    dtype = accumulation_dtype(p.q.dtype)
    start = None if p.key_mask is None else anchors(p.key_mask)[0]
    with full_precision(p.q.device):
        k = compress(p.k.to(dtype), p.key_projection.to(dtype), start)
        weights = safe_softmax(grouped_matmul(p.q.to(dtype), k.mT) * p.scale)
        return grouped_matmul(weights, _columns(p, start, dtype))


def _columns(p: CompressedProblem, start: Tensor | None, dtype: torch.dtype) -> Tensor:
    """F^T with its columns at the positions of the keys: (B, Hkv, rank, S)."""
    length = p.k.shape[2]
    projection = p.value_projection.to(dtype)
    projection = projection if projection.dim() == 3 else projection.expand(p.k.shape[1], -1, -1)
    index = torch.arange(length, device=p.k.device).expand(p.k.shape[0], -1)
    if start is not None:
        index = (index - start[:, None]).clamp(min=0)
    rows = projection[:, index].transpose(0, 1)
    if p.key_mask is not None:
        rows = torch.where(p.key_mask[:, None, :, None], rows, 0.0)
    return rows.mT


def compressed_reference(p: CompressedProblem) -> Tensor:
    """`compressed_matrix @ v`: O(L S) time and memory."""
    weights = compressed_matrix(p)
    return grouped_matmul(weights, p.v.to(weights.dtype)).to(p.q.dtype)


def _refuse_dropout(p: CompressedProblem) -> list[str]:
    return ["the written-out matrix has no place for dropout"] if p.dropout_p else []


COMPRESSED_BACKENDS = (
    Backend("sdpa", compressed, lambda p: []),
    Backend("reference", compressed_reference, _refuse_dropout, by_name_only=True),
)


def compressed_cost(
    rank: int, heads: int, num_params: int, shape: Shape, training: bool, basis: str, backend: str
) -> Cost:
    """The compression of k and v by projections for `heads` heads, then attention to `rank` keys."""
    both = shape.head_dim + shape.v_head_dim
    rows = shape.batch * shape.num_heads * shape.q_len
    keys = shape.batch * shape.num_kv_heads * shape.kv_len
    width = accumulation_dtype(shape.dtype).itemsize
    small = shape.batch * shape.num_kv_heads * rank * both
    terms = {
        "compression": 2 * keys * rank * both,
        "scores": 2 * rows * rank * shape.head_dim,
        "values": 2 * rows * rank * shape.v_head_dim,
    }
    if basis != "model" and backend == "reference":
        pairs = 2 * rows * shape.kv_len
        keys_only = 2 * keys * rank * shape.head_dim
        terms |= {"compression": keys_only, "values": pairs * rank + pairs * shape.v_head_dim}
    forward = sum(terms.values())
    recompute = terms["scores"] if training and basis != "model" and backend == "sdpa" else 0
    flops = Flops(forward, 2 * forward if training else 0, recompute)
    if basis == "torch":
        flops = Flops(flops.forward, flops.backward + flops.recompute)
    saved = shape.q_numel + shape.k_numel + shape.v_numel + shape.out_numel + small + rows
    if shape.dtype.itemsize < width:
        saved += 2 * heads * shape.kv_len * rank  # the projections in the accumulation dtype
    saved *= width
    workspace = compressed_workspace(rank, heads, num_params, shape, training)
    kept = saved - shape.input_bytes if training else shape.output_bytes
    return Cost(
        flops,
        bytes_read=shape.input_bytes + num_params * shape.dtype.itemsize,
        bytes_written=shape.output_bytes,
        params=num_params,
        saved_bytes=saved if training else 0,
        peak_bytes=kept + workspace,
        transient_bytes=workspace,
        terms=terms,
    )
