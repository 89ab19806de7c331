"""Outputs and gradients of a mechanism against its definition, by the error that plain torch makes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from efficient_attn.mechanisms import Mechanism
from efficient_attn.testing import within_budget
from efficient_attn.testing.laws.law import LawViolation, expect, expect_close
from efficient_attn.testing.sampling import expand_heads, holes, in_dtype, poisoned_allocations, sample

KERNEL = "triton"
"""The backend under test."""

DEVICE = "cpu"
"""Where the kernels run: on the CPU in Triton's interpreter, or on a GPU if a test says so."""

NAMES = ("output", "dq", "dk", "dv")


def here(x: Tensor) -> Tensor:
    """`x` where the kernels run."""
    return x.to(DEVICE)


def gaps(length: int) -> Tensor:
    """A key mask with holes and padding, (2, length)."""
    return here(holes(length))


def takes(mechanism: Mechanism, dtype: torch.dtype) -> bool:
    """Whether the kernels take this dtype here."""
    m = on_the_kernel(mechanism, dtype)
    backend = next(b for b in m.backends if b.name == KERNEL)
    return not backend.refuse(m._problem(*drawn(m, dtype), None, None, None, None))


Formula = Callable[[Mechanism, Tensor, Tensor, Tensor], Tensor]
"""From a mechanism, q, k and v to an output."""


def on_the_kernel(mechanism: Mechanism, dtype: torch.dtype, backend: str = KERNEL) -> Mechanism:
    """A copy in `dtype` that runs on the kernels or raises."""
    m = in_dtype(mechanism, dtype).to(DEVICE)
    m.backend = backend
    return m


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Those of the sum of `out` under fixed random weights."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    grads = torch.autograd.grad(
        out, inputs, weight.to(out.device, out.dtype), allow_unused=True, materialize_grads=True
    )
    return list(grads)


def run(formula: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output of `formula` and its gradients, from memory that held NaN."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with poisoned_allocations():
        out = formula(*leaves)
        return [out.detach(), *gradients(out, leaves)]


def by_matrix(m: Mechanism, q: Tensor, k: Tensor, v: Tensor, masks: dict | None = None) -> Tensor:
    """`matrix @ v` in the dtype of q."""
    return m.matrix(q, k, **(masks or {})).to(q.dtype) @ expand_heads(v, q.shape[1])


def judge(m: Mechanism, actual: Formula, definition: Formula, inputs: list[Tensor], what: str) -> None:
    """`actual` errs, in outputs and gradients, about as much as plain torch in the same dtype, against fp64.

    In fp64, which the interpreter alone gives to kernels, nothing but the order of sums may differ.

    Plain torch is `definition`, or else `actual` on the portable backend: of a single key a matrix may hit the exact
    weight 1, which no sum divided by a sum need do.
    """
    exact = copy.deepcopy(m).to(torch.float64)
    exact.backend = "reference"
    doubles = [x.double() for x in inputs]
    results = run(lambda *x: actual(m, *x), inputs)
    plain = run(lambda *x: definition(m, *x), inputs)
    truth = run(lambda *x: definition(exact, *x), doubles)
    portable: list[Tensor] = []
    for number, (name, a, p, t) in enumerate(zip(NAMES, results, plain, truth, strict=True)):
        expect(a.dtype == p.dtype, f"{name}, {what}: {a.dtype}, not {p.dtype}")
        expect(a.shape == p.shape, f"{name}, {what}: shape {tuple(a.shape)}, not {tuple(p.shape)}")
        if a.dtype == torch.float64:
            expect_close(a, t, f"{name}, {what}", 1e-9 if number == 0 else 1e-8)
            continue
        rule: dict = {} if number == 0 else {"factor": 3.0, "mean": False}
        try:
            within_budget(a, p, t, f"{name}, {what}", **rule)
        except LawViolation:
            portable = portable or run(lambda *x: actual(on_portable(m), *x), inputs)
            within_budget(a, portable[number], t, f"{name}, {what}", **rule)


def on_portable(m: Mechanism) -> Mechanism:
    """A copy of `m` on the first backend that runs wherever torch does."""
    twin = copy.deepcopy(m)
    twin.backend = next(b.name for b in m.backends if b.portable and not b.by_name_only)
    return twin


def judge_masked(m: Mechanism, inputs: list[Tensor], masks: dict, what: str) -> None:
    """The forward pass under these masks, against the matrix under them."""
    judge(
        m,
        lambda m, q, k, v: m(q, k, v, **masks),
        lambda m, q, k, v: by_matrix(m, q, k, v, masks),
        inputs,
        what,
    )


def judge_output(
    m: Mechanism, actual: Callable[..., Tensor], inputs: list[Tensor], masks: dict, what: str
) -> None:
    """`actual`, a function of q, k and v, errs about as much as the matrix of `m` in the same dtype."""
    exact = copy.deepcopy(m).to(torch.float64)
    truth = by_matrix(exact, *(x.double() for x in inputs), masks)
    with torch.no_grad(), poisoned_allocations():
        out = actual(*inputs)
    within_budget(out, by_matrix(m, *inputs, masks), truth, what)


def drawn(m: Mechanism, dtype: torch.dtype, *lengths: int, kv_heads: int = 1, **options: int) -> list[Tensor]:
    """Random q, k and v that fit `m`, two heads of q over each of the others; two of these if a law asks."""
    q, k, v = sample(m, *lengths, dtype=dtype, **options)
    return [here(q[:, : 2 * kv_heads]), here(k[:, :kv_heads]), here(v[:, :kv_heads])]
