"""The chunked kernels of linear attention against the loops in fp64, where the laws' examples do not reach.

In an interpreter of its own, because Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from efficient_attn import LinearAttention, PerformerAttention, Shape
from efficient_attn.feature_maps import formula_of
from efficient_attn.ops import linear_steps
from efficient_attn.ops.chunked_linear import chunked_linear, refuse
from efficient_attn.ops.costs import register_flop_formulas

from .test_laws_interpreted import interpreted

CASES: dict[str, dict[str, Any]] = {
    "several spans": {"length": 75},
    "queries before the first key": {"length": 40, "num_keys": 20, "offset": -9},
    "queries after the last key": {"length": 20, "num_keys": 37, "offset": 30},
    "all queries after all keys": {"length": 9, "num_keys": 20, "offset": 60},
    "all queries before all keys": {"length": 9, "num_keys": 20, "offset": -60},
    "keys that nobody reads": {"length": 18, "num_keys": 70, "offset": 5},
    "an offset in memory": {"length": 18, "num_keys": 50, "offset": 21, "in_memory": True},
    "queries spans after the first keys": {"feature": "exp", "length": 3, "num_keys": 110, "slope": 3.0},
    "one token": {"length": 1, "num_keys": 33},
    "grouped heads": {"length": 37, "heads": 4, "kv_heads": 2},
    "documents": {"length": 70, "segments": True, "valid": True},
    "documents, exponents": {"feature": "exp", "length": 70, "segments": True, "valid": True},
    "exponents that rise": {"feature": "exp", "length": 70, "slope": 3.0},
    "exponents that fall": {"feature": "exp", "length": 70, "slope": -3.0},
    "several launches": {"feature": "favor_softmax", "length": 37, "size": 70},
    "projections of wide heads": {"feature": "favor_softmax", "length": 20, "width": 100, "size": 40, "heads": 4},
    "wide heads, documents": {"feature": "favor_relu", "length": 20, "width": 128, "size": 20, "segments": True},
    "several launches, documents": {"feature": "favor_softmax", "length": 40, "size": 40, "segments": True},
    "several launches of columns": {"feature": "squared_relu", "length": 37, "width": 40},
    "one width, not causal": {"feature": "favor_relu", "length": 21, "num_keys": 45, "size": 20, "causal": False},
    "not causal, exponents": {"feature": "exp", "length": 21, "num_keys": 45, "causal": False, "valid": True},
    "nobody counts": {"length": 20, "dead": True},
    "half precision": {"length": 50, "dtype": "float16"},
    "half precision, exponents": {"feature": "exp", "length": 50, "dtype": "float16", "valid": True},
    "the steps of bf16": {"length": 50, "dtype": "float16", "precision": "fp16"},
    "the steps of bf16, projected": {
        "feature": "favor_softmax", "length": 37, "size": 20, "dtype": "float16", "precision": "fp16",
    },
    "a common mean": {"length": 70, "dtype": "float16", "mean": 8.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def judged() -> dict[str, Any]:
    """What became of each case, by its name."""
    run = interpreted(["-m", "kernels.chunked_linear_cases", json.dumps(CASES)])
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_equals_the_loops(name: str, judged: dict[str, Any]) -> None:
    assert judged[name] == []


def test_decoding_equals_the_state_by_torch(judged: dict[str, Any]) -> None:
    assert judged["decoding"] == []


def test_steps_of_many_tokens_equal_the_state_by_torch(judged: dict[str, Any]) -> None:
    """Outputs, states and the gradients of both, by the chunked kernels, which are launched."""
    assert judged["steps"] == []


def test_documents_without_causality_equal_the_scans_by_torch(judged: dict[str, Any]) -> None:
    """Of one token and of several spans, with exponents that differ much."""
    assert judged["documents"] == []


def test_the_offset_bound_is_that_of_rounding(judged: dict[str, Any]) -> None:
    """Positions far outside, as moving offsets may be, give what the nearest one that matters gives."""
    assert judged["far offsets"] == []


def test_torch_counts_what_is_declared() -> None:
    """By FlopCounterMode, on tensors without memory, in 16 bits, of which the formulas are."""
    register_flop_formulas()
    for m in (LinearAttention(is_causal=True), PerformerAttention(40, num_features=70, is_causal=True)):
        feature, projection = str(formula_of(m.feature_map)), getattr(m.feature_map, "projection", None)
        q = torch.empty(2, 4, 300, 40, dtype=torch.bfloat16, device="meta", requires_grad=True)
        k, v = (
            torch.empty(2, 2, 700, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
            for width in (40, 24)
        )
        projection = None if projection is None else projection.to("meta")
        with FlopCounterMode(display=False) as forward:
            out, *_ = chunked_linear(q, k, v, None, None, torch.tensor(400), projection, feature, 1.0, True)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        shape = Shape(2, 4, 300, 700, 40, num_kv_heads=2, v_head_dim=24, dtype=torch.bfloat16)
        flops = m.cost(shape, training=True, basis="torch", backend="triton").flops
        counted = forward.get_total_flops(), backward.get_total_flops()
        assert counted == (flops.forward, flops.backward)


def test_torch_counts_both_walks_of_documents() -> None:
    """Without causality documents take twice what they take with it, random features' exponents excepted."""
    register_flop_formulas()
    q, k, v = (
        torch.empty(2, 2, 300, 40, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in "qkv"
    )
    segment, counted = torch.empty(2, 300, dtype=torch.int64, device="meta"), []
    for is_causal in (True, False):
        with FlopCounterMode(display=False) as mode:
            out, *_ = chunked_linear(q, k, v, None, segment, torch.tensor(0), None, "elu", 1.0, is_causal)
            out.sum().backward()
        counted.append(mode.get_total_flops())
    assert counted[1] == 2 * counted[0] > 0


def test_torch_counts_what_is_declared_of_steps() -> None:
    """Of 300 tokens after a state that somebody differentiates."""
    register_flop_formulas()
    m = PerformerAttention(40, num_features=70, is_causal=True)
    sizes = ((4, 300, 40), (2, 300, 40), (2, 300, 24))
    q, k, v = (torch.empty(2, *x, dtype=torch.bfloat16, device="meta", requires_grad=True) for x in sizes)
    kv = torch.empty(2, 2, 70, 25, device="meta", requires_grad=True)
    projection, exponent = m.feature_map.projection.to("meta"), torch.empty(2, 2, device="meta")
    with FlopCounterMode(display=False) as forward:
        out, _, _, after, _ = linear_steps._steps(
            q, k, v, None, kv, exponent, projection, "favor_softmax", 1.0, True
        )
    with FlopCounterMode(display=False) as backward:
        (out.sum() + after.sum()).backward()
    shape = Shape(2, 4, 300, 700, 40, num_kv_heads=2, v_head_dim=24, dtype=torch.bfloat16)
    flops = m.cost(shape, training=True, phase="decode", basis="torch", backend="triton").flops
    assert (forward.get_total_flops(), backward.get_total_flops()) == (flops.forward, flops.backward)


@pytest.mark.parametrize(("features", "width", "values"), [(70, 20, 40), (64, 64, 32)])
def test_costs_of_a_step_are_those_of_its_programs(features: int, width: int, values: int) -> None:
    """By a walk over the grid: two queries' features and keys', a state's columns and their reading."""
    m = PerformerAttention(width, num_features=features, is_causal=True)
    walked, tile = 0, 1 << (max(16, width) - 1).bit_length()
    for _query_head in range(2 * 4):
        for _columns in range(0, values, 32):
            for _features in range(0, features, 64):
                # Of favor_softmax the largest feature is looked for first.
                walked += 2 * 2 * 2 * 64 * tile
                walked += 2 * 64 * 32 + 2 * 64 * 32
    shape = Shape(2, 4, 1, 99, width, num_kv_heads=2, v_head_dim=values, dtype=torch.bfloat16)
    cost = m.cost(shape, phase="decode", basis="hardware", backend="triton")
    assert cost.flops.total == sum(cost.terms.values()) == walked


@pytest.mark.parametrize("width", [128, 129])
def test_random_features_of_the_widest_heads_are_refused(width: int) -> None:
    """In words that name both sizes; up to 128 the head size is no reason."""
    m = PerformerAttention(width, num_features=16, is_causal=True)
    x = torch.zeros(1, 1, 4, width)
    reasons = refuse(m._problem(x, x, x, None, None, None, None))
    said = [reason for reason in reasons if "random features" in reason]
    assert ["up to 128, not 129" in reason for reason in said] == [True] * (width > 128)


def test_costs_of_foreign_maps_are_refused() -> None:
    class Mine(type(LinearAttention().feature_map)):  # type: ignore[misc]
        pass

    m = LinearAttention(feature_map=Mine())
    with pytest.raises(ValueError, match="do not know the feature map"):
        m.cost(Shape(1, 1, 8, 8, 16), basis="hardware", backend="triton")
    assert m.cost(Shape(1, 1, 8, 8, 16), backend="triton").flops.forward > 0


def test_costs_count_every_product(judged: dict[str, Any]) -> None:
    """Forward and backward, padding and recomputation included, by counting the products as they are done."""
    assert judged["counts"] == []
