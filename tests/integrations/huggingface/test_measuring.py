"""Measuring and transferring in models of transformers, against the heads of the model that was not swapped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import measure_approximation, swap_attention, transfer_attention

from .models import CAUSAL, VOCABULARY, bert

LENGTH = 20
MODELS = {
    "llama": (CAUSAL["llama"], "model.layers.{}.self_attn", "model.layers.{}.self_attn.o_proj"),
    "qwen3": (CAUSAL["qwen3"], "model.layers.{}.self_attn", "model.layers.{}.self_attn.o_proj"),
    "gpt2": (CAUSAL["gpt2"], "transformer.h.{}.attn", "transformer.h.{}.attn.c_proj"),
    "bert": (bert, "encoder.layer.{}.attention.self", "encoder.layer.{}.attention.output.dense"),
}
MECHANISMS = {"sliding_window": {"window_size": 4}, "linear": {}}


def batch(padding: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if padding != "none":
        mask[0, slice(0, 6) if padding == "left" else slice(-6, None)] = 0
    tokens = torch.randint(2, VOCABULARY - 1, (2, LENGTH), generator=generator)
    return {"input_ids": tokens, "attention_mask": mask}


def larger_weights(model: Any) -> Any:
    """Initial weights are so small that every head nearly averages its values."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            parameter.data.mul_(8)
    return model


@torch.no_grad()
def merged_heads(model: Any, output: str, inputs: dict[str, Tensor]) -> Tensor:
    """What goes into an output projection, at the tokens that are not padding."""
    seen: list[Tensor] = []
    hook = model.get_submodule(output).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval()(**inputs)
    hook.remove()
    return seen[0][inputs["attention_mask"].bool()]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("family", MODELS)
def test_errors_are_those_between_the_heads_of_the_two_models(
    family: str, mechanism: str, padding: str
) -> None:
    make, path, output = MODELS[family]
    original, inputs = larger_weights(make()), batch(padding)
    by_hand = []
    for layer in range(2):
        # Swapped alone, a layer still has the inputs that it had.
        swapped = copy.deepcopy(original)
        swap_attention(swapped, mechanism, layers=[layer], **MECHANISMS[mechanism])
        at = output.format(layer)
        exact = merged_heads(original, at, inputs)
        by_hand.append(float((merged_heads(swapped, at, inputs) - exact).norm() / exact.norm()))
        (alone,) = measure_approximation(swapped, **inputs).layers
        assert alone.error == pytest.approx(by_hand[-1], rel=1e-6)
        assert alone.error > 0.02

    swapped = copy.deepcopy(original)
    swap_attention(swapped, mechanism, **MECHANISMS[mechanism])
    report = transfer_attention(swapped, [inputs], steps=20, lr=2e-3, projections=True)
    assert list(report.before.values()) == pytest.approx(by_hand, rel=1e-5)
    assert list(report.before) == [f"{path.format(layer)}.efficient_attn" for layer in range(2)]
    assert all(report.after[name] < report.before[name] for name in report.before)
    assert not any(output.format(layer) in name for name in report.trained for layer in range(2))


@pytest.mark.parametrize("family", MODELS)
def test_full_attention_has_no_error_and_nothing_to_learn(family: str) -> None:
    model = MODELS[family][0]()
    swap_attention(model, "full")
    report = measure_approximation(model, **batch("left"))
    assert len(report.layers) == 2
    for layer in report.layers:
        assert layer.error < 1e-10
        assert layer.mass_kept == pytest.approx(1)
    with pytest.raises(ValueError, match="the outputs are exact"):
        transfer_attention(model, [batch("left")], steps=1, projections=True)


def test_a_wrapped_model_runs_without_a_cache_and_has_its_config_back() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = CAUSAL["llama"]()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = Wrapped()
    swap_attention(model, "linear")
    report = measure_approximation(model, **batch("none"))
    assert [layer.rows for layer in report.layers] == [2 * 4 * LENGTH] * 2
    transfer_attention(model, [batch("none")], steps=1, projections=True)
    assert model.inner.config.use_cache is True


def test_low_precision_is_measured_and_learnt_in_high_precision() -> None:
    original = larger_weights(CAUSAL["llama"]()).to(torch.bfloat16)
    swap_attention(original, "sliding_window", window_size=4)
    precise = copy.deepcopy(original).double()
    pairs = zip(
        measure_approximation(original, **batch("left")).layers,
        measure_approximation(precise, **batch("left")).layers,
        strict=True,
    )
    for low, high in pairs:
        assert low.error == pytest.approx(high.error, rel=0.05)
        assert low.mass_kept == pytest.approx(high.mass_kept, rel=0.05)
    swap = copy.deepcopy(original)
    report = transfer_attention(swap, [batch("left")], steps=20, lr=1e-2, projections=True)
    assert all(report.after[name] < report.before[name] for name in report.before)


def test_adapters_learn_alone() -> None:
    peft = pytest.importorskip("peft")
    model = larger_weights(CAUSAL["llama"]())
    swap_attention(model, "linear")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    report = transfer_attention(adapted, [batch("left")], steps=40, lr=1e-2, projections=True)
    changed = {
        name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed == set(report.trained)
    assert all(".lora_" in name for name in changed)
    assert all(report.after[name] < report.before[name] for name in report.before)
