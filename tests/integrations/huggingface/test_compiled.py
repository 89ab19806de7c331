"""Compiled: one graph, the memory of a state stays where it is, and no pattern is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import masking_utils

from efficient_attn import swap_attention
from efficient_attn.integrations.huggingface import register
from efficient_attn.integrations.huggingface.cache import StateLayer
from efficient_attn.integrations.huggingface.masks import flat_mask

from .models import CAUSAL, padded, tokens
from .test_generation import swapped

EXACT = 1e-12


@pytest.mark.parametrize(
    ("family", "to"),
    [("llama", "full"), ("llama", "linear"), ("llama", "sliding_window"), ("mistral", "performer")],
)
def test_compiles_to_one_graph(family: str, to: str) -> None:
    torch._dynamo.reset()
    model, ids = CAUSAL[family](), tokens()
    swapped(model, to)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert (
            compiled(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits - expected
        ).abs().max() < EXACT
        cache = model(ids[:, :8], use_cache=True).past_key_values
        memory = [x.data_ptr() for x in _states(cache)]
        for i in range(8, 12):
            logits = compiled(ids[:, i : i + 1], past_key_values=cache).logits
            assert (logits[:, 0] - expected[:, i]).abs().max() < EXACT
        assert [x.data_ptr() for x in _states(cache)] == memory, "a captured graph could not be replayed"


def _states(cache: Any) -> list[Tensor]:
    layers = [layer for layer in cache.layers if isinstance(layer, StateLayer)]
    return [x for layer in layers for x in layer.state.tensors().values()]  # type: ignore[union-attr]


@pytest.mark.parametrize("layers", [{0: "full", 1: "linear"}, {0: "linear", 1: "full"}])
def test_a_compiled_step_on_a_static_cache_beside_a_state(layers: dict[int, str]) -> None:
    torch._dynamo.reset()
    model, ids = CAUSAL["llama"](), tokens()
    for layer, to in layers.items():
        swap_attention(model, to, layers=[layer])
    compiled = torch.compile(model, backend="eager")
    mask = padded(ids, 4, "left")
    with torch.no_grad():
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        model(ids, attention_mask=mask, past_key_values=cache)
        seen = torch.cat([mask, mask.new_ones(2, 1)], 1)
        one = compiled(ids[:, :1], attention_mask=seen, past_key_values=cache).logits
        whole = model(torch.cat([ids, ids[:, :1]], 1), attention_mask=seen, use_cache=False).logits
    assert (one[:, 0] - whole[:, -1])[1].abs().max() < EXACT


@pytest.mark.parametrize("to", ["full", "linear", "sliding_window"])
def test_a_compiled_step_of_an_implementation_by_name(to: str) -> None:
    torch._dynamo.reset()
    name = register(to, f"hazard_{to}", **({"window_size": 4} if to == "sliding_window" else {}))
    model, ids = CAUSAL["llama"](attn_implementation=name), tokens()
    with pytest.raises(Exception, match="run the model once before compiling it"):
        torch.compile(CAUSAL["llama"](attn_implementation=name), backend="eager", fullgraph=True)(ids)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        whole = model(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits
        for given in ({}, {"attention_mask": torch.ones(2, 13, dtype=torch.int64)}):
            cache = transformers.StaticCache(config=model.config, max_cache_len=20)
            model(ids, past_key_values=cache)
            one = compiled(ids[:, :1], past_key_values=cache, **given).logits
            assert (one[:, 0] - whole[:, -1]).abs().max() < EXACT


def test_compiling_does_not_lose_a_pattern() -> None:
    """Each is asked for inside of what is compiled, with a mask for padding too."""

    def blocks() -> Any:
        return masking_utils.or_masks(
            masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.zeros(2, 12))
        )

    def chunks() -> Any:
        return masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64))

    def both_ways() -> Any:
        return masking_utils.sliding_window_bidirectional_mask_function(4)

    for pattern in (blocks, chunks, both_ways):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda mask, pattern=pattern: flat_mask(2, 12, 12, mask_function=pattern(), attention_mask=mask),
            backend="eager",
        )
        with pytest.raises(
            Exception, match=r"pattern is n|pattern is not|does not know this attention pattern|would be lost"
        ):
            compiled(torch.ones(2, 12, dtype=torch.bool))
    torch._dynamo.reset()
    window = torch.compile(
        lambda mask: flat_mask(
            2, 12, 12, mask_function=masking_utils.sliding_window_causal_mask_function(4), attention_mask=mask
        ),
        backend="eager",
    )
    assert window(torch.ones(2, 12, dtype=torch.bool)).all()
