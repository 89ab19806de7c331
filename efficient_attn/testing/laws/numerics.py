"""Low precision costs no more than it must, and nothing overflows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ...mechanisms import Mechanism
from .. import sampling
from ..sampling import EQUAL, LENGTH, expand_heads, holes, in_dtype, lengths
from .budgets import within_budget
from .law import expect, expect_identical, law

# Equal head sizes, so that fused kernels take part; the other laws have unequal ones.
sample = partial(sampling.sample, v_head_dim=EQUAL)

_SHORT = 5
"""Tokens of what is repeated hundreds of times."""


@law()
def error_is_within_budget(mechanism: Mechanism) -> int:
    """In fp32, bf16 and fp16 every backend errs no more than plain torch, outputs and gradients, against fp64."""
    cases = 0
    exact = in_dtype(mechanism, torch.float64)
    exact.backend = "reference"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        m = in_dtype(mechanism, dtype)
        for length, mask in ((LENGTH, None), (LENGTH, holes(LENGTH)), (130, None)):
            if m.max_seq_len is not None and length > m.max_seq_len:
                continue
            inputs = sample(m, length, dtype=dtype, grad=True)
            doubles = [x.detach().double().requires_grad_() for x in inputs]
            same = [x.detach().requires_grad_() for x in inputs]
            truth = exact(*doubles, key_mask=mask)
            weights = m.matrix(same[0], same[1], key_mask=mask).to(dtype)
            plain = weights @ expand_heads(same[2], inputs[0].shape[1])
            actual = m(*inputs, key_mask=mask)
            what = f"length {length}, {dtype}"
            within_budget(actual, plain, truth, f"output, {what}")
            grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
            gradients = zip(
                torch.autograd.grad(actual, inputs, grad),
                torch.autograd.grad(plain, same, grad),
                torch.autograd.grad(truth, doubles, grad.double()),
                strict=True,
            )
            for name, (a, p, t) in zip("qkv", gradients, strict=True):
                within_budget(a, p, t, f"gradient of {name}, {what}", factor=3.0, mean=False)
            cases += 1
    return cases


@law()
def cancels_nothing_far_from_zero(mechanism: Mechanism) -> int:
    """With queries and keys around -6, where elu + 1 in half precision is 0, outputs err no more than plain torch."""
    exact = in_dtype(mechanism, torch.float64)
    exact.backend = "reference"
    for dtype in (torch.bfloat16, torch.float16):
        m = in_dtype(mechanism, dtype)
        q, k, v = sample(m, dtype=dtype)
        q, k = q - 6, k - 6
        plain = m.matrix(q, k).to(dtype) @ expand_heads(v, q.shape[1])
        within_budget(m(q, k, v), plain, exact(q.double(), k.double(), v.double()), f"output, {dtype}")
    return 2


@law()
def stays_finite(mechanism: Mechanism) -> int:
    """Inputs at 30 and 1000 times their scale, and at the largest fp16 number unless the mechanism declares less,
    give finite outputs and gradients."""
    cases = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        m = in_dtype(mechanism, dtype)
        for factor in (x for x in (30.0, 1000.0, 65504.0) if x <= m.largest_input):
            inputs = [x.detach().clamp(-1, 1) * factor for x in sample(m, dtype=torch.float64)]
            inputs = [x.to(dtype).requires_grad_() for x in inputs]
            out = m(*inputs)
            # A mixture of values with weights beyond 1 (Linformer) may exceed the dtype; nothing else may.
            exact = in_dtype(m, torch.float64)(*(x.double() for x in inputs)).abs()
            fits = exact < torch.finfo(dtype).max / 2
            expect(bool(torch.isfinite(out[fits]).all()), f"output at scale {factor:g}, {dtype}")
            # Small, so that products of inputs and gradients fit the dtype that holds them.
            grads = torch.autograd.grad(out, inputs, torch.where(fits, 1e-4, 0.0).to(dtype))
            for name, grad in zip("qkv", grads, strict=True):
                expect(bool(torch.isfinite(grad).all()), f"gradient of {name} at scale {factor:g}, {dtype}")
            cases += 1
    return cases


@law()
def repeats_bit_for_bit(mechanism: Mechanism) -> int:
    """The same call gives the same bits, outputs and gradients, 250 times over, whatever was called in between."""
    m = in_dtype(mechanism, torch.float32)

    def caller(length: int) -> Callable[[], list[torch.Tensor]]:
        inputs, mask = sample(m, length, dtype=torch.float32, grad=True), holes(length)

        def call() -> list[torch.Tensor]:
            out = m(*inputs, key_mask=mask)
            return [out, *torch.autograd.grad(out.sum(), inputs)]

        return call

    def repeat(
        call: Callable[[], list[torch.Tensor]], first: list[torch.Tensor], times: int, what: str
    ) -> None:
        for _ in range(times):
            for name, actual, expected in zip(("output", "dq", "dk", "dv"), call(), first, strict=True):
                expect_identical(actual, expected, f"{name}{what}")

    long, short = caller(LENGTH), caller(_SHORT)
    first = long()
    repeat(long, first, 20, "")
    repeat(short, short(), 225, f" of {_SHORT} tokens")
    for length in lengths(m):
        m(*sample(m, length, dtype=torch.float32))
    repeat(long, first, 5, ", after other lengths")
    return 250
