"""Tracing: meta tensors, torch.compile, torch.export."""

from __future__ import annotations

import torch

from ...mechanisms import Mechanism
from ..sampling import LENGTH, V_HEAD_DIM, head_dim_of, heads_of, holes, in_dtype, sample
from .law import expect, expect_close, law


@law()
def runs_on_meta(mechanism: Mechanism) -> int:
    """Shapes and dtypes come out right without data, forward, backward and in steps."""
    m = in_dtype(mechanism, torch.bfloat16).to("meta")
    heads, kv_heads = heads_of(m)
    size = head_dim_of(m)
    inputs = [
        torch.empty(2, h, LENGTH, e, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for h, e in ((heads, size), (kv_heads, size), (kv_heads, V_HEAD_DIM))
    ]
    out = m(*inputs)
    expect(out.shape == (2, heads, LENGTH, V_HEAD_DIM) and out.dtype == torch.bfloat16, f"output {out}")
    grads = torch.autograd.grad(out.sum(), inputs)
    expect(
        all(g.shape == x.shape and g.dtype == x.dtype for g, x in zip(grads, inputs, strict=True)),
        "gradients",
    )
    if not m.is_causal:
        return 1
    state = m.init_state(2, kv_heads, size, v_head_dim=V_HEAD_DIM, dtype=torch.bfloat16, device="meta")
    for start, stop in ((0, 5), (5, 6), (6, LENGTH)):
        q, k, v = (x[:, :, start:stop].detach() for x in inputs)
        out, state = m.step(q, k, v, state)
        expect(out.shape == (2, heads, stop - start, V_HEAD_DIM) and out.is_meta, f"output {out} of a step")
    return 4


@law()
def compiles_to_one_graph(mechanism: Mechanism) -> int:
    """torch.compile(fullgraph=True, dynamic=True) serves every length with one graph, masks included."""
    import torch._dynamo.testing  # here: it takes seconds, and most laws compile nothing

    m = in_dtype(mechanism, torch.float64)
    for with_mask in (False, True):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(m, backend=counter, fullgraph=True, dynamic=True)
        for length in (LENGTH, 16, 31, 24):
            inputs = sample(m, length, grad=True)
            mask = holes(length) if with_mask else None
            out, expected = compiled(*inputs, key_mask=mask), m(*inputs, key_mask=mask)
            expect_close(out, expected, f"length {length}")
            for a, b in zip(
                torch.autograd.grad(out.sum(), inputs),
                torch.autograd.grad(expected.sum(), inputs),
                strict=True,
            ):
                expect_close(a, b, f"gradients at length {length}")
        expect(counter.frame_count == 1, f"{counter.frame_count} graphs for four lengths")
    torch._dynamo.reset()
    return 8


@law()
def exports(mechanism: Mechanism) -> int:
    """torch.export gives a program that computes the same."""
    m = in_dtype(mechanism, torch.float64)
    inputs = sample(m)
    program = torch.export.export(m, inputs)
    expect_close(program.module()(*inputs), m(*inputs), "the exported program")
    return 1
