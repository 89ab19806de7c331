"""What is masked does not exist: padding, other documents, other rows of the batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...mechanisms import Mechanism
from .. import sampling
from ..sampling import EQUAL, LENGTH, holes, in_dtype, lengths
from .law import expect, expect_close, expect_identical, law

# Equal head sizes, so that fused kernels take part; the other laws have unequal ones.
sample = partial(sampling.sample, v_head_dim=EQUAL)

_CONTENTS = {"x1": 1.0, "x100": 100.0, "NaN": torch.nan, "Inf": torch.inf}


def _fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x.dtype)
    return torch.where(mask[:, None, :, None], x, noise * value)


@law()
def padding_content_is_invisible(mechanism: Mechanism) -> int:
    """Whatever stands at masked keys, NaN and Inf too, outputs and gradients are bit-identical."""
    for dtype in (torch.float32, torch.bfloat16):
        m, mask = in_dtype(mechanism, dtype), holes(LENGTH)
        results = []
        for value in (0.0, *_CONTENTS.values()):
            q, k, v = (x.detach() for x in sample(m, dtype=dtype))
            inputs = [x.requires_grad_() for x in (q, _fill(k, mask, value), _fill(v, mask, value))]
            out = m(*inputs, key_mask=mask)
            results.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
        for content, result in zip(_CONTENTS, results[1:], strict=True):
            for name, actual, expected in zip(("output", "dq", "dk", "dv"), result, results[0], strict=True):
                expect_identical(actual, expected, f"{name} with {content} at masked keys, {dtype}")
        for name, x in (("k", results[0][2]), ("v", results[0][3])):
            expect(
                bool((x.transpose(1, 2)[~mask] == 0).all()), f"the gradient of a masked {name} is not zero"
            )
    return 2 * len(_CONTENTS)


@law()
def masked_keys_have_no_weight(mechanism: Mechanism) -> int:
    """The matrix is exactly zero at masked keys."""
    m, cases = in_dtype(mechanism, torch.float64), 0
    for length in lengths(m):
        q, k, _ = sample(m, length)
        mask = holes(length)
        matrix = m.matrix(q, k, key_mask=mask)
        expect(
            bool((matrix.permute(0, 3, 1, 2)[~mask] == 0).all()), f"weight on a masked key, length {length}"
        )
        cases += 1
    return cases


@law()
def nothing_to_attend_to_gives_zero(mechanism: Mechanism) -> int:
    """A row without a valid key gives zeros and zero gradients, never NaN, beside a row that is whole."""
    for dtype in (torch.float32, torch.bfloat16):
        m = in_dtype(mechanism, dtype)
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        mask[1] = False
        inputs = sample(m, dtype=dtype, grad=True)
        out = m(*inputs, key_mask=mask)
        expect(bool((out[1] == 0).all()), f"output of a fully masked row is not zero, {dtype}")
        expect(bool((m.matrix(*inputs[:2], key_mask=mask)[1] == 0).all()), "matrix of a fully masked row")
        for name, grad in zip("qkv", torch.autograd.grad(out.sum(), inputs), strict=True):
            expect(bool(torch.isfinite(grad).all()), f"gradient of {name} is not finite, {dtype}")
            expect(bool((grad[1] == 0).all()), f"gradient of {name} of a fully masked row, {dtype}")
    return 2


@law()
def padded_equals_unpadded(mechanism: Mechanism) -> int:
    """A row padded left, right or both is the row alone, gradients included."""
    m, cases = in_dtype(mechanism, torch.float64), 0
    for left, right in ((6, 0), (0, 7), (5, 8)):
        length = LENGTH - left - right
        q, k, v = sample(m, batch=1, grad=True)
        inside = slice(left, LENGTH - right)
        mask = torch.zeros(1, LENGTH, dtype=torch.bool)
        mask[:, inside] = True
        padded = m(q, k, v, key_mask=mask)[:, :, inside]
        alone = m(q[:, :, inside], k[:, :, inside], v[:, :, inside])
        what = f"{length} tokens with {left} left and {right} right of them"
        expect_close(padded, alone, f"output of {what}")
        for name, a, b in zip(
            "qkv",
            torch.autograd.grad(padded.sum(), (q, k, v)),
            torch.autograd.grad(alone.sum(), (q, k, v)),
            strict=True,
        ):
            expect_close(a, b, f"gradient of {name} of {what}", 1e-8)
        cases += 1
    return cases


@law(lambda m: m.supports_segments)
def packed_equals_separate(mechanism: Mechanism) -> int:
    """Documents packed into one row are the documents alone: every one, of any length, gradients included."""
    m, cases = in_dtype(mechanism, torch.float64), 0
    for sizes in ((10, 1, 20, 6), (LENGTH,), (1,) * 8, (30, 0, 7)):
        total = sum(sizes)
        q, k, v = sample(m, total, batch=1, grad=True)
        for name, ids in (("ascending", range(len(sizes))), ("descending", range(len(sizes), 0, -1))):
            segments = torch.repeat_interleave(torch.tensor(list(ids)), torch.tensor(sizes))[None]
            packed = m(q, k, v, segment_ids=segments)
            parts = [m(*part) for part in zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True)]
            for number, (a, b) in enumerate(zip(packed.split(sizes, 2), parts, strict=True)):
                expect_close(a, b, f"document {number} of {sizes}, ids {name}")
            alone = torch.cat(parts, 2)
            for a, b in zip(
                torch.autograd.grad(packed.square().sum(), (q, k, v)),
                torch.autograd.grad(alone.square().sum(), (q, k, v)),
                strict=True,
            ):
                expect_close(a, b, f"gradients of {sizes}, ids {name}", 1e-8)
            cases += len(sizes)
    return cases


@law(lambda m: m.supports_segments)
def interleaved_segments_are_isolated(mechanism: Mechanism) -> int:
    """Segments need not be contiguous; a negative one is padding: it sees nothing and is seen by nobody."""
    m = in_dtype(mechanism, torch.float64)
    segments = torch.randint(-1, 3, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    q, k, v = sample(m)
    out, matrix = m(q, k, v, segment_ids=segments), m.matrix(q, k, segment_ids=segments)
    across = (segments[:, :, None] != segments[:, None, :]) | (segments < 0)[:, None, :]
    expect(bool((matrix.permute(0, 2, 3, 1)[across] == 0).all()), "a weight across segments")
    expect(
        bool((out.transpose(1, 2)[segments < 0] == 0).all()), "the output of a padding position is not zero"
    )
    return 1


@law(lambda m: not m.supports_segments)
def refuses_segments_by_name(mechanism: Mechanism) -> int:
    """A mechanism that cannot honour segment_ids says so."""
    q, k, v = sample(mechanism, dtype=torch.float32)
    try:
        mechanism(q, k, v, segment_ids=torch.zeros(2, LENGTH, dtype=torch.int64))
    except ValueError as error:
        expect("segment_ids" in str(error), f"the refusal does not name segment_ids: {error}")
        return 1
    expect(False, "segment_ids was accepted")
    return 0


@law()
def batch_neighbours_are_invisible(mechanism: Mechanism) -> int:
    """A row's output and gradients do not depend on what stands in other rows, NaN included."""
    m = in_dtype(mechanism, torch.float32)
    for mask in (None, holes(LENGTH)):
        results = []
        for factor in (1.0, 20.0, torch.nan):
            inputs = [x.detach().clone() for x in sample(m, dtype=torch.float32)]
            for x in inputs:
                x[1] *= factor
                x.requires_grad_()
            out = m(*inputs, key_mask=mask)
            results.append((out[0], *(g[0] for g in torch.autograd.grad(out[0].sum(), inputs))))
        for factor, result in zip(("x20", "NaN"), results[1:], strict=True):
            for actual, expected in zip(result, results[0], strict=True):
                expect_identical(actual, expected, f"a row beside a neighbour {factor}")
    return 4
