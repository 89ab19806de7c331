"""A million tokens, and tensors whose elements 31 bits cannot number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficient_attn import (
    LinearAttention,
    LongformerAttention,
    Mechanism,
    PerformerAttention,
    SlidingWindowAttention,
)

LENGTH, HEAD_DIM, V_HEAD_DIM = 1 << 20, 4, 2
BOUND = 1e-5
LINEAR = {
    "elu": lambda causal: LinearAttention(is_causal=causal),
    "performer": lambda causal: PerformerAttention(HEAD_DIM, num_features=8, is_causal=causal),
}


@pytest.fixture(scope="module")
def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in fp32. The values have a mean, which their average keeps: an error is measured against 1."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, LENGTH, e, generator=generator) for e in (HEAD_DIM, HEAD_DIM, V_HEAD_DIM))
    return q, k, v + 1


def some_rows() -> list[int]:
    drawn = torch.randint(LENGTH, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    return sorted({0, 1, 63, 64, 65, LENGTH - 2, LENGTH - 1, *drawn})


def features(mechanism: Mechanism, x: Tensor) -> Tensor:
    """phi(x) in fp64, whatever scale the mechanism would have given each token taken out again."""
    values, exponent = mechanism.feature_map.double()(x.double())
    mechanism.feature_map.float()
    return values if exponent is None else values * torch.exp2(exponent)[..., None]


def sums(mechanism: Mechanism, k: Tensor, v: Tensor, stops: list[int]) -> Tensor:
    """sum_{j < stop} phi(k_j) [v_j, 1]^T in fp64 at each of the stops, by adding one piece after another."""
    phi, values = features(mechanism, k)[0, 0], torch.cat([v, torch.ones_like(v[..., :1])], -1).double()[0, 0]
    starts = [0, *stops[:-1]]
    pieces = [phi[a:b].mT @ values[a:b] for a, b in zip(starts, stops, strict=True)]
    return torch.stack(pieces).cumsum(0)


def exact(mechanism: Mechanism, q: Tensor, state: Tensor) -> Tensor:
    """The outputs of the queries q (n, E), each from its own state, or from one."""
    weighted = (features(mechanism, q)[:, None] @ state)[:, 0]
    return weighted[:, :-1] / weighted[:, -1:]


@pytest.mark.parametrize("kind", LINEAR)
def test_linear_sums_over_a_million_tokens_are_those_of_fp64(kind, tokens, record_property):
    q, k, v = tokens
    rows = some_rows()
    causal, whole = LINEAR[kind](True), LINEAR[kind](False)
    states = sums(causal, k, v, [row + 1 for row in rows])
    expected = {
        "causal": exact(causal, q[0, 0, rows], states),
        "not causal": exact(whole, q[0, 0, rows], states[-1]),
        "last queries": exact(causal, q[0, 0, -1:], states[-1]),
    }
    with torch.no_grad():
        actual = {
            "causal": causal(q, k, v)[0, 0, rows],
            "not causal": whole(q[:, :, rows], k, v)[0, 0],
            "last queries": causal(q[:, :, -9:], k, v)[0, 0, -1:],
        }
    for name, y in actual.items():
        assert (y.double() - expected[name]).abs().max() < BOUND, name
    record_property("cases", sum(len(y) for y in actual.values()))


@pytest.mark.parametrize("kind", LINEAR)
def test_the_state_of_a_million_tokens_is_that_of_fp64(kind, tokens, record_property):
    """Inputs in bfloat16: a state in their own precision would lose 2.7 % here."""
    mechanism = LINEAR[kind](True)
    q, k, v = (x.bfloat16() for x in tokens)
    state = mechanism.init_state(1, 1, HEAD_DIM, v_head_dim=V_HEAD_DIM, dtype=torch.bfloat16)
    with torch.no_grad():
        for start in range(0, LENGTH, 1 << 16):
            part = slice(start, start + (1 << 16))
            out, state = mechanism.step(q[:, :, part], k[:, :, part], v[:, :, part], state)
    expected = sums(mechanism, k, v, [LENGTH])[-1]
    scale = 1.0 if state.exponent is None else torch.exp2(state.exponent.double())[..., None, None]
    kept = (state.kv.double() * scale)[0, 0]
    assert ((kept - expected).abs().max() / expected.abs().max()) < BOUND
    last = exact(mechanism, q[0, 0, -1:], expected)
    torch.testing.assert_close(out[0, 0, -1:].double(), last, rtol=2**-8, atol=0)
    record_property("cases", kept.numel() + last.numel())


@pytest.mark.parametrize(
    "mechanism",
    [
        SlidingWindowAttention(16, is_causal=True),
        SlidingWindowAttention(16, num_sinks=2, is_causal=True),
        LongformerAttention(16, global_tokens=2, is_causal=True),
    ],
    ids=str,
)
def test_keys_beyond_two_to_the_31_elements(mechanism, record_property):
    """Contiguous keys of 4.3 GB, of which only what a query sees is ever touched, and takes memory."""
    head_dim, first, last, queries = 1024, 2, 40, 8
    k = torch.empty(1, 1, (1 << 31) // head_dim + 64, head_dim, dtype=torch.bfloat16)
    v = torch.empty(*k.shape[:3], 5, dtype=torch.bfloat16)
    assert k.is_contiguous() and k[:, :, :-last].numel() > 1 << 31
    for number, x in enumerate((k, v)):
        for ends in (slice(None, first), slice(-last, None)):
            x[:, :, ends].normal_(generator=torch.Generator().manual_seed(number))
    q = torch.randn(1, 1, queries, head_dim, generator=torch.Generator().manual_seed(2)).bfloat16()
    seen = [torch.cat([x[:, :, :first], x[:, :, -last:]], 2) for x in (k, v)]
    torch.testing.assert_close(mechanism(q, k, v), mechanism(q, *seen), rtol=2**-7, atol=2**-7)
    record_property("cases", queries)
