"""The mechanism and the call of a case, with what the call must give."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from efficient_attn import FullAttention
from efficient_attn.mechanisms import LinearMechanism, SoftmaxMechanism
from efficient_attn.testing.sampling import expand_heads, in_dtype, poisoned_allocations

from .case import Case
from .contents import FILLERS, arrange, build, dtype_of, generator, masks_of, valid_keys, values
from .rounding import Rounding, output_bound, rounding

Inputs = tuple[Tensor, Tensor, Tensor]


class Subject:
    """Everything is computed once, when it is first asked for; the exact side is `matrix @ v` in fp64."""

    def __init__(self, case: Case, backend: str | None = None) -> None:
        self.case = case
        self.mechanism = build(case, backend)
        self.exact = in_dtype(self.mechanism, torch.float64)
        self.masks = masks_of(case)
        self.inputs = values(case)
        self.valid = valid_keys(self.masks, self.inputs[1])

    @cached_property
    def doubles(self) -> Inputs:
        """The inputs in fp64, 0 at masked keys."""
        q, k, v = (x.double() for x in self.inputs)
        k, v = (torch.where(self.valid[:, None, :, None], x, 0.0) for x in (k, v))
        return q, k, v

    @cached_property
    def matrix(self) -> Tensor:
        """The weights."""
        return self.exact.matrix(*self.doubles[:2], **self.masks)

    @cached_property
    def truth(self) -> Tensor:
        """The output."""
        return self.matrix @ expand_heads(self.doubles[2], self.case.heads)

    @cached_property
    def visible(self) -> Tensor:
        """(B, H, L, 1): whether the row has a key to attend to, whatever its weight."""
        structure = self.exact
        if not isinstance(structure, SoftmaxMechanism):
            structure = FullAttention(is_causal=structure.is_causal)
        q, k, _ = self.doubles
        return (structure.matrix(q * 0, k * 0, **self.masks) > 0).any(-1, keepdim=True)

    @cached_property
    def vanished(self) -> Tensor:
        """(B, H, L, 1): rows whose weights exist in fp64 but have underflowed in this dtype: they are 0."""
        if not isinstance(self.exact, LinearMechanism) or self.case.dtype == "float64":
            return torch.zeros_like(self.visible)
        q, k, _ = (x.to(dtype_of(self.case)) for x in self.doubles)
        return (self.mechanism.matrix(q, k, **self.masks) == 0).all(-1, keepdim=True) & self.visible

    @cached_property
    def bound(self) -> Tensor:
        """What each entry of the output may be off by."""
        if self.matrix.numel() == 0:
            return torch.zeros_like(self.truth)
        dtype = dtype_of(self.case)
        return output_bound(self.rounding(dtype), self.doubles[2], self.truth, dtype)

    def rounding(self, dtype: torch.dtype) -> Rounding:
        """The bounds for a computation in `dtype`."""
        q, k, _ = self.doubles
        return rounding(self.exact, q, k, self.matrix, self.masks.get("attn_bias"), dtype)

    @cached_property
    def weight(self) -> Tensor:
        """An incoming gradient in fp64 that the dtype holds; small where inputs are large, 0 for vanished rows."""
        size = 1.0 if self.case.magnitudes == (1, 1, 1) else 1e-4
        weight = torch.randn(self.truth.shape, generator=generator(self.case, 4), dtype=torch.float64) * size
        if self.case.layout == "expanded":
            weight = weight[:1, :1].expand(weight.shape)
        weight = weight.to(dtype_of(self.case)).double()
        return torch.where(self.vanished, 0.0, weight)

    @cached_property
    def leaves(self) -> Inputs:
        """The inputs as the case passes them."""
        return self.laid_out(self.filled(self.case.masked))

    @cached_property
    def out(self) -> Tensor:
        """What the call gave."""
        return self.call(self.leaves)

    def filled(self, filler: str) -> Inputs:
        """The inputs with `filler` at masked keys."""
        q, k, v = self.inputs
        if filler and not bool(self.valid.all()):
            k, v = (torch.where(self.valid[:, None, :, None], x, x * FILLERS[filler]) for x in (k, v))
        return q, k, v

    def laid_out(self, inputs: Inputs) -> Inputs:
        """`inputs` in the layout of the case, as leaves if it asks for gradients."""
        wanted = "gradients" in self.case.checks
        q, k, v = (arrange(x, self.case.layout).detach().requires_grad_(wanted) for x in inputs)
        return q, k, v

    def queries_before(self, position: int) -> int:
        """How many queries stand before `position`."""
        case = self.case
        first = case.kv_len - case.q_len if case.q_offset is None else case.q_offset
        return max(0, min(case.q_len, position - first))

    def call(self, inputs: Inputs, **changed: Any) -> Tensor:
        """`forward`, where fresh memory holds NaN."""
        with poisoned_allocations():
            return self.mechanism(*inputs, **{**self.masks, **changed})

    def gradients(self, out: Tensor, inputs: Inputs, weight: Tensor | None = None) -> tuple[Tensor, ...]:
        """The gradients of q, k and v for the incoming gradient `weight`, where fresh memory holds NaN."""
        weight = (self.weight if weight is None else weight).to(out.dtype)
        if self.case.layout == "expanded" and not bool(self.vanished.any()):
            weight = weight[:1, :1].expand(weight.shape)
        else:
            weight = arrange(weight, self.case.layout)
        with poisoned_allocations():
            return torch.autograd.grad(out, inputs, weight, allow_unused=True, materialize_grads=True)
