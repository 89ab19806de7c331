"""A swap is saved with its model, and comes back in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from efficient_attn import SwapError, load_swapped, swap_attention
from efficient_attn.feature_maps import EluPlusOne
from efficient_attn.mechanisms import LinearAttention, PerformerAttention

from .models import CAUSAL, bert, tokens
from .swaps import CAUSAL_SWAPS, SWAPS

FRESH = """
import sys, torch, efficient_attn
model = efficient_attn.load_swapped(sys.argv[1])
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(ids)[0], sys.argv[3])
"""


@pytest.mark.parametrize("to", ["performer", "linformer"])
def test_a_fresh_process_computes_the_same(to: str, tmp_path: Path) -> None:
    model = bert() if to == "linformer" else CAUSAL["llama"]()
    swap_attention(model, to, **({**SWAPS[to], "seed": 3} if to == "performer" else SWAPS[to]))
    ids = tokens()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        expected = model(ids)[0]
    model.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids")
    command = [sys.executable, "-c", FRESH, *(str(tmp_path / name) for name in ("model", "ids", "out"))]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(tmp_path / "out"), expected)


@pytest.mark.parametrize("to", CAUSAL_SWAPS)
def test_every_mechanism_comes_back(to: str, tmp_path: Path) -> None:
    model = CAUSAL["gpt2"]()
    swap_attention(model, to, **CAUSAL_SWAPS[to])
    model.save_pretrained(tmp_path)
    loaded = load_swapped(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(model)
    assert [str(m) for m in loaded.modules()] == [str(m) for m in model.modules()]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens()).logits, model(tokens()).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["efficient_attn"]


def test_mechanisms_made_by_hand_come_back_too(tmp_path: Path) -> None:
    model = CAUSAL["llama"]()
    swap_attention(
        model,
        lambda site: (
            PerformerAttention(site.head_dim, num_features=12, is_causal=True) if site.layer else None
        ),
    )
    model.save_pretrained(tmp_path)
    loaded = load_swapped(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert not hasattr(loaded.model.layers[0].self_attn, "efficient_attn")


def test_in_shards(tmp_path: Path) -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, "performer")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_swapped(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_what_a_config_cannot_say_is_said_when_it_is_loaded(tmp_path: Path) -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, lambda site: LinearAttention(feature_map=EluPlusOne(), is_causal=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        SwapError, match=r"(?s)layers.0.self_attn was swapped to LinearAttention.*cannot describe"
    ):
        load_swapped(tmp_path)


def test_a_model_that_was_not_swapped(tmp_path: Path) -> None:
    model = CAUSAL["llama"]()
    report = swap_attention(model, "linear")
    report.restore()
    model.save_pretrained(tmp_path)
    assert "efficient_attn" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(SwapError, match="holds no swapped model"):
        load_swapped(tmp_path)


@pytest.mark.parametrize(
    "described", [{"mechanism": "no_such"}, {"mechanism": "linear", "arguments": {"x": 1}}]
)
def test_a_damaged_config(described: dict[str, Any], tmp_path: Path) -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, "linear")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["efficient_attn"]["model.layers.1.self_attn"] = described
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SwapError, match=r"model\.layers\.1\.self_attn"):
        load_swapped(tmp_path)


def test_a_checkpoint_without_the_mechanisms_parameters(tmp_path: Path) -> None:
    model = bert()
    swap_attention(model, "linformer", **SWAPS["linformer"])
    config = model.config.efficient_attn
    plain = bert()
    plain.config.efficient_attn = config
    plain.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="key_projection"):
        load_swapped(tmp_path)


def test_a_swap_and_its_restoring_leave_no_trace() -> None:
    model = CAUSAL["llama"]()
    before = {name: (id(module), set(vars(module))) for name, module in model.named_modules()}
    parameters = [id(p) for p in model.parameters()]
    config, hooks = model.config.to_dict(), [len(m._forward_pre_hooks) for m in model.modules()]
    report = swap_attention(model, "performer")
    assert [id(p) for p in model.parameters()] == parameters
    report.restore()
    report.restore()
    assert {name: (id(module), set(vars(module))) for name, module in model.named_modules()} == before
    assert model.config.to_dict() == config
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.config._attn_implementation == "sdpa"
    assert isinstance(model, transformers.LlamaForCausalLM)
