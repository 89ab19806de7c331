"""Nothing reads the future. Bit equality, because a detached maximum hides a leak from gradients."""

from __future__ import annotations

from functools import partial

import torch

from ...mechanisms import Mechanism
from .. import sampling
from ..sampling import EQUAL, LENGTH, holes, in_dtype
from .law import expect, expect_close, expect_identical, law

# Equal head sizes, so that fused kernels take part; the other laws have unequal ones.
sample = partial(sampling.sample, v_head_dim=EQUAL)

_CUTS = (1, 5, 16, LENGTH - 1)


@law(lambda m: m.is_causal)
def sees_no_future(mechanism: Mechanism) -> int:
    """Replacing the future, at any scale that the dtype holds, leaves the past bit-identical."""
    cases = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        m = in_dtype(mechanism, dtype)
        # The last squares within the dtype: beside it, what shares its stabiliser underflows.
        factors = (1.0, 10.0, 1000.0, 1e18 if dtype != torch.float16 else 1e4)
        for mask in (None, holes(LENGTH)):
            q, k, v = sample(m, dtype=dtype)
            before = m(q, k, v, key_mask=mask)
            for cut in _CUTS:
                for factor in factors:
                    others = sample(m, dtype=dtype, seed=1)
                    changed = [
                        torch.cat([a[:, :, :cut], b[:, :, cut:] * factor], 2)
                        for a, b in zip((q, k, v), others, strict=True)
                    ]
                    after = m(*changed, key_mask=mask)
                    what = f"outputs before {cut} with the future x{factor:g}, {dtype}"
                    expect_identical(after[:, :, :cut], before[:, :, :cut], what)
                    cases += 1
    return cases


@law(lambda m: m.is_causal)
def sends_no_gradient_to_the_future(mechanism: Mechanism) -> int:
    """The gradient of earlier outputs with respect to later tokens is exactly zero."""
    for dtype in (torch.float32, torch.bfloat16):
        m = in_dtype(mechanism, dtype)
        for cut in _CUTS:
            inputs = sample(m, dtype=dtype, grad=True)
            m(*inputs)[:, :, :cut].sum().backward()
            for name, x in zip("qkv", inputs, strict=True):
                assert x.grad is not None
                expect(bool((x.grad[:, :, cut:] == 0).all()), f"gradient of {name} after {cut}, {dtype}")
    return 2 * len(_CUTS)


@law(lambda m: m.is_causal)
def matrix_is_lower_triangular(mechanism: Mechanism) -> int:
    """The matrix has exact zeros above the diagonal, wherever the queries stand."""
    m = in_dtype(mechanism, torch.float64)
    q, k, _ = sample(m)
    expect(bool((m.matrix(q, k).triu(1) == 0).all()), "a weight above the diagonal")
    for offset in (0, 3, LENGTH - 6):
        matrix = m.matrix(q[:, :, :6], k, q_offset=offset)
        expect(
            bool((matrix.triu(offset + 1) == 0).all()), f"a weight above the diagonal at q_offset {offset}"
        )
    return 4


@law(lambda m: m.is_causal)
def prefix_equals_whole(mechanism: Mechanism) -> int:
    """The output on a prefix is the prefix of the output."""
    m = in_dtype(mechanism, torch.float64)
    q, k, v = sample(m)
    whole = m(q, k, v)
    for cut in _CUTS:
        part = m(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut])
        expect_close(part, whole[:, :, :cut], f"prefix of length {cut}")
    return len(_CUTS)
