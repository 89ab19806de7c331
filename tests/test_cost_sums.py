"""Costs add up as the calls that they stand for do."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from efficient_attn import (
    Cost,
    FullAttention,
    LinearAttention,
    LinformerAttention,
    Shape,
    SlidingWindowAttention,
)
from efficient_attn.complexity import Flops

SHAPE = Shape(2, 4, 10, 10, 8, num_kv_heads=2, v_head_dim=5, dtype=torch.float32)
MECHANISMS = [
    FullAttention(),
    FullAttention(is_causal=True),
    SlidingWindowAttention(3, is_causal=True),
    LinearAttention(is_causal=True),
    LinformerAttention(10, 4, rank=3),
]
COSTS = [m.cost(SHAPE, training=training, basis="hardware") for m in MECHANISMS for training in (False, True)]
ADDED = ("bytes_read", "bytes_written", "params", "saved_bytes", "state_bytes", "kv_bytes_per_token")


def peak_of(calls: list[Cost]) -> int:
    """The most that is allocated at once, when what each call saved stays until the end."""
    held = sum(call.saved_bytes for call in calls)
    return max((call.peak_bytes + held - call.saved_bytes for call in calls), default=0)


@pytest.mark.parametrize("first", COSTS)
@pytest.mark.parametrize("second", COSTS)
def test_a_sum_is_one_call_after_the_other(first: Cost, second: Cost) -> None:
    total = first + second
    for name in ADDED:
        assert getattr(total, name) == getattr(first, name) + getattr(second, name), name
    for field in fields(Flops):
        a, b, both = (getattr(cost.flops, field.name) for cost in (first, second, total))
        assert both == a + b, field.name
    assert total.peak_bytes == peak_of([first, second])
    assert total.transient_bytes == max(first.transient_bytes, second.transient_bytes)
    assert sum(total.terms.values()) == total.flops.forward
    assert set(total.terms) == set(first.terms) | set(second.terms)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("times", [0, 1, 2, 7])
def test_a_product_is_that_many_calls(cost: Cost, times: int) -> None:
    assert times * cost == cost * times
    for name in ADDED:
        assert getattr(cost * times, name) == times * getattr(cost, name), name
    assert (cost * times).flops.total == times * cost.flops.total
    assert (cost * times).flops.recompute == times * cost.flops.recompute
    assert (cost * times).peak_bytes == peak_of([cost] * times)
    assert (cost * times).transient_bytes == (cost.transient_bytes if times else 0)
    assert (cost * times).terms == {name: times * flops for name, flops in cost.terms.items()}


def test_two_of_a_kind_are_twice_one() -> None:
    for cost in COSTS:
        assert cost + cost == 2 * cost


def test_the_costs_tried_here_are_not_all_zero() -> None:
    for name in (*ADDED, "peak_bytes", "transient_bytes"):
        assert any(getattr(cost, name) for cost in COSTS), name
    assert any(cost.flops.recompute for cost in COSTS)
    assert FullAttention().cost(SHAPE).flops == Flops(2 * 2 * 4 * 100 * 13)


@pytest.mark.parametrize("cost", COSTS)
def test_a_checkpointed_call_keeps_its_inputs_and_runs_twice(cost: Cost) -> None:
    again = cost.checkpointed(100)
    assert again.saved_bytes == 100
    assert again.flops.total == cost.flops.total + cost.flops.forward
    assert again.flops.recompute - cost.flops.recompute == cost.flops.forward
    assert again.transient_bytes == cost.transient_bytes + cost.saved_bytes, "the call as it was, once more"
    with pytest.raises(ValueError, match="input_bytes must be >= 0, got -1"):
        cost.checkpointed(-1)
