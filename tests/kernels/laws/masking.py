"""What is masked, or lies in the future, does not exist for a kernel."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from efficient_attn.mechanisms import Mechanism
from efficient_attn.testing.laws.law import expect, expect_identical
from efficient_attn.testing.sampling import LENGTH

from ..judging import NAMES, by_matrix, drawn, gaps, here, judge, judge_masked, on_the_kernel, run
from .law import DTYPES, SHORT, law


def _alike(results: list[Tensor], expected: list[Tensor], what: str) -> None:
    for name, a, b in zip(NAMES, results, expected, strict=True):
        expect_identical(a, b, f"{name}, {what}")


@law()
def kernel_equals_padded_alone(mechanism: Mechanism) -> int:
    """A row padded left and right is the row alone."""
    m, left, right = on_the_kernel(mechanism, torch.float32), 6, 4
    mask = here(torch.zeros(1, LENGTH, dtype=torch.bool))
    inside = slice(left, LENGTH - right)
    mask[:, inside] = True
    judge(
        m,
        lambda m, q, k, v: m(q, k, v, key_mask=mask)[:, :, inside],
        lambda m, q, k, v: by_matrix(m, *(x[:, :, inside] for x in (q, k, v))),
        drawn(m, torch.float32, batch=1),
        f"{left} left and {right} right of a row",
    )
    return 1


@law(lambda m: m.supports_segments)
def kernel_isolates_documents(mechanism: Mechanism) -> int:
    """Documents packed into a row are the documents alone; interleaved and negative segments are isolated too."""
    m, cases = on_the_kernel(mechanism, torch.float32), 0
    for dtype, sizes in ((torch.float32, (10, 1, 20, 6)), (torch.float16, (30, 0, 7))):
        m, segments = (
            on_the_kernel(mechanism, dtype),
            here(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))),
        )

        def alone(m: Mechanism, *inputs: Tensor, sizes: tuple[int, ...] = sizes) -> Tensor:
            documents = zip(*(x.split(sizes, 2) for x in inputs), strict=True)
            return torch.cat([by_matrix(m, *document) for document in documents], 2)

        packed = partial(_packed, segments=segments[None])
        judge(m, packed, alone, drawn(m, dtype, batch=1), f"documents of {sizes}, {dtype}")
        cases += 1
    m = on_the_kernel(mechanism, torch.float32)
    mixed = here(torch.randint(-1, 3, (2, LENGTH), generator=torch.Generator().manual_seed(2)))
    inputs = drawn(m, torch.float32)
    judge_masked(m, inputs, {"segment_ids": mixed}, "interleaved segments")
    nothing = (m(*inputs, segment_ids=mixed).transpose(1, 2)[mixed < 0] == 0).all()
    expect(bool(nothing), "the output of a padding position is not zero")
    return cases + 1


def _packed(m: Mechanism, q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
    return m(q, k, v, segment_ids=segments)


@law(lambda m: m.is_causal)
def kernel_sees_no_future(mechanism: Mechanism) -> int:
    """Replacing the future, at any scale that the dtype holds, leaves the past bit-identical."""
    cases = 0
    for dtype, mask, factors in ((torch.float32, None, (1.0, 1e18)), (torch.float16, gaps(LENGTH), (1e4,))):
        m = on_the_kernel(mechanism, dtype)
        inputs, others = drawn(m, dtype), drawn(m, dtype, seed=1)
        before = m(*inputs, key_mask=mask)
        for cut in (1, 17, LENGTH - 1):
            for factor in factors:
                changed = [
                    torch.cat([a[:, :, :cut], b[:, :, cut:] * factor], 2)
                    for a, b in zip(inputs, others, strict=True)
                ]
                after = m(*changed, key_mask=mask)
                what = f"outputs before {cut} with the future x{factor:g}, {dtype}"
                expect_identical(after[:, :, :cut], before[:, :, :cut], what)
                cases += 1
    return cases


@law(lambda m: m.is_causal)
def kernel_sends_no_gradient_to_the_future(mechanism: Mechanism) -> int:
    """The gradient of earlier outputs with respect to later tokens is exactly zero."""
    for dtype, cut in ((torch.float32, 16), (torch.float16, 5)):
        m = on_the_kernel(mechanism, dtype)
        inputs = [x.requires_grad_() for x in drawn(m, dtype)]
        grads = torch.autograd.grad(m(*inputs)[:, :, :cut].sum(), inputs)
        for name, grad in zip("qkv", grads, strict=True):
            expect(bool((grad[:, :, cut:] == 0).all()), f"gradient of {name} after {cut}, {dtype}")
        expect(bool((grads[2][:, :, :cut] != 0).any()), f"the gradient of v before {cut} is zero, {dtype}")
    return 2


@law()
def kernel_ignores_masked_content(mechanism: Mechanism) -> int:
    """Whatever stands at masked keys, NaN and Inf too, outputs and gradients are bit-identical."""
    m, mask = on_the_kernel(mechanism, torch.float32), gaps(SHORT)
    q, k, v = drawn(m, torch.float32, SHORT)
    results = []
    for content in (0.0, torch.nan, torch.inf):
        filled = [x.masked_fill(~mask[:, None, :, None], content) for x in (k, v)]
        results.append(run(lambda *x: m(*x, key_mask=mask), [q, *filled]))
    for content, result in zip(("NaN", "Inf"), results[1:], strict=True):
        _alike(result, results[0], f"{content} at masked keys")
    return 2


@law()
def kernel_gives_zero_for_nothing(mechanism: Mechanism) -> int:
    """A row without a valid key gives zeros and zero gradients, beside a row that is whole."""
    for dtype in DTYPES:
        m, mask = on_the_kernel(mechanism, dtype), here(torch.ones(2, SHORT, dtype=torch.bool))
        mask[1] = False
        for name, x in zip(NAMES, run(partial(m, key_mask=mask), drawn(m, dtype, SHORT)), strict=True):
            expect(bool(torch.isfinite(x).all()), f"{name} is not finite, {dtype}")
            expect(bool((x[1] == 0).all()), f"{name} of a fully masked row is not zero, {dtype}")
            expect(bool((x[0] != 0).any()), f"{name} of a whole row is zero, {dtype}")
    return 2


@law()
def kernel_keeps_rows_apart(mechanism: Mechanism) -> int:
    """A row's output and gradients do not depend on what stands in other rows, NaN included."""
    m = on_the_kernel(mechanism, torch.float32)
    results = []
    for factor in (1.0, torch.nan):
        inputs = drawn(m, torch.float32, SHORT, kv_heads=2)
        for x in inputs:
            x[1] *= factor
        results.append([x[0] for x in run(partial(m, key_mask=gaps(SHORT)), inputs)])
    _alike(results[1], results[0], "a row beside a neighbour of NaN")
    return 1
