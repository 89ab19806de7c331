"""Swapped models in the tools that people train with: Trainer, LoRA, mixed precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from efficient_attn import load_swapped, swap_attention

from .models import CAUSAL, bert, tokens
from .swaps import CAUSAL_SWAPS, SWAPS


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """A few random texts."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = tokens(batch=1, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("to", ["performer", "sliding_window"])
def test_trainer_runs_saves_and_the_result_loads(to: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = CAUSAL["llama"]().float()
    swap_attention(model, to, **CAUSAL_SWAPS[to])
    before = {name: p.clone() for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_steps=3,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Texts())
    losses = trainer.train().training_loss
    assert losses > 0 and any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    loaded = load_swapped(tmp_path / "checkpoint-3").eval()
    with torch.no_grad():
        a, b = (m(tokens(), use_cache=False).logits for m in (loaded, model.eval()))
    assert torch.equal(a, b)


@pytest.mark.parametrize("to", ["linear", "sliding_window"])
def test_lora(to: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = CAUSAL["llama"]()
    swap_attention(model, to, **CAUSAL_SWAPS[to])
    expected = model(tokens(), use_cache=False).logits.detach()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).double()
    assert (adapted(input_ids=tokens(), use_cache=False).logits - expected).abs().max() < 1e-12
    optimiser = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), 1.0)
    for _ in range(2):
        adapted(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        optimiser.step()
    changed = adapted(input_ids=tokens(), use_cache=False).logits.detach()
    assert (changed - expected).abs().max() > 1e-6
    merged = adapted.merge_and_unload()
    assert (merged(tokens(), use_cache=False).logits - changed).abs().max() < 1e-12
    assert hasattr(merged.model.layers[0].self_attn, "efficient_attn")


def test_swapping_a_model_that_has_lora_already() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(CAUSAL["llama"](), peft.LoraConfig(r=2, target_modules=["q_proj"])).double()
    plain = CAUSAL["llama"]()
    for model in (adapted, plain):
        swap_attention(model, "linear")
    assert (adapted(input_ids=tokens()).logits - plain(tokens()).logits).abs().max() < 1e-12


def test_linformer_learns_its_projections() -> None:
    model = bert()
    swap_attention(model, "linformer", **SWAPS["linformer"])
    model(tokens())[0].square().sum().backward()
    learnt = [p for name, p in model.named_parameters() if ".efficient_attn." in name]
    assert learnt and all(p.grad is not None and p.grad.abs().max() > 0 for p in learnt)


@pytest.mark.parametrize("to", CAUSAL_SWAPS)
def test_training_with_a_cache_that_nobody_asked_for(to: str) -> None:
    """transformers makes a cache by default; the loss and its gradients are those without one."""
    results = []
    for use_cache in (True, False):
        model = CAUSAL["llama"]().train()
        swap_attention(model, to, **CAUSAL_SWAPS[to])
        model(tokens(), labels=tokens(), use_cache=use_cache).loss.backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm() + 1e-14
