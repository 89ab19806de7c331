"""What is particular to the block-sparse kernels, tried in Triton's interpreter: one JSON line for each case.

`PYTHONPATH=tests TRITON_INTERPRET=1 python -m kernels.block_sparse_cases [name ...]`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from efficient_attn import (
    BigBirdAttention,
    FlashAttention,
    LongformerAttention,
    Mechanism,
    SlidingWindowAttention,
    SparseTransformerAttention,
)
from efficient_attn.kernels.block_sparse import launch, parts, table
from efficient_attn.ops import block_sparse
from efficient_attn.testing.sampling import poisoned_allocations

CASES: dict[str, Callable[[], int]] = {}


def case(run: Callable[[], int]) -> Callable[[], int]:
    """Register a function that raises where something is wrong, and returns how many comparisons it made."""
    CASES[run.__name__] = run
    return run


def inputs(
    q_len: int, kv_len: int, size: int = 8, v_size: int = 5, seed: int = 0, heads: int = 2
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, heads, q_len, size), (2, heads // 2, kv_len, size), (2, heads // 2, kv_len, v_size)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def results(m: Mechanism, leaves: list[Tensor], backend: str, **masks: Any) -> list[Tensor]:
    m.backend = backend
    with poisoned_allocations():
        out = m(*leaves, **masks)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        return [out, *torch.autograd.grad(out, leaves, weight, allow_unused=True, materialize_grads=True)]


def expect_reference(m: Mechanism, leaves: list[Tensor], what: str, **masks: Any) -> None:
    pairs = zip(results(m, leaves, "triton", **masks), results(m, leaves, "reference", **masks), strict=True)
    for name, (actual, expected) in zip(("output", "dq", "dk", "dv"), pairs, strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n} of {what}: {m}"
        )


@contextmanager
def patched(target: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    table._tables.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
        table._tables.cache_clear()


PADDED = torch.arange(40)[None] >= torch.tensor([[7], [0]])
PADDED[1, 30:] = False


@case
def cut_rows() -> int:
    """Rows cut among programs, in every pass, alone and resumed, are the rows whole."""
    subjects = (
        LongformerAttention(5, global_tokens=(3, 20)),
        BigBirdAttention(block_size=6, num_random_blocks=2, is_causal=True),
        SparseTransformerAttention("fixed", 9, summary=2),
        SlidingWindowAttention(5, num_sinks=3, is_causal=True),
    )
    with patched(table, _LEAST_LIMIT=1, _TIMES_MEAN=0):
        for m in subjects:
            expect_reference(m, inputs(40, 40), f"{m}, cut", key_mask=PADDED)
    return len(subjects)


@case
def few_queries() -> int:
    """The keys of a decoding step, split among programs, are the keys whole: windows, sinks, padding, segments."""
    segments = (torch.arange(200) // 90).expand(2, -1)
    mask = torch.arange(200)[None] >= torch.tensor([[7], [0]])
    cases: tuple[tuple[Mechanism, dict[str, Any]], ...] = (
        (FlashAttention(is_causal=True), {"key_mask": mask}),
        (FlashAttention(is_causal=True), {"segment_ids": segments}),
        (SlidingWindowAttention(90, num_sinks=2, is_causal=True), {"key_mask": mask}),
    )
    with patched(parts, MANY_KEYS=100), patched(table, _LEAST_LIMIT=2):
        for m, masks in cases:
            leaves = inputs(3, 200)
            expect_reference(m, leaves, f"{m}, few queries", **masks)
            assert table._tables.cache_info().currsize > 0, "no table was built"
        for m in (FlashAttention(is_causal=True), SlidingWindowAttention(90, is_causal=True)):
            table._tables.cache_clear()
            for kv_len in (198, 199, 200):
                m.backend = "triton"
                m(*inputs(1, kv_len))
            built = table._tables.cache_info().misses
            assert built == 1, f"{built} tables for three steps of {m}"
    return len(cases) + 2


@case
def head_sizes() -> int:
    """Head sizes that fill no tile, and values that are narrower or wider."""
    for size, v_size in ((5, 17), (80, 3), (16, 32)):
        for m in (SlidingWindowAttention(9, is_causal=True), LongformerAttention(3, global_tokens=2)):
            expect_reference(m, inputs(21, 21, size, v_size), f"{m}, head sizes {size} and {v_size}")
    return 6


@case
def offsets() -> int:
    """Queries far outside the keys on either side, and an offset that the kernels load themselves."""
    m = SlidingWindowAttention(6, num_sinks=2)
    for offset in (-30, 50, 1 << 40, -(1 << 40)):
        expect_reference(m, inputs(7, 20), f"{m} at {offset}", q_offset=offset)
    strided = SparseTransformerAttention("strided", 4, is_causal=True)
    for offset in (-3, 21, 1001):
        expect_reference(strided, inputs(7, 20), f"{strided} at {offset}", q_offset=offset)
    whole = SparseTransformerAttention("fixed", 4, summary=4)
    for offset in (0, 60):
        expect_reference(whole, inputs(7, 30), f"{whole} at {offset}", q_offset=offset)
    original = block_sparse._call

    def on_device(*args: Any) -> Any:
        call = original(*args)
        return replace(call, q_offset=torch.tensor(call.q_offset))

    for m in (
        SlidingWindowAttention(6, num_sinks=2, is_causal=True),
        strided,
        LongformerAttention(3, global_tokens=2),
    ):
        with patched(block_sparse, _call=on_device):
            expect_reference(m, inputs(7, 20), f"{m}, offset on the device", q_offset=11)
    return 12


@case
def wide_strides() -> int:
    """64-bit distances inside a block give the bits that 32-bit ones give."""
    subjects = (
        SlidingWindowAttention(6, num_sinks=2, is_causal=True),
        SparseTransformerAttention("fixed", 9, summary=2),
        SparseTransformerAttention("strided", 5),
    )
    for m in subjects:
        narrow = results(m, inputs(20, 20), "triton")
        with patched(launch, _is_wide=lambda arguments: True):
            wide = results(m, inputs(20, 20), "triton")
        assert all(map(torch.equal, narrow, wide)), f"{m}: wide strides change bits"
    return len(subjects)


@case
def rows_of_several_lengths() -> int:
    """Blocks drawn over the whole sequence: rows of different lengths walk tables of their own."""
    m = BigBirdAttention(block_size=5, num_random_blocks=2)
    mask = torch.zeros(4, 40, dtype=torch.bool)
    for row, (start, stop) in enumerate(((0, 40), (7, 31), (16, 40), (0, 0))):
        mask[row, start:stop] = True
    leaves = [torch.cat([x, x + 1]).detach().requires_grad_() for x in inputs(40, 40)]
    expect_reference(m, leaves, f"{m}, rows of 40, 24, 24 and no tokens", key_mask=mask)
    return 1


@case
def dropout() -> int:
    """Of each row a share of weights is dropped, the same ones in every pass; another seed drops others."""
    length, p = 40, 0.4
    subjects = (
        SlidingWindowAttention(9, num_sinks=2, is_causal=True),
        LongformerAttention(4, global_tokens=2),
        SparseTransformerAttention("strided", 5),
        FlashAttention(),
    )
    for m in subjects:
        m.dropout_p = p
        q, k, v = inputs(length, length, heads=2)
        one_hot = torch.eye(length, dtype=torch.float64).expand(2, 1, -1, -1).contiguous()
        torch.manual_seed(5)
        m.backend = "triton"
        dropped = m(q, k, one_hot)
        torch.manual_seed(5)
        assert torch.equal(dropped, m(q, k, one_hot)), f"{m}: one seed, two draws"
        assert not torch.equal(dropped, m(q, k, one_hot)), f"{m}: two seeds, one draw"
        weights = m.matrix(q, k)
        kept = (dropped != 0) & (weights > 0)
        torch.testing.assert_close(dropped[kept], weights[kept] / (1 - p))
        share, total = int(kept.sum()), int((weights > 0).sum())
        assert abs(share / total - (1 - p)) < 5 * (p * (1 - p) / total) ** 0.5, (
            f"{m}: kept {share} of {total}"
        )
        factor = kept.double() / (1 - p)
        torch.manual_seed(5)
        actual = results(m, [q, k, v], "triton")
        out = (weights * factor) @ v
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        expected = [out, *torch.autograd.grad(out, [q, k, v], weight)]
        for name, a, b in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-11, atol=1e-11, msg=lambda s, n=name, m=m: f"{n} of {m}: {s}"
            )
    return 7 * len(subjects)


@case
def operators_are_as_declared() -> int:
    """Schema, fake outputs, autograd registration and compilation of the operators, by torch's own check."""
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(5, 7))
    m, offset = SlidingWindowAttention(3, is_causal=True), torch.tensor(2)
    op = torch.ops.efficient_attn.block_sparse_forward.default
    torch.library.opcheck(op, (q, k, v, None, None, offset, None, m.mask_spec, 0.3, 0.0))
    return 1


def main() -> int:
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set"
    failed = 0
    for name in sys.argv[1:] or CASES:
        try:
            print(json.dumps({"case": name, "comparisons": CASES[name]()}), flush=True)
        except Exception as error:
            failed += 1
            print(json.dumps({"case": name, "failure": f"{type(error).__name__}: {error}"}), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
