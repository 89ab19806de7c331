"""Steps of linear attention by Triton kernels, as operators: one token, or many after a state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..feature_maps import FORMULAS, Features, formula_of
from ..inputs import accumulation_dtype, full_precision, refuse_forward_mode
from .chunked_linear import exponents_of, on_device, refuse
from .composed import composed_step
from .operators import keep_nothing, no_second_derivative, operator
from .problem import LinearProblem

if TYPE_CHECKING:
    from ..kernels.chunked_linear.launch import Pass


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    kv: Tensor,
    exponent: Tensor | None,
    projection: Tensor | None,
    feature: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, H, 1, Ev) of one token, and the state after it; an exponent that there is none of is empty."""
    from ..kernels.decode.linear import linear_step

    with on_device(q):
        out, kv, exponent = linear_step(q, k, v, valid, kv, exponent, projection, feature, scale)
    return out, kv, q.new_empty(0) if exponent is None else exponent


def _fake_step(q, k, v, valid, kv, exponent, projection, feature, scale):  # type: ignore[no-untyped-def]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    after = q.new_empty(0) if exponent is None else torch.empty_like(exponent)
    return out, torch.empty_like(kv, memory_format=torch.contiguous_format), after


_step = operator(
    "chunked_linear_step",
    step,
    _fake_step,
    keep_nothing,
    no_second_derivative("chunked_linear_step has no derivative"),
)


def _pass_after(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    kv: Tensor,
    exponent: Tensor | None,
    projection: Tensor | None,
    feature: str,
    scale: float,
) -> tuple[Pass, Tensor | None]:
    """What the launches share, and what brings the state to the unit of the first token: (B, Hkv, 1, 1)."""
    from ..kernels.chunked_linear import launch

    exponents, factor = exponents_of(q, k, valid, None, projection, feature, scale, True), None
    if exponents is not None and exponent is not None:
        exponents = replace(exponents, peak=torch.maximum(exponents.peak, exponent[..., None]))
        factor = torch.exp2(exponent - exponents.peak[:, :, 0])[..., None, None]
        kv = kv * factor
    run = launch.Pass(q, k, v, valid, None, 0, exponents, projection, feature, scale, True, before=kv)
    return run, factor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    kv: Tensor,
    exponent: Tensor | None,
    projection: Tensor | None,
    feature: str,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lost, total) of `chunked_linear.forward` for new tokens after the state (kv, exponent); the state then.

    kv (B, Hkv, M, Ev + 1) is sum_j phi_j [v_j, 1]^T in units of 2^exponent (B, Hkv); where maps have no exponents
    the one that is returned is empty.
    """
    from ..kernels.chunked_linear import launch

    with on_device(q):
        run, _ = _pass_after(q, k, v, valid, kv, exponent, projection, feature, scale)
        states = run.key_states()
        out, lost, total = launch.forward(run, keep, states)
        after = run.state_of(states, -1).contiguous()
    peak = q.new_empty(0) if run.exponents is None else run.exponents.peak[:, :, -1].contiguous()
    return out, lost, total, after, peak


def backward(
    grad: Tensor,
    grad_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lost: Tensor,
    total: Tensor,
    valid: Tensor | None,
    kv: Tensor,
    exponent: Tensor | None,
    projection: Tensor | None,
    feature: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and kv, from those of the output and of the state after the tokens.

    To the keys, the gradient of the state after them is one more row; the state before them is one more key.
    """
    from ..kernels.chunked_linear import launch

    with on_device(q):
        run, factor = _pass_after(q, k, v, valid, kv, exponent, projection, feature, scale)
        lost_or_none = lost if lost.numel() else None
        dq, dk, dv, before = launch.backward(run, grad, out, lost_or_none, total, grad_kv)
        return dq, dk, dv, (before if factor is None else before * factor).contiguous()


def _fake_forward(q, k, v, valid, kv, exponent, projection, feature, scale, keep):  # type: ignore[no-untyped-def]
    out, after, peak = _fake_step(q, k, v, valid, kv, exponent, projection, feature, scale)
    lost = torch.empty_like(out) if keep and q.dtype != torch.float32 else q.new_empty(0)
    return out, lost, q.new_empty(q.shape[:3], dtype=torch.float32), after, peak


def _fake_backward(grad, grad_kv, q, k, v, out, lost, total, valid, kv, *others):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, kv))


_derivative = operator(
    "chunked_linear_steps_backward",
    backward,
    _fake_backward,
    keep_nothing,
    no_second_derivative(
        'chunked_linear_steps_backward has no derivative of its own; backend="chunked" has one'
    ),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, valid, kv, exponent, projection, feature, scale, _ = inputs
    out, lost, total, _, peak = output
    ctx.save_for_backward(q, k, v, out, lost, total, valid, kv, exponent, projection)
    ctx.scalars = feature, scale
    ctx.mark_non_differentiable(lost, total, peak)


def _pull_back(
    ctx: Any, grad: Tensor, _lost: Any, _total: Any, grad_kv: Tensor, _peak: Any
) -> tuple[Any, ...]:
    # Somebody will differentiate the gradients, if grad is enabled.
    pull = _differentiable if torch.is_grad_enabled() else _derivative
    dq, dk, dv, dkv = pull(grad, grad_kv, *ctx.saved_tensors, *ctx.scalars)
    return dq, dk, dv, None, dkv, *[None] * 5


def _differentiable(  # type: ignore[no-untyped-def]
    grad, grad_kv, q, k, v, out, lost, total, valid, kv, exponent, projection, feature, scale
) -> tuple[Tensor, ...]:
    """`backward` as a function of what autograd looks into."""
    cast = None if projection is None else projection.to(accumulation_dtype(q.dtype))

    def phi(x: Tensor) -> Features:
        return FORMULAS[feature].values(x, cast)

    def run(q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(q.device):
            return composed_step(phi, q, k, v, valid, scale, kv, exponent)[:2]

    return torch.func.vjp(run, q, k, v, kv)[1]((grad, grad_kv))


_steps = operator("chunked_linear_steps_forward", forward, _fake_forward, _save, _pull_back)


def refuse_step(p: LinearProblem, exponent: Tensor | None) -> list[str]:
    """Why the kernels cannot take these tokens on."""
    reasons = refuse(p)
    if exponent is not None and torch.is_grad_enabled() and exponent.requires_grad:
        reasons.append("has no gradient of a state's exponent")
    return reasons


def kernel_step(
    p: LinearProblem, kv: Tensor, exponent: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`linear.linear_step` by kernels: one that reads the state once for a token that nobody differentiates."""
    p.feature_map.check_head_dim(p.q.shape[3])
    refuse_forward_mode(p.q, p.k, p.v, kv)
    projection, name = getattr(p.feature_map, "projection", None), str(formula_of(p.feature_map))
    others = p.key_mask, kv, exponent, projection, name, scale
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (p.q, p.k, p.v, kv))
    if p.q.shape[2] == 1 and not (transformed or differentiated):
        out, kv, after = _step(p.q, p.k, p.v, *others)
    else:
        out, _, _, kv, after = _steps(p.q, p.k, p.v, *others, transformed or differentiated)
    return out, kv, None if exponent is None else after
