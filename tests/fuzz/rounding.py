"""How far rounding may take a result: running error bounds, to first order and for the worst case.

With unit roundoff u, a sum of n products is off by at most (n + 2) u times the sum of their magnitudes (Higham,
"Accuracy and Stability of Numerical Algorithms", 2nd edition, section 3.1), and an error d in a logarithm of a
weight is a relative error exp(d) - 1 in the weight. No tolerance is chosen by hand beyond the constants here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_attn import LinearAttention, LinformerAttention, PerformerAttention
from efficient_attn.inputs import accumulation_dtype
from efficient_attn.mechanisms import LinearMechanism, Mechanism
from efficient_attn.testing.sampling import expand_heads

_EXP = 48
"""Units in the last place that exp and log together may lose: vectorised ones are fast before they are exact."""


@dataclass
class Rounding:
    """What a mechanism's weights and their derivatives may be off by, in fp64."""

    weights: Tensor
    """(B, H, L, S): the magnitude of what is summed up to each weight."""
    errors: Tensor
    """(B, H, L, S): what each weight may be off by."""
    slopes: tuple[Tensor, Tensor] | None
    """Bounds on the derivatives of a weight's logarithm by an entry of q, (B, H, L, E) and of k, (B, H, S, E)."""
    narrow: bool = False
    """Whether weights may be rounded to half precision before they meet the values, as fused kernels do."""
    drift: Tensor | float = 0.0
    """(B, H, L, 1): what a row's weights may sum to besides 1, relatively, if their total is kept as a logarithm."""


