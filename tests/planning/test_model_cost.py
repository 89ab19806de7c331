"""`model_cost` says what a transformer written in torch really has, computes, keeps and allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planning.reference_model import Transformer, sample_tokens

from efficient_attn import (
    Attention,
    FullAttention,
    LinearAttention,
    PerformerAttention,
    Shape,
    SlidingWindowAttention,
    count_flops,
)
from efficient_attn.feature_maps import FeatureMap, Features
from efficient_attn.planning import MODELS, MechanismSpec, Model, model_cost
from efficient_attn.planning.costs import planned_backend
from efficient_attn.testing.counting import Peak, saved_bytes

BATCH, LENGTH = 2, 48
WINDOW = MechanismSpec("sliding_window", {"window_size": 8})
SIZES: dict[str, Any] = {"vocab_size": 101, "mechanism": WINDOW}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped, gated": {
        "num_kv_heads": 2,
        "gated_ffn": True,
        "bias": False,
        "tied_embeddings": False,
        "norm": "rms",
    },
    "learnt positions": {"max_positions": 64, "ffn_dim": 50},
    "no norms": {"norm": "none"},
    "one of each": {"mechanism": ["linear", WINDOW, MechanismSpec("performer", {"num_features": 16})]},
    "wide heads": {"head_dim": 24},
    "attention alone": {"ffn_dim": 0},
    "not causal": {"is_causal": False, "mechanism": MechanismSpec("linformer", {"rank": 8})},
}


def described(kind: str, dtype: torch.dtype = torch.float32) -> Model:
    return Model(3, 32, 4, **{**SIZES, **KINDS[kind]}, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-3-8b", 8_030_261_248),
    ],
)
def test_known_models_have_their_published_parameters(name: str, params: int) -> None:
    assert MODELS[name].num_params == params
    memory = model_cost(MODELS[name], 1, 128, training=True).memory
    assert memory.weights == memory.gradients == 2 * params
    assert memory.optimizer == 12 * params, "two moments and a copy in fp32"


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_flops_and_what_is_kept_are_exact(kind: str) -> None:
    model = described(kind)
    reference, (tokens, targets) = Transformer(model, LENGTH), sample_tokens(model, BATCH, LENGTH)
    declared = model_cost(model, BATCH, LENGTH, training=True, basis="torch", device_type="cpu")
    assert declared.total.params == sum(p.numel() for p in reference.parameters())
    counted = count_flops(lambda: reference.loss(tokens, targets).backward()).total
    # The operators that mix dtypes or devices apart, each product has two in its backward pass.
    assert counted == declared.total.flops.total
    others = (*reference.parameters(), *reference.buffers())
    kept = saved_bytes(lambda: reference.loss(tokens, targets), besides=others)
    # torch's kernel for Linformer's core lays the heads side by side: merging them copies nothing.
    uncopied = 3 * BATCH * LENGTH * 32 * 4 if kind == "not causal" else 0
    assert kept + uncopied == declared.memory.activations == declared.total.saved_bytes
    assert declared.memory.activations == sum(part.saved_bytes for part in declared.parts.values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "not causal"])
def test_checkpointing_keeps_the_inputs_and_computes_the_layers_again(kind: str) -> None:
    model = described(kind)
    reference = Transformer(model, LENGTH, checkpointing=True)
    tokens, targets = sample_tokens(model, BATCH, LENGTH)
    call = {"training": True, "basis": "torch", "device_type": "cpu"}
    declared = model_cost(model, BATCH, LENGTH, checkpointing=True, **call)
    assert count_flops(lambda: reference.loss(tokens, targets).backward()).total == declared.total.flops.total
    others = (*reference.parameters(), *reference.buffers())
    kept = saved_bytes(lambda: reference.loss(tokens, targets), besides=others)
    assert kept == declared.memory.activations
    without = model_cost(model, BATCH, LENGTH, **call)
    assert declared.memory.activations < without.memory.activations
    assert declared.total.flops.total > without.total.flops.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_allocated_in_training_is_bounded(kind: str, checkpointing: bool, dtype: torch.dtype) -> None:
    model, length = described(kind, dtype), 256 if kind != "learnt positions" else 64
    reference = Transformer(model, length, checkpointing=checkpointing)
    tokens, targets = sample_tokens(model, BATCH, length)
    reference.loss(tokens, targets).backward()  # gradients are there from now on, and accumulate
    given = [*reference.parameters(), *(p.grad for p in reference.parameters()), *reference.buffers()]
    with Peak([*given, tokens, targets]) as peak:
        reference.loss(tokens, targets).backward()
    call = {"training": True, "checkpointing": checkpointing, "device_type": "cpu"}
    declared = model_cost(model, BATCH, length, **call).total.peak_bytes
    assert peak.bytes <= declared <= 3 * peak.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_allocated_in_a_forward_pass_is_bounded(kind: str, dtype: torch.dtype) -> None:
    model, length = described(kind, dtype), 256 if kind != "learnt positions" else 64
    reference, (tokens, _) = Transformer(model, length).eval(), sample_tokens(model, BATCH, length)
    with torch.no_grad(), Peak([*reference.parameters(), *reference.buffers(), tokens]) as peak:
        reference(tokens)
    declared = model_cost(model, BATCH, length, device_type="cpu")
    assert peak.bytes <= declared.memory.workspace <= 3 * peak.bytes
    assert (
        count_flops(reference, tokens).total
        == model_cost(model, BATCH, length, basis="torch", device_type="cpu").total.flops.total
    )


def test_decoding_holds_the_states_and_reads_them_with_the_weights_once() -> None:
    model = MODELS["llama-3-8b"]
    for batch, length in ((1, 8192), (16, 1000)):
        cost = model_cost(model, batch, length, phase="decode")
        per_token = 32 * 2 * 8 * 128 * 2
        assert cost.memory.state == batch * length * per_token
        assert cost.total.kv_bytes_per_token == batch * per_token
        matrices = 2 * (model.num_params - 128_256 * 4096)
        small = cost.total.bytes_read - matrices - cost.memory.state
        assert 0 <= small < batch * 10_000_000, "activations of one token"
        products = batch * 2 * (32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336) + 4096 * 128_256)
        assert cost.total.flops.total == products + batch * 32 * 4 * 32 * 128 * length
    assert model_cost(model, 1, 8192, training=True).memory.state == 0


def test_an_attention_layer_is_a_model_of_its_own() -> None:
    layer = Attention(64, 4, SlidingWindowAttention(16, is_causal=True), num_kv_heads=2)
    for training in (False, True):
        cost = model_cost(layer, 2, 100, training=training, device_type="cpu", optimizer="none")
        own = layer.cost(2, 100, training=training, dtype=torch.float32)
        assert cost.total.flops == own.flops
        assert cost.total.params == own.params
        assert cost.total.traffic == own.traffic
        assert cost.memory.activations == own.saved_bytes
        assert cost.memory.state == (0 if training else own.state_bytes)
        assert set(cost.parts) == {"attention", "projections"}


def test_kernels_are_planned_for_where_they_run() -> None:
    attention = LinearAttention(is_causal=True)
    model = Model(1, 64, 1, mechanism=attention)
    shape = Shape(1, 1, 4096, 4096, 64)
    for device_type, backend in (("cuda", "triton"), ("rocm", "chunked"), ("cpu", "chunked")):
        expected = attention.cost(shape, training=True, basis="hardware", backend=backend)
        cost = model_cost(model, 1, 4096, training=True, basis="hardware", device_type=device_type)
        assert cost.parts["attention"] == expected, device_type


def test_kernels_are_not_planned_for_what_they_refuse() -> None:
    class Other(FeatureMap):
        name = "other"

        def forward(self, x: torch.Tensor) -> Features:
            return Features(x.exp(), None)

    narrow, wide = PerformerAttention(64, is_causal=True), PerformerAttention(256, is_causal=True)
    for mechanism, head_dim, dtype, backend in (
        (narrow, 64, torch.bfloat16, "triton"),
        (wide, 256, torch.bfloat16, None),
        (LinearAttention(), 128, torch.float32, "triton"),
        (LinearAttention(), 64, torch.float64, None),
        (LinearAttention(feature_map=Other()), 64, torch.bfloat16, None),
        (SlidingWindowAttention(8), 256, torch.float16, "triton"),
        (SlidingWindowAttention(8), 512, torch.float16, None),
        (SlidingWindowAttention(8, backend="blocked"), 64, torch.float16, None),
        (FullAttention(), 64, torch.float16, None),
    ):
        assert planned_backend(mechanism, "cuda", dtype, head_dim) == backend, mechanism
        assert planned_backend(mechanism, "rocm", dtype, head_dim) is None


def test_the_terms_of_memory_sum_to_the_whole() -> None:
    memory = model_cost(MODELS["gpt2-small"], 3, 700, training=True).memory
    assert sum(memory.as_dict().values()) == memory.total
    assert memory.as_dict()[memory.largest] == max(memory.as_dict().values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "gpt2-small"}, TypeError, "model must be a planning.Model or an Attention, got str"),
        ({"batch": -1}, ValueError, "batch must be >= 0, got -1"),
        ({"phase": "train"}, ValueError, "phase must be one of"),
        ({"basis": "exact"}, ValueError, "basis must be one of"),
        ({"optimizer": "lion", "training": True}, ValueError, "optimizer must be one of"),
        ({"device_type": "tpu"}, ValueError, "device_type must be one of"),
        ({"checkpointing": True}, ValueError, "checkpointing must be False without training"),
        ({"training": True, "phase": "decode"}, ValueError, "phase must be 'prefill' when training"),
        ({"phase": "decode", "seq_len": 0}, ValueError, "seq_len must be >= 1 when decoding"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"model": MODELS["gpt2-small"], "batch": 1, "seq_len": 8} | options
    model, batch, seq_len = call.pop("model"), call.pop("batch"), call.pop("seq_len")
    with pytest.raises(error, match=message):
        model_cost(model, batch, seq_len, **call)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 8, 2), {}, "num_layers must be >= 1, got 0"),
        ((1, 9, 2), {}, "num_heads must divide embed_dim = 9"),
        ((1, 8, 4), {"num_kv_heads": 3}, "num_kv_heads must divide num_heads = 4, got 3"),
        ((1, 8, 2), {"norm": "batch"}, "norm must be one of"),
        ((2, 8, 2), {"mechanism": ["full"]}, "one for each of 2 layers, got 1"),
        ((1, 8, 2), {"mechanism": "fool"}, "name must be one of"),
    ],
)
def test_bad_descriptions_are_named(
    arguments: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Model(*arguments, **options)


def test_a_mechanism_must_be_as_causal_as_its_model() -> None:
    with pytest.raises(ValueError, match="must have is_causal=True, as the model has"):
        model_cost(Model(1, 8, 2, mechanism=LinearAttention()), 1, 8)
    with pytest.raises(ValueError, match="is_causal must be False"):
        model_cost(Model(1, 8, 2, mechanism="linformer"), 1, 8)
