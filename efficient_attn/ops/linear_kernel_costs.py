"""What the kernels of linear attention cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from ..complexity import Cost, Flops, Shape
from ..feature_maps import FORMULAS, FeatureMap, formula_of
from ..kernels.chunked_linear import counts
from ..kernels.chunked_linear.counts import AGAIN, Sizes

HOPPER = 90


def sizes(phi: FeatureMap, is_causal: bool, shape: Shape, architecture: int = HOPPER) -> Sizes:
    """What the counts need to know of a call."""
    return Sizes(
        batch=shape.batch,
        heads=shape.num_heads,
        kv_heads=shape.num_kv_heads,
        length=shape.q_len,
        num_keys=shape.kv_len,
        width=shape.head_dim,
        values=shape.v_head_dim,
        features=phi.num_features(shape.head_dim),
        projected=getattr(phi, "projection", None) is not None,
        has_exponent=phi.has_exponent,
        is_causal=is_causal,
        halves=shape.dtype.itemsize < 4,
        itemsize=2 if shape.dtype == torch.bfloat16 else 4,
        architecture=architecture,
    )


def linear_counts(
    phi: FeatureMap, is_causal: bool, shape: Shape, architecture: int = HOPPER
) -> tuple[Counter[str], Counter[str]]:
    """FLOPs of a forward and of a backward pass, by what they are for."""
    s, itemsize = sizes(phi, is_causal, shape, architecture), min(4, shape.dtype.itemsize)
    return counts.forward(s, itemsize), counts.backward(s, itemsize)


def flops_of(forward: Counter[str], backward: Counter[str], training: bool) -> Flops:
    """The same as `Flops`."""
    again = sum(backward[name] for name in AGAIN)
    return Flops(sum(forward.values()), (sum(backward.values()) - again) * training, again * training)


def linear_kernel_cost(
    phi: FeatureMap, is_causal: bool, shape: Shape, training: bool, phase: str, basis: str
) -> Cost:
    """The products of all tiles, padding and both halves of states included, as the configs of sm_90 cut them.

    The normaliser is no product here, and is not counted. "decode" is a step: of one token that nobody
    differentiates by a kernel of its own, of others by those of the forward pass over the new tokens alone.
    """
    if formula_of(phi) is None:
        raise ValueError(f"backend must not be 'triton': its kernels do not know the feature map {phi}")
    one_token = phase == "decode" and shape.q_len == 1 and not training
    many_tokens = phase == "decode" and not one_token
    if many_tokens:
        shape = replace(shape, kv_len=shape.q_len)
    forward, backward = linear_counts(phi, is_causal, shape)
    s = sizes(phi, is_causal, shape)
    if one_token:
        forward = counts.step(s)
    flops = flops_of(forward, backward, training)
    if basis == "torch":
        flops = Flops(flops.forward, flops.backward + flops.recompute)
    # Of each row its total weight; in half precision also what rounding took from the output.
    saved = shape.input_bytes + shape.output_bytes * (1 + s.halves) + 4 * s.rows
    if many_tokens:
        # The state before them.
        saved += 4 * s.batch * s.kv_heads * (s.features * (s.values + 1) + s.has_exponent)
    workspace = 0 if one_token else 4 * (counts.workspace(s, training) + s.rows)
    workspace += shape.input_bytes * training
    kept = saved - shape.input_bytes if training else shape.output_bytes
    return Cost(
        flops,
        bytes_read=shape.input_bytes,
        bytes_written=shape.output_bytes,
        params=phi.params(),
        saved_bytes=saved if training else 0,
        peak_bytes=kept + workspace,
        transient_bytes=workspace,
        terms=dict(forward),
    )


def chunked_linear_forward_flops(
    q, k, v, valid, segment, offset, projection, feature, scale, is_causal, keep, out_shape=None, **kwargs
) -> int:  # type: ignore[no-untyped-def]
    """For FlopCounterMode, which gives shapes."""
    return sum(counts.forward(_seen(q, k, v, projection, feature, is_causal, segment is not None)).values())


def chunked_linear_backward_flops(
    grad, q, k, v, out, lost, total, valid, segment, offset, projection, feature, scale, is_causal, **kwargs
) -> int:  # type: ignore[no-untyped-def]
    """For FlopCounterMode, which gives shapes."""
    return sum(counts.backward(_seen(q, k, v, projection, feature, is_causal, segment is not None)).values())


def chunked_linear_step_flops(
    q, k, v, valid, kv, exponent, projection, feature, scale, out_shape=None, **kwargs
) -> int:  # type: ignore[no-untyped-def]
    """For FlopCounterMode, which gives shapes."""
    return sum(counts.step(_seen(q, k, v, projection, feature, True)).values())


def chunked_linear_steps_forward_flops(
    q, k, v, valid, kv, exponent, projection, feature, scale, keep, out_shape=None, **kwargs
) -> int:  # type: ignore[no-untyped-def]
    """For FlopCounterMode, which gives shapes."""
    return sum(counts.forward(_seen(q, k, v, projection, feature, True)).values())


def chunked_linear_steps_backward_flops(
    grad, grad_kv, q, k, v, out, lost, total, valid, kv, exponent, projection, feature, scale, **kwargs
) -> int:  # type: ignore[no-untyped-def]
    """For FlopCounterMode, which gives shapes."""
    return sum(counts.backward(_seen(q, k, v, projection, feature, True)).values())


def _seen(q, k, v, projection, feature, is_causal, documents=False) -> Sizes:  # type: ignore[no-untyped-def]
    # A formula sees no dtype: the kernels are for 16 bits.
    return Sizes(
        batch=q[0], heads=q[1], kv_heads=k[1], length=q[2], num_keys=k[2], width=q[3], values=v[3],
        features=q[3] if projection is None else projection[0], projected=projection is not None,
        has_exponent=FORMULAS[feature].has_exponent, is_causal=is_causal or documents,
        both_ways=documents and not is_causal,
    )  # fmt: skip
