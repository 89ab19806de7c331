"""Crossovers, shares, paths and recommendations, against figures derived by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from efficient_attn import MECHANISMS, LinearAttention, Shape
from efficient_attn.planning import (
    DEVICES,
    METRICS,
    MODELS,
    MechanismSpec,
    Model,
    Plan,
    Recurrent,
    Workload,
    crossover,
    estimate_time,
    layer_shares,
    model_cost,
    path_length,
    recommend,
)

WIDTH, HEADS = 512, 8
SIZE = WIDTH // HEADS
BOTH_WAYS, CAUSAL = Model(1, WIDTH, HEADS, is_causal=False), Model(1, WIDTH, HEADS)


def test_linear_is_cheaper_than_softmax_from_the_head_size_on() -> None:
    """4 n^2 E against 4 n E^2; causal 2 n (n + 1) E."""
    assert crossover("full", "linear", model=BOTH_WAYS).length == SIZE
    assert crossover("full", "linear", model=CAUSAL).length == 2 * SIZE - 1
    found = crossover("full", "linear", model=BOTH_WAYS)
    assert found.at_length == (4 * SIZE**2 * WIDTH, 4 * SIZE**2 * WIDTH)


def test_chunks_of_a_causal_scan_cost_what_they_multiply() -> None:
    """Whole chunks of C, values with a column of ones: n = 2 C (E + V) / (2 E) + 4 E V / (2 E) - 1, V = E + 1."""
    chunk, values = 64, SIZE + 1
    full = 2 * SIZE  # FLOPs 2 E n (n + 1)
    scan = 2 * chunk * (SIZE + values) + 4 * SIZE * values  # a token
    expected = next(n for n in range(chunk, 10_000, chunk) if full * (n + 1) >= scan)
    found = crossover("full", "linear", "flops", model=CAUSAL, basis="model").length
    assert found is not None and expected > found, "the mathematics is cheaper than what chunks multiply"
    linear = LinearAttention(is_causal=True)
    for n in (expected - chunk, expected):
        cost = linear.cost(Shape(1, 1, n, n, SIZE), basis="hardware").flops.forward
        assert cost == scan * n
        assert (full * n * (n + 1) >= cost) == (n == expected)


@pytest.mark.parametrize(
    ("kind", "projections", "expected"),
    [("rnn", False, WIDTH), ("rnn", True, 1), ("gru", True, WIDTH), ("lstm", True, 2 * WIDTH)],
)
def test_recurrent_networks_are_cheaper_than_attention_from(
    kind: str, projections: bool, expected: int
) -> None:
    """4 n^2 d + 8 n d^2 (with projections) against 4 n d^2 a gate; a vanilla RNN is always cheaper than both."""
    found = crossover("full", Recurrent(kind), model=BOTH_WAYS, projections=projections)
    assert found.length == expected
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[kind]
    length = 100
    attention = 4 * length**2 * WIDTH + projections * 8 * length * WIDTH**2
    other = crossover("full", Recurrent(kind), model=BOTH_WAYS, projections=projections, at_most=length)
    assert other.at_length == (attention, 4 * length * WIDTH**2 * gates) or other.length == 1


def test_states_and_what_decoding_moves() -> None:
    """Keys and values in bf16, 4 n E, against a state in fp32, 4 E (E + 1), which is written, too."""
    assert crossover("full", "linear", "state_bytes", model=CAUSAL).length == SIZE + 1
    # The cache before the token, and the token's own entry written: 4 E n; the state read and written.
    assert crossover("full", "linear", "decode_bytes", model=CAUSAL).length == 2 * (SIZE + 1)
    grouped = replace(CAUSAL, num_kv_heads=2)
    assert crossover("full", "linear", "state_bytes", model=grouped).length == SIZE + 1, "both have two heads"
    assert crossover("full", "linear", "decode_flops", model=CAUSAL).length == SIZE
    assert crossover("full", "sliding_window", "state_bytes", model=CAUSAL).length > 511


def test_every_metric_is_measured() -> None:
    for metric in METRICS:
        found = crossover(
            "full", "sliding_window", metric, model=CAUSAL, device=DEVICES["H100"], at_most=4096
        )
        assert all(value >= 0 for value in found.at_length), metric
    never = crossover("sliding_window", "full", model=CAUSAL, at_most=4096)
    assert never.length is None and never.at_length[0] < never.at_length[1]
    assert crossover(Recurrent("rnn"), "full", "path_length", model=BOTH_WAYS).length == 2


def test_attention_is_half_of_a_layer_from_six_times_the_width_on() -> None:
    """n / (n + 6 d); it exceeds the FFN, 16 n d^2, from n = 4 d on; causal both need 2 n - 1 as many."""
    model = Model(3, 768, 12, is_causal=False)
    for length, attention, ffn in (
        (256, 5.3, 63.2),
        (512, 10.0, 60.0),
        (1024, 18.2, 54.5),
        (4096, 47.1, 35.3),
    ):
        shares = layer_shares(model, length)
        assert shares.attention == pytest.approx(length / (length + 6 * 768))
        assert shares.ffn == pytest.approx(4 * 768 / (length + 6 * 768))
        assert shares.attention + shares.projections + shares.ffn == pytest.approx(1)
        assert (round(100 * shares.attention, 1), round(100 * shares.ffn, 1)) == (attention, ffn)
    assert layer_shares(model, 6 * 768).attention == 0.5
    at = layer_shares(model, 4 * 768)
    assert at.attention == at.ffn
    causal = replace(model, is_causal=True)
    assert layer_shares(causal, 12 * 768 - 1).attention == 0.5


@pytest.mark.parametrize(
    ("mechanism", "longest"),
    [
        ("full", 1),
        ("bigbird", 2),
        ("sparse_transformer", 2),
        (MechanismSpec("sliding_window", {"window_size": 101}), 10),
        (Recurrent("lstm"), 999),
    ],
)
def test_paths(mechanism: Any, longest: float) -> None:
    path = path_length(mechanism, 1000, model=BOTH_WAYS)
    assert path.longest == longest
    assert path.sequential_steps == (1000 if isinstance(mechanism, Recurrent) else 1)


def names(plan: Plan) -> list[str]:
    return [candidate.mechanism.name for candidate in plan.ranked]


def reasons(plan: Plan) -> dict[str, str]:
    return {rejection.mechanism.name: rejection.reason for rejection in plan.rejected}


def test_every_mechanism_is_ranked_or_rejected_with_a_reason() -> None:
    workload = Workload(MODELS["gpt2-small"], 4096, DEVICES["H100"], training=True)
    plan = recommend(workload)
    assert sorted([*names(plan), *reasons(plan)]) == sorted(MECHANISMS)
    assert names(plan)[:2] == ["full", "flash"], "what is exact comes first"
    assert plan.best is plan.ranked[0]
    for name in ("performer", "linformer", "linear"):
        assert "allow_approximate=True" in reasons(plan)[name]
    for candidate in plan.ranked:
        model = workload.model.with_mechanism(candidate.mechanism)
        assert candidate.memory == model_cost(model, 1, 4096, training=True).memory
        assert candidate.time == estimate_time(model, workload.device, seq_len=4096, training=True)
        assert candidate.memory.total <= 0.9 * 80 * 10**9
    seconds = [c.time.seconds for c in plan.ranked if c.exactness == "exact within a pattern"]
    assert seconds == sorted(seconds)


def test_approximations_are_opted_into_and_come_last() -> None:
    workload = Workload(BOTH_WAYS, 8192, DEVICES["A100 40GB"], allow_approximate=True)
    ranked = recommend(workload).ranked
    order = ["exact", "exact within a pattern", "approximate", "different operator"]
    places = [order.index(candidate.exactness) for candidate in ranked]
    assert places == sorted(places) and set(places) == {0, 1, 2, 3}
    without = recommend(replace(workload, allow_patterns=False))
    assert {c.exactness for c in without.ranked} == {"exact", "approximate", "different operator"}
    assert "allow_patterns=True" in reasons(without)["bigbird"]


def test_masks_causality_and_memory_reject_by_name() -> None:
    packed = recommend(Workload(CAUSAL, 1024, DEVICES["H100"], needs=["segment_ids"], allow_approximate=True))
    assert reasons(packed)["longformer"] == "does not honour segment_ids"
    assert "is_causal must be False" in reasons(packed)["linformer"]
    biased = recommend(Workload(CAUSAL, 1024, DEVICES["H100"], needs=["attn_bias"]))
    assert names(biased) == ["full"]
    model, device = MODELS["gpt2-small"], DEVICES["RTX 4090"]
    long = recommend(Workload(model, 500_000, device, training=True))
    assert not long.ranked and long.best is None
    assert all("GiB" in reasons(long)[name] for name in ("full", "flash", "sliding_window"))


def test_checkpointing_is_taken_where_nothing_fits_without() -> None:
    workload = Workload(MODELS["gpt2-small"], 40_000, DEVICES["RTX 4090"], training=True)
    automatic = recommend(workload)
    assert automatic.best is not None and automatic.best.checkpointing
    assert not recommend(replace(workload, checkpointing=False)).ranked
    short = recommend(replace(workload, seq_len=1024))
    assert short.best is not None and not short.best.checkpointing


def test_decoding_prefers_what_has_little_to_read() -> None:
    workload = Workload(MODELS["llama-3-8b"], 131_072, DEVICES["H100"], batch=4, decode=True)
    plan = recommend(workload)
    assert set(reasons(plan)) >= {"full", "bigbird"}, "four caches of 16 GiB each"
    assert plan.best is not None and plan.best.mechanism.name == "sliding_window"
    assert "state" in reasons(plan)["full"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: crossover("full", "linear", "speed", model=CAUSAL), ValueError, "metric must be one of"),
        (lambda: crossover("full", "linear", "seconds", model=CAUSAL), ValueError, "device must be a Device"),
        (lambda: crossover("full", "linear", model=CAUSAL, basis="x"), ValueError, "basis must be one of"),
        (lambda: Recurrent("tcn"), ValueError, "kind must be one of"),
        (lambda: layer_shares(CAUSAL, 0), ValueError, "seq_len must be >= 1, got 0"),
        (lambda: path_length("full", 0, model=CAUSAL), ValueError, "seq_len must be >= 1, got 0"),
        (lambda: recommend(CAUSAL), TypeError, "workload must be a planning.Workload"),
        (lambda: Workload(CAUSAL, 8, "H100"), TypeError, "device must be a planning.Device"),
        (lambda: Workload(CAUSAL, 8, DEVICES["H100"], needs="bias"), TypeError, "needs must be a sequence"),
        (lambda: Workload(CAUSAL, 8, DEVICES["H100"], needs=["bias"]), ValueError, "needs must be one of"),
        (lambda: Workload(BOTH_WAYS, 8, DEVICES["H100"], decode=True), ValueError, "decode must be False"),
        (
            lambda: Workload(CAUSAL, 8, DEVICES["H100"], checkpointing=True),
            ValueError,
            "checkpointing must be False or 'auto' without training",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
