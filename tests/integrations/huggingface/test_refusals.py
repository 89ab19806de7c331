"""What a mechanism cannot do for a model is refused, by name, before anything has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from efficient_attn import SwapError, swap_attention
from efficient_attn.mechanisms import FullAttention, LinearAttention

from .models import CAUSAL, GROUPED, HEADS, OTHERS, SIZES, SPECIAL, WINDOW, _built, bert, inputs_of, tokens


def refused(model: nn.Module, to: Any, message: str, **options: Any) -> None:
    """The swap raises, names the reason, and leaves the model as it was."""
    before = {name: type(module) for name, module in model.named_modules()}
    config = model.config.to_dict()
    with pytest.raises(SwapError, match=message):
        swap_attention(model, to, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.config.to_dict() == config


def test_softcap() -> None:
    model = CAUSAL["gemma2"](attn_logit_softcapping=50.0)
    refused(model, "linear", "only full attention can apply the layer's softcap")
    refused(model, "flash", r"model.layers.1.self_attn \(Gemma2Attention")


def test_softcap_that_only_shows_when_it_is_called() -> None:
    model = CAUSAL["gemma2"]()
    swap_attention(model, "flash")
    model.model.layers[0].self_attn.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match="cannot honour softcap: only FullAttention does"):
        model(tokens())


def test_attention_sinks() -> None:
    sizes = {**GROUPED, **HEADS, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": WINDOW}
    model = _built(transformers.GptOssForCausalLM, transformers.GptOssConfig(**sizes))
    refused(model, "sliding_window", r"attention sinks \(s_aux\)", window_size=4)


def test_position_bias() -> None:
    refused(OTHERS["t5"](), "linear", "only full attention can apply the layer's position_bias")


def test_linformer_cannot_be_causal() -> None:
    refused(CAUSAL["llama"](), "linformer", "every output would see the future", rank=8, max_seq_len=64)


@pytest.mark.parametrize("name", ["Falcon", "Bloom"])
def test_models_without_the_interface(name: str) -> None:
    sizes = {
        **SPECIAL,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "n_layer": 2,
        "n_head": 4,
    }
    config = getattr(transformers, name + "Config")(**sizes)
    model = _built(getattr(transformers, name + "ForCausalLM"), config)
    refused(model, "linear", f"{name}Attention does not go through transformers' attention interface")


def test_deberta_is_named_too() -> None:
    model = _built(transformers.DebertaModel, transformers.DebertaConfig(vocab_size=97, **SIZES))
    refused(model, "linear", "DisentangledSelfAttention does not go through")


def test_a_model_without_attention() -> None:
    with pytest.raises(SwapError, match="Linear has no attention module that can be swapped"):
        swap_attention(nn.Linear(2, 2), "linear")


def test_a_mechanism_of_the_other_causality() -> None:
    model = CAUSAL["llama"]()
    refused(
        model, lambda site: LinearAttention(), "the layer has is_causal=True, the mechanism is_causal=False"
    )


def test_cross_attention_is_left_alone_and_refused_by_name() -> None:
    model = OTHERS["bart"]()
    report = swap_attention(model, "linear", dry_run=True)
    kept = [row.path for row in report.rows if row.mechanism is None]
    assert kept == [f"model.decoder.layers.{i}.encoder_attn" for i in (0, 1)]
    refused(
        model, lambda site: FullAttention(is_causal=site.is_causal), "cross-attention is left to the model"
    )


def test_two_swaps_of_one_module() -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, "linear", layers=[0])
    with pytest.raises(SwapError, match=r"layers\.0\.self_attn .*swapped already: restore it first"):
        swap_attention(model, "full")
    swap_attention(model, "full", layers=[1])


def test_layers_that_are_not_there() -> None:
    refused(CAUSAL["llama"](), "linear", "layers: 7 names no attention module", layers=[0, 7])
    refused(CAUSAL["llama"](), "linear", "layers: 'decoder.*' names no", layers=["decoder.*"])


@pytest.mark.parametrize("to", ["linear", "sliding_window", "flash"])
def test_weights_of_another_mechanism(to: str) -> None:
    model = CAUSAL["llama"](attn_implementation="eager")
    swap_attention(model, to, **({"window_size": 4} if to == "sliding_window" else {}))
    with pytest.raises(ValueError, match="cannot honour output_attentions=True"):
        model(tokens(), output_attentions=True)


def test_packed_documents_in_a_cache() -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, "linear")
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    mask[..., 6:, :6] = False
    with pytest.raises(ValueError, match="not this dense attention_mask"):
        model(tokens(batch=1), attention_mask=mask, use_cache=True)


def test_a_pattern_of_the_models_own() -> None:
    from transformers import masking_utils

    from efficient_attn.integrations.huggingface.masks import flat_mask

    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64))
    blocks = masking_utils.or_masks(
        masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.zeros(2, 12))
    )
    bidirectional = masking_utils.sliding_window_bidirectional_mask_function(4)
    for pattern in (chunked, blocks, bidirectional):
        with pytest.raises(ValueError, match="this model's attention pattern would be lost"):
            flat_mask(2, 12, 12, mask_function=pattern)


def test_a_layer_called_as_cross_attention() -> None:
    model = bert()
    swap_attention(model, "full")
    attention = model.encoder.layer[0].attention.self
    with pytest.raises(SwapError, match="was swapped as self-attention, and is given encoder_hidden_states"):
        attention(torch.randn(1, 3, 32).double(), encoder_hidden_states=torch.randn(1, 3, 32).double())


def test_dropout_that_linear_attention_has_no_weights_for() -> None:
    model = bert(attention_probs_dropout_prob=0.1)
    with pytest.warns(
        UserWarning, match=r"attention dropout of 0.1 is left out: LinearAttention has no weights"
    ):
        report = swap_attention(model, "linear")
    assert "no weights to drop" in str(report)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_dropout_is_honoured_by_softmax_mechanisms(family: str) -> None:
    make = CAUSAL["gpt2"] if family == "gpt2" else bert
    name = "attn_pdrop" if family == "gpt2" else "attention_probs_dropout_prob"
    model = make(**{name: 0.5})
    swap_attention(model, "flash")
    attention = next(m for m in model.modules() if hasattr(m, "efficient_attn"))
    assert attention.efficient_attn.dropout_p == 0.5
    given = {**inputs_of(family), **({"use_cache": False} if family == "gpt2" else {})}
    evaluated = [model(**given)[0] for _ in range(2)]
    model.train()
    trained = [model(**given)[0] for _ in range(2)]
    assert torch.equal(*evaluated) and not torch.equal(*trained)
    trained[0].square().sum().backward()
