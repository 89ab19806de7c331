"""Is it right? Sampled rows against the definition in fp64, before anything is timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contender import Contender, Definition
from .instruments import INSTRUMENTS

STRIPS, ROWS = 8, 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Relative error from which a result is another result, not a rounded one."""


def sampled_strips(length: int, strips: int = STRIPS, rows: int = ROWS) -> list[slice]:
    """Runs of `rows` rows, spread evenly, the first and the last row among them; all rows of a short sequence."""
    if length < 2 * strips * rows:
        return [slice(0, length)]
    starts = [round(i * (length - rows) / (strips - 1)) for i in range(strips)]
    return [slice(start, start + rows) for start in starts]


class Exact:
    """A definition in fp64 on sampled rows; with `cotangent`, its gradients, too.

    Gradients are those of the sampled rows alone (the cotangent is zero elsewhere), so that no N x N matrix is
    ever needed; for keys and values they are compared everywhere.
    """

    def __init__(
        self,
        mechanism: Definition,
        inputs: Sequence[Tensor],
        strips: list[slice],
        cotangent: Tensor | None = None,
    ) -> None:
        double = copy.deepcopy(mechanism).double()
        q, k, v = (x.detach().double().requires_grad_(cotangent is not None) for x in inputs)
        with torch.set_grad_enabled(cotangent is not None):
            rows = [double.matrix(q[:, :, s], k, q_offset=s.start) @ v for s in strips]
            output = torch.cat(rows, 2)
        self.output = output.detach()
        self.gradients: tuple[Tensor, ...] = ()
        if cotangent is not None:
            weighed = torch.cat([cotangent[:, :, s] for s in strips], 2).double()
            self.gradients = torch.autograd.grad(output, (q, k, v, *double.parameters()), weighed)


def sparse_cotangent(like: Tensor, strips: list[slice], seed: int = 1) -> Tensor:
    """Normal on the sampled rows, zero elsewhere."""
    generator = torch.Generator("cpu").manual_seed(seed)
    cotangent = torch.zeros_like(like)
    for strip in strips:
        drawn = torch.randn(cotangent[:, :, strip].shape, generator=generator)
        cotangent[:, :, strip] = drawn.to(cotangent)
    return cotangent


def errors(
    contender: Contender, exact: Exact, strips: list[slice], cotangent: Tensor | None
) -> dict[str, float]:
    """Relative errors of the output, and of the worst gradient if there is a cotangent.

    Fresh memory holds NaN while it runs: what is read before it is written shows. Infinity if not finite.
    """
    poisoned = INSTRUMENTS[exact.output.device.type].poisoned
    with poisoned(), torch.set_grad_enabled(cotangent is not None):
        raw = contender.forward()
        output = contender.to_heads(raw)
        found = {"output": _relative(torch.cat([output[:, :, s] for s in strips], 2), exact.output)}
        if cotangent is not None:
            gradients = torch.autograd.grad(output, contender.leaves, cotangent)
            heads = [*map(contender.to_heads, gradients[:3]), *gradients[3:]]
            pairs = zip(heads, exact.gradients, strict=True)
            found["gradient"] = max(_relative(ours, theirs) for ours, theirs in pairs)
    return found


def is_wrong(found: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether any error is beyond what rounding explains."""
    return not all(error <= TOLERANCE.get(dtype, 1e-6) for error in found.values())


def _relative(actual: Tensor, exact: Tensor) -> float:
    error = float((actual.detach().double() - exact).norm() / exact.norm().clamp(min=1e-300))
    return error if math.isfinite(error) else math.inf


def plain(found: dict[str, float]) -> dict[str, Any]:
    return {name: error if math.isfinite(error) else None for name, error in found.items()}


def said(found: dict[str, float]) -> str:
    return ", ".join(f"{name} off by {error:.2g}" for name, error in found.items())
