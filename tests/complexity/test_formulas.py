"""The formula, the exact count and what the registered formulas see on meta tensors grow alike."""

from __future__ import annotations

import math

import pytest
import sympy
import torch

from efficient_attn import (
    MECHANISMS,
    BigBirdAttention,
    Complexity,
    LongformerAttention,
    Mechanism,
    PerformerAttention,
    Shape,
    SlidingWindowAttention,
    SparseTransformerAttention,
    count_flops,
)

HEADS, SIZE, SHORT, LONG = 2, 8, 1 << 12, 1 << 20
EXAMPLES = [
    pytest.param(mechanism, id=f"{name}{number}")
    for name, cls in MECHANISMS.items()
    for number, mechanism in enumerate(cls.examples(37, HEADS, SIZE))
    if mechanism.max_seq_len is None
]
FORMULA = Complexity("L*w*E", "L*E", "w*E", "L*E", "L/(w-1)", "exact", symbols={"w": "window_size"})


def exponent(short: float, long: float, lengths: tuple[int, int] = (SHORT, LONG)) -> float:
    return math.log(long / short) / math.log(lengths[1] / lengths[0])


def counted(mechanism: Mechanism, length: int) -> int:
    q, k, v = (torch.empty(1, HEADS, length, SIZE, device="meta") for _ in range(3))
    return count_flops(mechanism, q, k, v).total


@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_formula_and_count_and_meta_have_one_exponent(mechanism: Mechanism) -> None:
    mechanism = mechanism.to("meta").eval()
    if mechanism.backend == "auto":
        mechanism.backend = mechanism._default_backend()
    degree = mechanism.complexity.degree("time")
    formula = [mechanism.evaluate("time", n, SIZE) for n in (SHORT, LONG)]
    costs = [mechanism.cost(Shape(1, HEADS, n, n, SIZE)).flops.forward for n in (SHORT, LONG)]
    # A million tokens have too many tiles to walk them here.
    seen = (1 << 14, 1 << 16) if mechanism.backend == "blocked" else (SHORT, LONG)
    on_meta = [counted(mechanism, n) for n in seen]
    for found in (exponent(*formula), exponent(*costs), exponent(*on_meta, seen)):
        assert found == pytest.approx(degree, abs=0.05)


@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_the_formula_is_the_count_up_to_a_constant(mechanism: Mechanism) -> None:
    """Multiply-accumulates of a head: twice the formula, for scores and values; edges and causality make it less."""
    for length in (SHORT, LONG):
        count = mechanism.cost(Shape(1, HEADS, length, length, SIZE)).flops.forward / (2 * HEADS)
        assert 0.4 < count / mechanism.evaluate("time", length, SIZE) < 4.5


def test_symbols_are_the_mechanism_s_own_parameters() -> None:
    window = SlidingWindowAttention(100, is_causal=True)
    assert window.evaluate("time", 5000, 64) == 5000 * 100 * 64
    assert window.evaluate("path", 5000, 64) == 5000 / 99
    assert window.evaluate("sent", 5000, 64, ranks=4) == 2 * 100 * 64 * 3 / 4
    assert math.isinf(SlidingWindowAttention(1).evaluate("path", 10, 4))
    some = LongformerAttention(10, global_tokens=(3, 7, 9))
    assert some.evaluate("decode_time", 100, 2) == (10 + 3) * 2
    assert LongformerAttention(11, global_tokens=0).evaluate("path", 100, 2) == 10
    bigbird = BigBirdAttention(block_size=16, num_window_blocks=5, num_global_blocks=2, num_random_blocks=4)
    assert bigbird.evaluate("time", 1000, 8) == 1000 * (5 + 2 + 4) * 16 * 8
    assert BigBirdAttention(block_size=16, num_global_blocks=0).evaluate("path", 160, 8) == 10
    assert SparseTransformerAttention("strided", 50).evaluate("time", 1000, 8) == 1000 * (50 + 20) * 8
    assert PerformerAttention(8, num_features=33).evaluate("state", 1000, 8) == 33 * 8


@pytest.mark.parametrize("mechanism", [p for p in EXAMPLES if p.values[0].is_causal])  # type: ignore[union-attr]
def test_the_state_grows_by_its_derivative(mechanism: Mechanism) -> None:
    """In numbers for each token and head; twice that, keys and values, in bytes."""
    shape = Shape(3, HEADS, 1, 10_000, SIZE, dtype=torch.bfloat16)
    cost = mechanism.cost(shape, phase="decode")
    longer = mechanism.cost(Shape(3, HEADS, 1, 10_001, SIZE, dtype=torch.bfloat16), phase="decode")
    assert longer.state_bytes - cost.state_bytes == cost.kv_bytes_per_token
    derivative = mechanism.complexity.state_per_token()
    assert cost.kv_bytes_per_token == 3 * HEADS * 2 * 2 * derivative.subs(
        sympy.Symbol("E", positive=True), SIZE
    )


def test_formulas_are_checked() -> None:
    assert FORMULA.degree("time") == 1 and FORMULA.degree("path") == 1
    assert FORMULA.evaluate("time", {"L": 3, "w": 5, "E": 7}) == 105
    with pytest.raises(ValueError, match=r"values must say what w is in 'L\*w\*E'"):
        FORMULA.evaluate("time", {"L": 3, "E": 7})
    with pytest.raises(ValueError, match="name must be one of"):
        FORMULA.expression("speed")
    for letter in ("q", "L"):
        with pytest.raises(ValueError, match="symbols must be letters of"):
            Complexity("L", "L", "1", "1", "1", "exact", symbols={letter: "x"})
    with pytest.raises(ValueError, match="exactness must be one of"):
        Complexity("L", "L", "1", "1", "1", "nearly exact")
