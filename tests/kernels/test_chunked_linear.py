"""The chunked kernels of linear attention against the loops in fp64, where the laws' examples do not reach.

In an interpreter of its own, because Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

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


def test_the_offset_bound_is_that_of_rounding(judged: dict[str, Any]) -> None:
    """Positions far outside, as moving offsets may be, give what the nearest one that matters gives."""
    assert judged["far offsets"] == []
