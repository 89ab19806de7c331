"""A kernel computes the mechanism's matrix times the values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from efficient_attn.mechanisms import Mechanism
from efficient_attn.testing.laws.law import expect, expect_identical
from efficient_attn.testing.sampling import EQUAL, LENGTH, V_HEAD_DIM, head_dim_of, heads_of

from ..judging import KERNEL, NAMES, drawn, gaps, here, judge_masked, on_the_kernel, run, takes
from .law import DTYPES, SHORT, law


@law()
def kernel_is_chosen(mechanism: Mechanism) -> int:
    """Where the kernels run, they are what "auto" chooses, and `explain` says so."""
    for dtype in DTYPES:
        m = on_the_kernel(mechanism, dtype, "auto")
        said = m.explain(*drawn(m, dtype))
        expect(f"backend: {KERNEL}\n" in said and f"{KERNEL}: chosen" in said, said)
    return len(DTYPES)


@law()
def kernel_equals_the_matrix(mechanism: Mechanism) -> int:
    """Outputs and gradients are those of matrix @ v at awkward lengths, with and without padding and holes."""
    cases = 0
    for dtype, length, masks in (
        (torch.float64, LENGTH, {}),
        (torch.float64, SHORT, {"key_mask": gaps(SHORT)}),
        (torch.float32, 1, {}),
        (torch.float32, 16, {"key_mask": gaps(16)}),
        (torch.float32, 65, {}),
        (torch.float16, LENGTH, {"key_mask": gaps(LENGTH)}),
    ):
        if dtype == torch.float64 and not takes(mechanism, dtype):
            continue
        m = on_the_kernel(mechanism, dtype)
        inputs = drawn(m, dtype, length, kv_heads=2 if length < LENGTH else 1)
        judge_masked(m, inputs, masks, f"length {length}, {dtype}, {list(masks)}")
        cases += 1
    return cases


@law()
def kernel_takes_equal_head_sizes(mechanism: Mechanism) -> int:
    """Where values are as wide as keys, in fp16, too."""
    m = on_the_kernel(mechanism, torch.float16)
    judge_masked(
        m, drawn(m, torch.float16, 70, batch=1, kv_heads=2, v_head_dim=EQUAL), {}, "70 tokens, float16"
    )
    return 1


@law()
def kernel_places_queries(mechanism: Mechanism) -> int:
    """Fewer or more queries than keys stand where q_offset says, an int or a tensor, or else at the end."""
    m, cases = on_the_kernel(mechanism, torch.float32), 0
    for q_len, kv_len, offset in (
        (5, LENGTH, None),
        (6, LENGTH, 9),
        (9, 6, 0),
        (1, LENGTH, here(torch.tensor(20))),
    ):
        masks = {"q_offset": offset, "key_mask": gaps(kv_len)}
        what = f"{q_len} queries, {kv_len} keys, q_offset {offset}"
        judge_masked(m, drawn(m, torch.float32, q_len, kv_len, kv_heads=2), masks, what)
        cases += 1
    return cases


@law(lambda m: m.supports_segments)
def kernel_places_queries_among_documents(mechanism: Mechanism) -> int:
    """With packed documents too, fewer queries than keys stand where q_offset says."""
    m = on_the_kernel(mechanism, torch.float32)
    masks = {
        "q_offset": 9,
        "key_mask": gaps(LENGTH),
        "segment_ids": here(torch.arange(LENGTH) // 11).expand(2, -1),
    }
    judge_masked(m, drawn(m, torch.float32, 12, LENGTH), masks, "12 queries at 9, segments")
    return 1


@law()
def kernel_reaches_many_keys(mechanism: Mechanism) -> int:
    """A few queries over more keys than any block takes at once."""
    m = on_the_kernel(mechanism, torch.float32)
    judge_masked(m, drawn(m, torch.float32, 3, 400, batch=1), {}, "3 queries, 400 keys")
    return 1


@law()
def kernel_takes_empty_inputs(mechanism: Mechanism) -> int:
    """No batch, no queries, no keys: right shapes, zeros where there is nothing to attend to, gradients that exist."""
    m = on_the_kernel(mechanism, torch.float32)
    heads, kv_heads = heads_of(m)
    size = head_dim_of(m)
    shapes = ((0, 7, 7), (2, 0, 7), (2, 0, 0), (2, 3, 0), (0, 0, 0))
    for batch, q_len, kv_len in shapes:
        sizes = ((heads, q_len, size), (kv_heads, kv_len, size), (kv_heads, kv_len, V_HEAD_DIM))
        inputs = [here(torch.randn(batch, *rest)) for rest in sizes]
        mask = here(torch.ones(batch, kv_len, dtype=torch.bool))
        out, *grads = run(partial(m, q_offset=0, key_mask=mask), inputs)
        expect(out.shape == (batch, heads, q_len, V_HEAD_DIM), f"output {tuple(out.shape)}")
        expect(bool((out == 0).all()) or kv_len > 0, "something came from no keys")
        for x, grad in zip(inputs, grads, strict=True):
            expect(grad.shape == x.shape and bool(torch.isfinite(grad).all()), "gradient")
    return len(shapes)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimension outside": lambda x: x.mT.contiguous().mT,
    "with gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "all expanded from one number": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


@law()
def kernel_takes_any_layout(mechanism: Mechanism) -> int:
    """Transposed, sliced and expanded inputs and output gradients give the same bits as contiguous ones."""
    m = on_the_kernel(mechanism, torch.float32)
    inputs = drawn(m, torch.float32, 12)
    grad = here(torch.randn(m(*inputs).shape, generator=torch.Generator().manual_seed(8)))
    for what, layout in _LAYOUTS.items():
        results = []
        strange = [layout(x) for x in (*inputs, grad)]
        plain = [x.clone(memory_format=torch.contiguous_format) for x in strange]
        for *qkv, weight in (strange, plain):
            leaves = [x.detach().requires_grad_() for x in qkv]
            out = m(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, weight)])
        for name, a, b in zip(NAMES, *results, strict=True):
            expect_identical(a, b, f"{name}, inputs and gradient {what}")
    return len(_LAYOUTS)
