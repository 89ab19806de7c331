"""A mechanism is its matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ...mechanisms import FullAttention, Mechanism
from ..sampling import EQUAL, LENGTH, expand_heads, holes, in_dtype, lengths, poisoned_allocations, sample
from .law import expect, expect_close, law


def _gradients(out: Tensor, inputs: tuple[Tensor, ...], weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, weight, allow_unused=True, materialize_grads=True)


def _compare(mechanism: Mechanism, q_len: int, kv_len: int, masks: dict, what: str) -> None:
    """Outputs and gradients of the fast path against matrix @ v."""
    q, k, v = sample(mechanism, q_len, kv_len, grad=True)
    with poisoned_allocations():
        out = mechanism(q, k, v, **masks)
        expected = mechanism.matrix(q, k, **masks) @ expand_heads(v, q.shape[1])
        expect_close(out, expected, f"output, {what}")
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
        pairs = zip(
            "qkv", _gradients(out, (q, k, v), weight), _gradients(expected, (q, k, v), weight), strict=True
        )
        for name, actual, wanted in pairs:
            expect_close(actual, wanted, f"gradient of {name}, {what}", 1e-8)


@law()
def equals_its_matrix(mechanism: Mechanism) -> int:
    """Output and gradients are those of matrix @ v, at awkward lengths, L != S, any offset and with every mask."""
    m, cases = in_dtype(mechanism, torch.float64), 0
    for length in lengths(m):
        _compare(m, length, length, {}, f"length {length}")
        _compare(m, length, length, {"key_mask": holes(length)}, f"length {length}, key_mask")
        cases += 2
    for q_len, kv_len, offset in (
        (5, LENGTH, None),
        (5, LENGTH, 9),
        (9, 6, 0),
        (1, LENGTH, torch.tensor(20)),
        # More keys than a tile of any kernel takes at once.
        (3, 1100, None),
    ):
        if m.max_seq_len is not None and kv_len > m.max_seq_len:
            continue
        masks = {"q_offset": offset, "key_mask": holes(kv_len)}
        _compare(m, q_len, kv_len, masks, f"{q_len} queries, {kv_len} keys, q_offset {offset}")
        cases += 1
        if m.supports_segments:
            masks["segment_ids"] = (torch.arange(kv_len) // 11).expand(2, -1)
            _compare(m, q_len, kv_len, masks, f"{q_len} queries, {kv_len} keys, q_offset {offset}, segments")
            cases += 1
    return cases


@law()
def some_queries_give_their_rows(mechanism: Mechanism) -> int:
    """Some of the queries alone, placed by q_offset or by default at the end, give their rows of the whole."""
    m, cases = in_dtype(mechanism, torch.float64), 0
    q, k, v = sample(m)
    choices: list[dict] = [{}, {"key_mask": holes(LENGTH)}]
    if m.supports_segments:
        choices.append({"segment_ids": (torch.arange(LENGTH) // 11).expand(2, -1)})
    for masks in choices:
        whole, matrix = m(q, k, v, **masks), m.matrix(q, k, **masks)
        for start, size in ((0, 6), (9, 8), (12, 1), (LENGTH - 5, 5), (LENGTH - 1, 1)):
            rows = slice(start, start + size)
            last = [None] if start + size == LENGTH else []
            for offset in (start, torch.tensor(start), *last):
                kind = "tensor" if isinstance(offset, Tensor) else offset
                what = f"queries {start} to {start + size - 1}, q_offset {kind}, {list(masks)}"
                out = m(q[:, :, rows], k, v, q_offset=offset, **masks)
                expect_close(out, whole[:, :, rows], f"output of {what}")
                part = m.matrix(q[:, :, rows], k, q_offset=offset, **masks)
                expect_close(part, matrix[:, :, rows], f"matrix of {what}")
                cases += 1
    return cases


@law(lambda m: m.supports_bias)
def honours_bias(mechanism: Mechanism) -> int:
    """A float bias is added to the scores, a bool one hides pairs; both at every shape that broadcasts."""
    m, generator = in_dtype(mechanism, torch.float64), torch.Generator().manual_seed(5)
    q, k, _ = sample(m, 12)
    free = m.matrix(q, k, key_mask=holes(12))
    for shape in ((2, 4, 12, 12), (4, 12, 12), (1, 1, 12, 12), (2, 1, 1, 12), (12, 12)):
        bias = torch.randn(shape, generator=generator, dtype=torch.float64)
        for value in (bias, bias > -1, bias.masked_fill(bias < -1, -torch.inf)):
            masks, what = {"attn_bias": value, "key_mask": holes(12)}, f"attn_bias {shape} {value.dtype}"
            _compare(m, 12, 12, masks, what)
            weights = free * (value if value.dtype == torch.bool else value.exp())
            total = weights.sum(-1, keepdim=True)
            expected = weights / torch.where(total == 0, 1.0, total)
            expect_close(m.matrix(q, k, **masks), expected, f"matrix, {what}")
    return 15


@law()
def passes_gradcheck(mechanism: Mechanism) -> int:
    """Analytic gradients equal finite differences in fp64."""
    m = in_dtype(mechanism, torch.float64)
    q, k, v = sample(m, min(11, m.max_seq_len or 11), batch=1, grad=True, v_head_dim=3)
    mask = torch.ones(1, k.shape[2], dtype=torch.bool)
    mask[0, 2] = False
    ok = torch.autograd.gradcheck(
        lambda a, b, c: m(a, b, c, key_mask=mask), (q, k, v), fast_mode=True, raise_exception=False
    )
    expect(ok, "gradcheck failed")
    return 1


@law()
def gradients_do_not_depend_on_who_asks(mechanism: Mechanism) -> int:
    """Gradients of some inputs, of one tensor given thrice, or with a graph of their own, are the gradients."""
    m = in_dtype(mechanism, torch.float64)
    q, k, v = sample(m, grad=True)
    weight = torch.randn(m(q, k, v).shape, dtype=q.dtype, generator=torch.Generator().manual_seed(3))
    expected = _gradients(m(q, k, v), (q, k, v), weight)
    for with_graph in (False, True):
        what = "with create_graph" if with_graph else "alone"
        for wanted in ((0,), (1,), (2,), (0, 2), (0, 1, 2)):
            inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate((q, k, v))]
            leaves = [inputs[i] for i in wanted]
            grads = torch.autograd.grad(m(*inputs), leaves, weight, create_graph=with_graph)
            for i, grad in zip(wanted, grads, strict=True):
                expect_close(grad, expected[i], f"gradient of {'qkv'[i]} {what}, {len(wanted)} wanted", 1e-8)
        copies = [k.detach().clone().requires_grad_() for _ in range(3)]
        out = m(*copies)
        apart = torch.autograd.grad(out.square().sum(), copies)
        (once,) = torch.autograd.grad(m(k, k, k).square().sum(), k, create_graph=with_graph)
        expect_close(once, sum(apart, torch.zeros_like(k)), f"gradient of one tensor thrice {what}", 1e-8)
    return 12


@law()
def second_derivatives_are_right_or_refused(mechanism: Mechanism) -> int:
    """Second derivatives equal finite differences of the first, or are refused in words; none is silently wrong."""
    m = in_dtype(mechanism, torch.float64)
    # torch's fused kernels, which have none, want equal head sizes.
    for v_head_dim in (3, EQUAL):
        inputs = sample(m, min(6, m.max_seq_len or 6), batch=1, grad=True, v_head_dim=v_head_dim)
        try:
            ok = torch.autograd.gradgradcheck(m, inputs, fast_mode=True, raise_exception=False)
        except RuntimeError as error:
            ok = isinstance(error, NotImplementedError) or "is not implemented" in str(error)
        expect(ok, f"gradgradcheck failed, values of size {inputs[2].shape[3]}")
    return 2


@law(lambda m: m.rows_sum_to_one)
def rows_sum_to_one(mechanism: Mechanism) -> int:
    """Each row of the matrix sums to 1, or to 0 where nothing may be attended to, and nothing is negative."""
    m = in_dtype(mechanism, torch.float64)
    for length in lengths(m):
        q, k, _ = sample(m, length)
        for mask in (None, holes(length), torch.zeros(2, length, dtype=torch.bool)):
            matrix = m.matrix(q, k, key_mask=mask)
            sums = matrix.sum(-1)
            expect(bool((matrix >= 0).all()), f"a negative weight at length {length}")
            nothing = (matrix == 0).all(-1)
            expect_close(
                sums, torch.where(nothing, 0.0, torch.ones_like(sums)), f"row sums at length {length}"
            )
    return 3 * len(lengths(m))


@law(lambda m: m.exact_limit(LENGTH) is not None)
def equals_full_attention_at_its_limit(mechanism: Mechanism) -> int:
    """With the parameters of `exact_limit`, the mechanism is FullAttention, gradients included."""
    for length in (n for n in lengths(mechanism) if n > 1):
        limit = mechanism.exact_limit(length)
        assert limit is not None
        m = in_dtype(limit, torch.float64)
        full = FullAttention(is_causal=mechanism.is_causal, scale=mechanism.scale, backend="reference")
        q, k, v = sample(m, length, grad=True)
        actual, expected = m(q, k, v), full(q, k, v)
        expect_close(actual, expected, f"output at length {length}")
        weight = torch.ones_like(actual)
        for name, a, b in zip(
            "qkv", _gradients(actual, (q, k, v), weight), _gradients(expected, (q, k, v), weight), strict=True
        ):
            expect_close(a, b, f"gradient of {name} at length {length}", 1e-8)
    return len(lengths(mechanism))
