"""Lengths at which something changes: nothing, one token, a window, block or tile and one more or less, primes."""

from __future__ import annotations

import pytest

from efficient_attn import (
    BigBirdAttention,
    FlashAttention,
    FullAttention,
    LinearAttention,
    LinformerAttention,
    LongformerAttention,
    Mechanism,
    PerformerAttention,
    SlidingWindowAttention,
    SparseTransformerAttention,
)
from efficient_attn.testing.laws.law import expect_close
from efficient_attn.testing.sampling import HEADS, expand_heads, holes, in_dtype, sample

SIZE = 8
"""The window, block, stride and rank of every subject."""
LENGTHS = sorted(
    {n + d for n in (SIZE, 2 * SIZE, 3 * SIZE, 64, 128) for d in (-1, 0, 1)}
    | {0, 1, 2, 3, 5, 13, 61, 97, 131, 257}
)
SUBJECTS: list[Mechanism] = [
    made
    for causal in (False, True)
    for made in (
        FullAttention(is_causal=causal),
        FlashAttention(is_causal=causal, backend="blocked"),
        SlidingWindowAttention(SIZE, is_causal=causal),
        SlidingWindowAttention(SIZE, num_sinks=2, is_causal=causal),
        LongformerAttention(SIZE, global_tokens=3, is_causal=causal),
        BigBirdAttention(block_size=SIZE, num_random_blocks=2, is_causal=causal),
        SparseTransformerAttention("strided", SIZE, is_causal=causal),
        SparseTransformerAttention("fixed", SIZE, is_causal=causal),
        PerformerAttention(8, num_features=SIZE, is_causal=causal),
        LinearAttention(is_causal=causal),
        LinearAttention(feature_map="exp", is_causal=causal),
    )
] + [LinformerAttention(max(LENGTHS), HEADS, rank=SIZE)]


@pytest.mark.parametrize("mechanism", SUBJECTS, ids=lambda m: str(m).partition("\n")[0])
def test_the_output_is_matrix_times_values_at_every_length(mechanism, record_property):
    m, cases = in_dtype(mechanism, sample(mechanism)[0].dtype), 0
    for kv_len in LENGTHS:
        # All queries, the last alone, and the last few.
        for q_len in sorted({kv_len, min(1, kv_len), min(9, kv_len)}):
            q, k, v = sample(m, q_len, kv_len)
            for key_mask in (None, holes(kv_len)):
                expected = m.matrix(q, k, key_mask=key_mask) @ expand_heads(v, HEADS)
                what = f"{q_len} queries, {kv_len} keys, {'no mask' if key_mask is None else 'key_mask'}"
                expect_close(m(q, k, v, key_mask=key_mask), expected, what)
                cases += 1
    record_property("cases", cases)
