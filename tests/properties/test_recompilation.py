"""torch.compile as it comes, without dynamic=True: a second length recompiles once, and no other does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from efficient_attn import (
    Attention,
    BigBirdAttention,
    FullAttention,
    LinearAttention,
    LinformerAttention,
    LongformerAttention,
    PerformerAttention,
    SlidingWindowAttention,
    SparseTransformerAttention,
)

WIDTH, HEADS, LENGTHS = 32, 4, (37, 16, 31, 64, 65, 300, 512, 700)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "mechanism",
    [
        FullAttention(is_causal=True),
        SlidingWindowAttention(6, num_sinks=2, is_causal=True),
        LongformerAttention(6, global_tokens=2),
        BigBirdAttention(block_size=4),
        SparseTransformerAttention("fixed", 8, is_causal=True),
        LinformerAttention(max(LENGTHS), HEADS, rank=5),
        PerformerAttention(8, is_causal=True),
        LinearAttention(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_all_lengths_take_two_graphs_at_most(mechanism, record_property):
    counter = CompileCounter()
    layer = Attention(WIDTH, HEADS, mechanism)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for length in LENGTHS:
        x = torch.randn(2, length, WIDTH)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count <= 2
    record_property("cases", len(LENGTHS))
