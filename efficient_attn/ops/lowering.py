"""A softmax problem lowered to the arguments of a custom operator, and such operators made of two functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..inputs import accumulation_dtype
from .operators import keep_nothing, no_second_derivative, operator
from .problem import SoftmaxProblem, segments_of_queries


def lowered(p: SoftmaxProblem) -> tuple[Any, ...]:
    """The arguments (q, k, v, q_segment?, k_segment?, q_offset, seed?, mask, scale, dropout_p) of the operators.

    A `key_mask` becomes segment -1; both offset and seed are 0-d tensors, on the CPU unless the offset came from
    elsewhere, whatever torch's default device.
    """
    q_segment = k_segment = None
    if p.segment_ids is not None:
        q_segment = segments_of_queries(p.segment_ids, p.q.shape[2], p.q_offset)
        k_segment = p.segment_ids
    if p.key_mask is not None:
        k_segment = torch.where(p.key_mask, 0 if k_segment is None else k_segment, -1)
    # A copy, because a cache may move its offset on before the backward pass reads it.
    offset = (
        p.q_offset.clone()
        if isinstance(p.q_offset, Tensor)
        else torch.full((), p.q_offset, dtype=torch.int64, device="cpu")
    )
    # The seed comes from torch's generator, so that manual_seed and checkpointing govern the dropout.
    seed = torch.randint(1 << 62, (), device="cpu") if p.dropout_p > 0 else None
    return p.q, p.k, p.v, q_segment, k_segment, offset, seed, p.mask_spec, p.scale, p.dropout_p


_TAGS = (torch.Tag.cudagraph_unsafe,)
"""The operators read numbers on the host, dropout's seed among them: a CUDA graph would repeat those of one call."""


def softmax_operator(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """Register `<name>_forward` -> (out, lse) and `<name>_backward` -> (dq, dk, dv), and return the first.

    forward(*lowered), and backward(grad, q, k, v, out, lse, *the rest of lowered).
    """
    backward_op = operator(
        f"{name}_backward",
        backward,
        _fake_backward,
        keep_nothing,
        no_second_derivative(f'{name} attention has no second derivative; backend="reference" has one'),
        _TAGS,
    )

    def pull(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Any, ...]:
        return (*backward_op(grad, *ctx.saved_tensors, *ctx.scalars), *[None] * 7)

    return operator(f"{name}_forward", forward, _fake_forward, _save, pull, _TAGS)


def _fake_forward(q, k, v, q_segment, k_segment, q_offset, seed, mask, scale, dropout_p):  # type: ignore[no-untyped-def]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def _fake_backward(grad, q, k, v, *others):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, q_segment, k_segment, q_offset, seed, mask, scale, dropout_p = inputs
    ctx.save_for_backward(q, k, v, *output, q_segment, k_segment)
    ctx.scalars = (q_offset, seed, mask, scale, dropout_p)
    ctx.mark_non_differentiable(output[1])