def subnormal_of(dtype: torch.dtype) -> float:
    """The smallest positive number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def unit_of(dtype: torch.dtype) -> float:
    """The unit roundoff."""
    return torch.finfo(dtype).eps / 2


def rounding(
    m: Mechanism, q: Tensor, k: Tensor, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Rounding:
    """The bounds for `m` called with q and k (in fp64 here) in `dtype`; `matrix` is its exact matrix."""
    u = unit_of(accumulation_dtype(dtype))
    k = expand_heads(k, q.shape[1])
    if isinstance(m, LinformerAttention):
        return _compressed(m, q, k, matrix, u)
    if isinstance(m, LinearMechanism):
        return _linear(m, q, k, matrix, u)
    scale = q.shape[3] ** -0.5 if m.scale is None else m.scale
    scores = scale * q.abs() @ k.abs().mT
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + torch.where(bias.isinf(), 0.0, bias.double()).abs()
    peak = scores.amax(-1, keepdim=True)
    logarithm = u * ((q.shape[3] + 8) * peak + _EXP)
    relative = 2 * logarithm.expm1() + (k.shape[2] + 16) * u
    slopes = (
        scale * k.abs().amax(2, keepdim=True).expand(*q.shape),
        scale * q.abs().amax(2, keepdim=True).expand(*k.shape),
    )
    return Rounding(matrix, _errors(relative, matrix, 1.0), slopes, True, (8 * u * peak).expm1())


def _errors(relative: Tensor, weights: Tensor, most: float) -> Tensor:
    """Weights are not negative and sum to 1, so none is off by more than `most`, whatever has become of it."""
    return torch.where(relative < 1, (relative * weights).clamp(max=most), most)


def _compressed(m: LinformerAttention, q: Tensor, k: Tensor, matrix: Tensor, u: float) -> Rounding:
    """Every weight is a sum over `rank` products that cancel: bounded by the largest entry of F."""
    scale = q.shape[3] ** -0.5 if m.scale is None else m.scale
    e_max = m.key_projection.detach().double().abs().max()
    f = m.key_projection if m.value_projection is None else m.value_projection
    f_max = f.detach().double().abs().max()
    compressed = e_max * k.abs().sum(2, keepdim=True)
    scores = scale * q.abs() @ compressed.mT
    logarithm = u * ((q.shape[3] + k.shape[2] + 8) * scores + _EXP)
    relative = 2 * logarithm.expm1() + (k.shape[2] + m.rank + 16) * u
    weights = torch.full_like(matrix, float(f_max))
    slopes = (
        scale * compressed.expand(*q.shape),
        scale * e_max * m.rank * q.abs().amax(2, keepdim=True).expand(*k.shape),
    )
    return Rounding(weights, _errors(relative, weights, 2 * float(f_max)), slopes)


def _linear(m: LinearMechanism, q: Tensor, k: Tensor, matrix: Tensor, u: float) -> Rounding:
    """Sums of non-negative products: as accurate, relatively, as the features."""
    size, scale = q.shape[3], 1.0 if m.scale is None else m.scale * q.shape[3] ** 0.5
    q, features = q * scale, m.feature_map.num_features(size)
    summed = (k.shape[2] + features + 16) * u
    if isinstance(m, PerformerAttention):
        projection = m.feature_map.projection.detach().double().abs()
        q, k = q * size**-0.25, k * size**-0.25
        if m.kernel == "relu":
            return Rounding(matrix, _of_cancelling_features(m, q, k, matrix, u) + summed * matrix, None)
        exponents = [(x.abs() @ projection.mT).amax(-1) + x.square().sum(-1) for x in (q, k)]
        logarithms = [u * ((size + 8) * exponent + _EXP) for exponent in exponents]
        steep = [size**-0.25 * (projection.max() + x.abs()) for x in (q, k)]
        slopes = (scale * steep[0], steep[1])
    elif isinstance(m, LinearAttention) and m.feature_map.name in ("elu", "exp"):
        logarithms = [u * (8 * x.abs().amax(-1) + _EXP) for x in (q, k)]
        slopes = (torch.full_like(q, scale), torch.ones_like(k))
    else:
        logarithms, slopes = [torch.full(x.shape[:3], _EXP * u, dtype=x.dtype) for x in (q, k)], None
    logarithm = logarithms[0][..., None] + logarithms[1][..., None, :].amax(-1, keepdim=True)
    errors = _errors(2 * logarithm.expm1() + summed, matrix, 1.0)
    # Products that underflow, beside a total that is only just large enough to divide by.
    lost = features * max(1.0, float(q.abs().max()), float(k.abs().max())) * (1e-50 if u < 1e-10 else 1e-14)
    return Rounding(matrix, errors + lost, slopes)


def _of_cancelling_features(m: PerformerAttention, q: Tensor, k: Tensor, matrix: Tensor, u: float) -> Tensor:
    """max(w . x, 0) has an absolute error, and no relative one."""
    projection = m.feature_map.projection.detach().double()
    phi_q, phi_k = (torch.relu(x @ projection.mT) for x in (q, k))
    q_in, k_in = (x.abs() @ projection.abs().mT for x in (q, k))
    weights = phi_q @ phi_k.mT
    off = (q.shape[3] + 4) * u * (q_in @ phi_k.mT + (phi_q + q_in * u) @ k_in.mT)
    # The matrix is the weights over their total over visible keys, so it gives that total away.
    top = matrix.amax(-1, keepdim=True)
    total = weights.gather(-1, matrix.argmax(-1, keepdim=True)) / torch.where(top == 0, 1.0, top)
    return torch.where(top == 0, 1.0, (off / torch.where(total == 0, 1.0, total)).clamp(max=1.0))


def output_bound(r: Rounding, v: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """What each entry of the output in `dtype` may be off by."""
    v = expand_heads(v.abs(), truth.shape[1])
    bound = r.errors @ v + r.errors.sum(-1, keepdim=True) * truth.abs()
    bound = bound + 2 * unit_of(dtype) * truth.abs()
    if torch.finfo(dtype).bits < 32 and r.narrow:
        bound = bound + 4 * unit_of(dtype) * (r.weights @ v)
        bound = bound + subnormal_of(dtype) * v.sum(2, keepdim=True)
    return bound + 2 * subnormal_of(dtype) + _underflow(accumulation_dtype(dtype), v)


def gradient_bounds(
    r: Rounding, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, truths: tuple[Tensor, ...], dtype: torch.dtype
) -> list[Tensor] | None:
    """What each entry of the gradients of q, k and v may be off by; None if the slopes have no bound."""
    if r.slopes is None:
        return None
    narrow = r.narrow and torch.finfo(dtype).bits < 32
    floor = subnormal_of(dtype) if narrow else 0.0
    lost = 8 * unit_of(dtype) if narrow else 0.0
    lost += (k.shape[2] + v.shape[3] + 16) * unit_of(accumulation_dtype(dtype))
    errors = r.errors + lost * r.weights + floor
    terms = grad.abs() @ expand_heads(v.abs(), q.shape[1]).mT
    sums = ((r.weights + r.errors) * terms).sum(-1, keepdim=True)
    scores = errors * (terms + sums) + floor
    q_slope, k_slope = r.slopes
    raw = (
        q_slope * scores.sum(-1, keepdim=True),
        _shared(k_slope * scores.sum(-2)[..., None], k.shape[1]),
        _shared(errors.mT @ grad.abs(), k.shape[1]),
    )
    lost_below = 2 * subnormal_of(dtype) + _underflow(accumulation_dtype(dtype), q, k, v, grad)
    return [
        4 * bound + 2 * unit_of(dtype) * truth.abs() + lost_below
        for bound, truth in zip(raw, truths, strict=True)
    ]


def _underflow(dtype: torch.dtype, *factors: Tensor) -> float:
    """What products with `factors` in between may lose by underflow, many of them together."""
    largest = max((float(x.abs().max()) for x in factors if x.numel()), default=0.0)
    return torch.finfo(dtype).smallest_normal * max(1.0, largest) ** 2


def _shared(x: Tensor, kv_heads: int) -> Tensor:
    """The sum over the query heads that share a key-value head."""
    return x.unflatten(1, (kv_heads, -1)).sum(2)
