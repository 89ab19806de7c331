"""What a constructor is given it keeps, and it makes a difference."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import (
    MECHANISMS,
    BigBirdAttention,
    FullAttention,
    LinformerAttention,
    Mechanism,
    PerformerAttention,
    SparseTransformerAttention,
)
from efficient_attn.masks import random_blocks

LENGTH, HEADS, HEAD_DIM = 24, 4, 8

REQUIRED: dict[str, dict[str, Any]] = {
    "sliding_window": {"window_size": 4},
    "longformer": {"window_size": 4, "global_tokens": 2},
    "sparse_transformer": {"pattern": "fixed", "stride": 4},
    "linformer": {"max_seq_len": LENGTH, "num_heads": HEADS, "rank": 5},
    "performer": {"head_dim": HEAD_DIM},
}
OTHER: dict[str, Any] = {
    "window_size": 3,
    "num_sinks": 2,
    "global_tokens": (5, 9),
    "block_size": 3,
    "num_window_blocks": 1,
    "num_global_blocks": 2,
    "num_random_blocks": 1,
    "seed": 7,
    "pattern": "strided",
    "stride": 5,
    "summary": 2,
    "max_seq_len": LENGTH + 1,
    "num_heads": 2,
    "rank": 6,
    "sharing": "none",
    "num_kv_heads": 2,
    "head_dim": 4,
    "num_features": 9,
    "kernel": "relu",
    "feature_map": "exp",
    "is_causal": True,
    "scale": 0.37,
    "dropout_p": 0.25,
    "backend": "reference",
}
"""A value of every argument that is not its default."""

BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("linformer", "num_kv_heads"): {"sharing": "none"},
    ("bigbird", "seed"): {"block_size": 2},
}
"""What it takes for an argument to make a difference."""

ARGUMENTS = [
    (name, argument)
    for name, cls in MECHANISMS.items()
    for argument in inspect.signature(cls).parameters
    if (name, argument) != ("linformer", "is_causal")
]


def make(name: str, **options: Any) -> Mechanism:
    small = {"block_size": 4} if name == "bigbird" else {}
    torch.manual_seed(0)
    return MECHANISMS[name](**REQUIRED.get(name, {}) | small | options)


def normal(heads: int, head_dim: int, seed: int) -> Tensor:
    return torch.randn(1, heads, LENGTH, head_dim, generator=torch.Generator().manual_seed(seed))


def result(mechanism: Mechanism) -> Tensor:
    heads = getattr(mechanism, "num_heads", HEADS)
    head_dim = mechanism.head_dim or HEAD_DIM
    q, k, v = (normal(heads if i == 0 else mechanism.num_kv_heads or heads, head_dim, i) for i in range(3))
    torch.manual_seed(1)
    return mechanism(q, k, v)


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_an_argument_is_kept_and_matters(name: str, argument: str) -> None:
    value, context = OTHER[argument], BESIDE.get((name, argument), {})
    plain, changed = make(name, **context), make(name, **context | {argument: value})
    kept = getattr(changed, argument, value)
    assert isinstance(kept, torch.nn.Module) or kept == value
    if argument == "backend":
        return  # It never changes the mathematics.
    before, after = result(plain), result(changed)
    assert before.shape != after.shape or not torch.allclose(before, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MECHANISMS if name != "linformer"])
def test_the_exact_limit_keeps_scale_causality_and_backend(name: str) -> None:
    limit = make(name, scale=0.37, is_causal=True, backend="reference").exact_limit(LENGTH)
    if limit is not None:
        assert (limit.scale, limit.is_causal, limit.backend) == (0.37, True, "reference")
        assert repr(limit.exact_limit(LENGTH)) == repr(limit)


def test_defaults_are_those_that_are_documented() -> None:
    assert PerformerAttention(6).feature_map.projection.shape == (24, 6)
    assert LinformerAttention(300, 2).rank == 256
    assert SparseTransformerAttention("fixed", 4).summary == 1
    bigbird = BigBirdAttention()
    sizes = (bigbird.num_window_blocks, bigbird.num_global_blocks, bigbird.num_random_blocks)
    assert (bigbird.block_size, *sizes) == (64, 3, 1, 3)
    assert torch.equal(result(FullAttention()), result(FullAttention(scale=HEAD_DIM**-0.5)))


def test_linformer_starts_with_entries_of_variance_one_over_the_rank() -> None:
    for projection in LinformerAttention(512, 2, rank=64).parameters():
        assert abs(projection.mean()) < 5 * (1 / 64 / projection.numel()) ** 0.5
        # The variance of a normal sample's variance is 2 / n of its square.
        assert abs(projection.var() * 64 - 1) < 5 * (2 / projection.numel()) ** 0.5


@pytest.mark.parametrize(
    "make",
    [lambda seed: BigBirdAttention(block_size=2, seed=seed), lambda seed: PerformerAttention(8, seed=seed)],
    ids=["bigbird", "performer"],
)
def test_every_seed_is_another_pattern(make: Callable[[int], Mechanism]) -> None:
    results = [result(make(seed)) for seed in (0, 1, 2, 2**31)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(results) for b in results[:i])


def test_a_seed_means_the_same_for_ever() -> None:
    """What was trained with one version must find its blocks and features again in the next."""
    drawn = random_blocks(torch.tensor([0, 1, 63, 4095]), count=3, seed=7, num_choices=64)
    assert drawn.tolist() == [[19, 39, 43], [5, 13, 63], [4, 31, 49], [0, 13, 55]]
    row = PerformerAttention(4, num_features=5, seed=7).feature_map.projection[4]
    torch.testing.assert_close(row, torch.tensor([0.1558, 1.7637, -0.1210, 2.1082]), rtol=0, atol=1e-4)
