"""One token of linear attention: the state with its key, and the output of its query, in one launch.

A program has one query head and a block of value columns. All of a group make the same new state; the first writes it.
Nothing is read on the host, so that the launch can be captured in a CUDA graph.
"""

# pyright: basic, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunked_linear.configs import DECODE_BLOCKS, ceil_div, padded
from ..chunked_linear.features import NOTHING, exponent_of, values_of


@triton.jit
def _numbers(
    x,
    projection,
    feature,
    scale,
    FEATURE: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """What the features `feature` of one token are made of, in fp32."""
    if FEATURE == "favor_softmax" or FEATURE == "favor_relu":
        column = tl.arange(0, BLOCK_X)
        inside = (feature < M)[:, None] & (column < E)[None, :]
        w = tl.load(projection + feature[:, None] * E + column[None, :], mask=inside, other=0.0)
        token = tl.load(x + column, mask=column < E, other=0.0).to(tl.float32)
        return tl.sum(w.to(tl.float32) * token[None, :], 1) * (scale * E**-0.25)
    else:
        return tl.load(x + feature, mask=feature < M, other=0.0).to(tl.float32) * scale


@triton.jit
def _exponent(
    x,
    projection,
    scale,
    FEATURE: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """The shift and the exponent of one token."""
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for first in range(0, M, BLOCK_M):
        feature = first + tl.arange(0, BLOCK_M)
        y = _numbers(x, projection, feature, scale, FEATURE, E, M, BLOCK_X)
        largest = tl.maximum(largest, tl.where(feature < M, y, -float("inf")))
    column = tl.arange(0, BLOCK_X)
    token = tl.load(x + column, mask=column < E, other=0.0).to(tl.float32) * (scale * E**-0.25)
    return exponent_of(tl.max(largest, 0), tl.sum(token * token, 0) / 2, FEATURE, M)


@triton.jit
def linear_step_kernel(
    q,
    k,
    v,
    valid,
    kv,
    exponent,
    projection,
    out,
    new_kv,
    new_exponent,
    scale,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    heads,
    GROUPS: tl.constexpr,
    FEATURE: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """(kv, exponent) with the key and the value of one token, into (new_kv, new_exponent), and the query's output."""
    batch_head = tl.program_id(0)
    batch, head = batch_head // heads, batch_head % heads
    kv_head = batch_head // GROUPS
    first_of_group = head % GROUPS == 0
    q += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    k += batch.to(tl.int64) * k_batch + (head // GROUPS).to(tl.int64) * k_head
    v += batch.to(tl.int64) * v_batch + (head // GROUPS).to(tl.int64) * v_head
    kv += kv_head.to(tl.int64) * (M * (EV + 1))
    new_kv += kv_head.to(tl.int64) * (M * (EV + 1))
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)

    counts = True
    if valid is not None:
        counts = tl.load(valid + batch) != 0
    row_shift = 0.0
    shift = 0.0
    old_factor = 1.0
    new_factor = 1.0
    if exponent is not None:
        row_shift, _ = _exponent(q, projection, scale, FEATURE, E, M, BLOCK_M, BLOCK_X)
        shift, own = _exponent(k, projection, 1.0, FEATURE, E, M, BLOCK_M, BLOCK_X)
        own = tl.where(counts, own, NOTHING)
        old = tl.load(exponent + kv_head)
        joint = tl.maximum(old, own)
        old_factor = tl.exp2(old - joint)
        new_factor = tl.exp2(own - joint)
        if first_of_group & (tl.program_id(1) == 0):
            tl.store(new_exponent + kv_head, joint)

    value = tl.load(v + column, mask=column < EV, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    total = 0.0
    for first in range(0, M, BLOCK_M):
        feature = first + tl.arange(0, BLOCK_M)
        phi_k = values_of(_numbers(k, projection, feature, 1.0, FEATURE, E, M, BLOCK_X), shift, FEATURE, M)
        phi_k = tl.where((feature < M) & counts, phi_k * new_factor, 0.0)
        phi_q = values_of(
            _numbers(q, projection, feature, scale, FEATURE, E, M, BLOCK_X), row_shift, FEATURE, M
        )
        phi_q = tl.where(feature < M, phi_q, 0.0)
        inside = (feature < M)[:, None] & (column < EV)[None, :]
        at = feature[:, None] * (EV + 1) + column[None, :]
        state = tl.load(kv + at, mask=inside, other=0.0) * old_factor + phi_k[:, None] * value[None, :]
        at_z = feature * (EV + 1) + EV
        z = tl.load(kv + at_z, mask=feature < M, other=0.0) * old_factor + phi_k
        if first_of_group:
            tl.store(new_kv + at, state, mask=inside)
            if tl.program_id(1) == 0:
                tl.store(new_kv + at_z, z, mask=feature < M)
        sums += tl.sum(phi_q[:, None] * state, 0)
        total += tl.sum(phi_q * z, 0)
    exact = tl.where(total < 2.0**-100, 0.0, sums / tl.where(total < 2.0**-100, 1.0, total))
    tl.store(out + batch_head.to(tl.int64) * EV + column, exact.to(out.dtype.element_ty), mask=column < EV)


def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    kv: Tensor,
    exponent: Tensor | None,
    projection: Tensor | None,
    feature: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output (B, H, 1, Ev) of one token, and the state (B, Hkv, M, Ev + 1) and its exponent (B, Hkv) after it."""
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, _, width = q.shape
    values, size = v.shape[3], kv.shape[2]
    out = torch.empty(batch, heads, 1, values, dtype=q.dtype, device=q.device)
    kv, new_kv = kv.contiguous(), torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    new_exponent = (
        None if exponent is None else torch.empty(exponent.shape, dtype=exponent.dtype, device=q.device)
    )
    block_m, block_v = DECODE_BLOCKS
    linear_step_kernel[(batch * heads, ceil_div(values, block_v))](
        q, k, v,
        None if valid is None else valid.contiguous().view(torch.int8),
        kv,
        None if exponent is None else exponent.contiguous(),
        None if projection is None else projection.contiguous(),
        out, new_kv, new_exponent, scale,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), heads,
        GROUPS=heads // k.shape[1], FEATURE=feature, E=width, EV=values, M=size,
        BLOCK_M=block_m, BLOCK_X=padded(width), BLOCK_V=block_v, num_warps=4,
    )  # fmt: skip
    return out, new_kv, new_exponent
