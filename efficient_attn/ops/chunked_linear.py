"""Linear attention by Triton kernels that compute the features where they use them, as operators."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..feature_maps import FORMULAS, formula_of
from ..kernels import refusals
from ..kernels.chunked_linear.configs import LARGEST_PROJECTED
from .composed import maximum_of_segment, running_maximum
from .problem import LinearProblem
from .stream import linear_operator

if TYPE_CHECKING:
    from ..kernels.chunked_linear.launch import Exponents, Pass


def refuse(p: LinearProblem) -> list[str]:
    """Why the kernels cannot run this problem."""
    reasons = refusals(p.q.device, p.q.dtype, p.q.shape[3], p.v.shape[3])
    if p.q.dtype == torch.float64 and not any("float64" in reason for reason in reasons):
        reasons.append("does not take torch.float64")
    if formula_of(p.feature_map) is None:
        reasons.append("knows the library's own feature maps, without learnt projections, not this one")
    if getattr(p.feature_map, "projection", None) is not None and p.q.shape[3] > LARGEST_PROJECTED:
        reasons.append(
            f"random features are for head sizes up to {LARGEST_PROJECTED}, not {p.q.shape[3]}: wider projections "
            "spill registers"
        )
    if p.q.shape[2] + p.k.shape[2] >= 1 << 31:
        reasons.append("counts fewer than 2^31 positions")
    return reasons


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    segment: Tensor | None,
    offset: Tensor,
    projection: Tensor | None,
    feature: str,
    scale: float,
    is_causal: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `stream.forward`; what rounding took from the output is kept for a backward pass alone.

    Segments without causality are walked in both directions.
    """
    if _empty(q, k, v):
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lost = torch.zeros_like(out) if keep and q.dtype != torch.float32 else q.new_empty(0)
        return out, lost, q.new_full(q.shape[:3], torch.inf, dtype=torch.float32)
    from ..kernels.chunked_linear import both_ways, launch

    with on_device(q):
        run = _pass(q, k, v, valid, segment, offset, projection, feature, scale, is_causal)
        return (launch if segment is None or is_causal else both_ways).forward(run, keep)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lost: Tensor,
    total: Tensor,
    valid: Tensor | None,
    segment: Tensor | None,
    offset: Tensor,
    projection: Tensor | None,
    feature: str,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `stream.backward`."""
    if _empty(q, k, v):
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))  # type: ignore[return-value]
    from ..kernels.chunked_linear import both_ways, launch

    with on_device(q):
        run = _pass(q, k, v, valid, segment, offset, projection, feature, scale, is_causal)
        walk = launch if segment is None or is_causal else both_ways
        dq, dk, dv, *_ = walk.backward(run, grad, out, lost if lost.numel() else None, total)
        return dq, dk, dv


def _empty(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return q.numel() == 0 or k.numel() == 0 or v.numel() == 0


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device_of(x)


def _pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    segment: Tensor | None,
    offset: Tensor,
    projection: Tensor | None,
    feature: str,
    scale: float,
    is_causal: bool,
) -> Pass:
    from ..kernels.chunked_linear import launch

    exponents = exponents_of(q, k, valid, segment, projection, feature, scale, is_causal)
    # Reading an offset that is on the device would wait for it.
    where = int(offset) if offset.device.type == "cpu" else offset
    walked = is_causal or segment is not None
    return launch.Pass(q, k, v, valid, segment, where, exponents, projection, feature, scale, walked)


def exponents_of(
    q: Tensor,
    k: Tensor,
    valid: Tensor | None,
    segment: Tensor | None,
    projection: Tensor | None,
    feature: str,
    scale: float,
    is_causal: bool,
) -> Exponents | None:
    """What scales the features, of maps whose features have exponents."""
    from ..kernels.chunked_linear import launch

    if not FORMULAS[feature].has_exponent:
        return None
    row_shift, _ = launch.exponents(q, None, projection, feature, scale, of_keys=False)
    shift, exponent = launch.exponents(k, valid, projection, feature, 1.0, of_keys=True)
    assert exponent is not None
    if segment is not None and not is_causal:
        peak = maximum_of_segment(exponent, segment)
    elif is_causal:
        peak = running_maximum(exponent, segment)
    else:
        peak = exponent.amax(2, keepdim=True).expand_as(exponent).contiguous()
    return launch.Exponents(row_shift, shift, exponent, peak)


def _fake_forward(q, k, v, valid, segment, offset, projection, feature, scale, is_causal, keep):  # type: ignore[no-untyped-def]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lost = torch.empty_like(out) if keep and q.dtype != torch.float32 else q.new_empty(0)
    return out, lost, q.new_empty(q.shape[:3], dtype=torch.float32)


_operator = linear_operator("chunked_linear", forward, _fake_forward, backward)


def chunked_linear(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` as a differentiable operator, without `keep`, which it finds out."""
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return _operator(q, k, v, *others, transformed or needed)
