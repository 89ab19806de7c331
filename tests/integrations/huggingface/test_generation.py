"""`generate()` on swapped models: cached equals uncached, whatever the cache, the padding or the search."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import swap_attention
from efficient_attn.integrations.huggingface.cache import StateLayer

from .models import CAUSAL, WINDOW, padded, positions, tokens
from .swaps import CAUSAL_SWAPS, CONSTANT_STATE

NEW = 6
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 5},
}
TOLERANCE = 1e-6  # generate() gives its logits in fp32


def generated(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    """What greedy search gives, never stopped by an end of text."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": None,
        **options,
    }
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options
        )


def recomputed(model: Any, sequences: Tensor, mask: Tensor) -> Tensor:
    """The logits of each new token, computed anew from all that came before it."""
    length, logits = mask.shape[1], []
    for end in range(length, sequences.shape[1]):
        seen = torch.cat([mask, mask.new_ones(len(mask), end - length)], 1)
        with torch.no_grad():
            out = model(
                sequences[:, :end], attention_mask=seen, position_ids=positions(seen), use_cache=False
            )
        logits.append(out.logits[:, -1])
    return torch.stack(logits)


def error(out: Any, expected: Tensor) -> float:
    """The largest difference of the logits of a generation."""
    return (torch.stack(out.logits) - expected).abs().max().item()


def swapped(model: Any, to: str) -> None:
    """Swap, in silence about a window of the model's own that the mechanism looks beyond."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model's own window")
        swap_attention(model, to, **CAUSAL_SWAPS[to])


@pytest.mark.parametrize("to", CAUSAL_SWAPS)
@pytest.mark.parametrize("family", CAUSAL)
def test_cached_equals_uncached(family: str, to: str) -> None:
    model = CAUSAL[family]()
    swapped(model, to)
    ids = tokens()
    for side in ("none", "left"):
        mask = padded(ids, 4, side)
        expected = None
        for cache, options in CACHES.items():
            out = generated(model, ids, mask, **options)
            if expected is None:
                expected = recomputed(model, out.sequences, mask)
            assert error(out, expected) < TOLERANCE, (side, cache)
            kept = {isinstance(layer, StateLayer) for layer in out.past_key_values.layers}
            assert to not in CONSTANT_STATE or kept == {True}
            assert to != "full" or kept == {False}


@pytest.mark.parametrize("to", CAUSAL_SWAPS)
def test_beam_search_finds_what_it_finds_without_a_cache(to: str) -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, to, **CAUSAL_SWAPS[to])
    ids = tokens()
    for mask in (padded(ids, 0, "none"), padded(ids, 4, "left")):
        cached = generated(model, ids, mask, num_beams=3, num_return_sequences=2)
        plain = generated(model, ids, mask, num_beams=3, num_return_sequences=2, use_cache=False)
        assert torch.equal(cached.sequences, plain.sequences)


@pytest.mark.parametrize("to", ["linear", "sliding_window", "full"])
def test_several_samples_of_each_prompt(to: str) -> None:
    model = CAUSAL["gpt2"]()
    swap_attention(model, to, **CAUSAL_SWAPS[to])
    ids = tokens()
    options = {"do_sample": True, "num_return_sequences": 3}
    sequences = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        sequences.append(generated(model, ids, use_cache=use_cache, **options).sequences)
    assert sequences[0].shape == (6, ids.shape[1] + NEW)
    assert torch.equal(*sequences)


@pytest.mark.parametrize("to", CAUSAL_SWAPS)
def test_prompt_lookup_takes_back_what_it_guessed_wrong(to: str) -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, to, **CAUSAL_SWAPS[to])
    ids = tokens(batch=1, length=4).repeat(1, 4)  # repetition, so that there is something to look up
    plain = generated(model, ids, max_new_tokens=12, min_new_tokens=12)
    looked_up = generated(model, ids, max_new_tokens=12, min_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, looked_up.sequences)


def test_a_state_cannot_take_back_what_it_did_not_record() -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, "linear")
    cache = model(tokens(length=100), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="cannot take back 70 tokens from the state of LinearAttention"):
        cache.crop(-70)


@pytest.mark.parametrize("to", CONSTANT_STATE)
def test_the_state_has_one_size_at_any_length(to: str) -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, to, **CAUSAL_SWAPS[to])
    sizes = []
    with torch.no_grad():
        for length in (10, 100):
            cache = model(tokens(length=length), use_cache=True).past_key_values
            sizes.append([layer.nbytes for layer in cache.layers])
            assert cache.get_seq_length() == length
    assert sizes[0] == sizes[1]
    if to == "sliding_window":
        slots = [
            state.k.shape[2] + state.sink_k.shape[2] for state in (layer.state for layer in cache.layers)
        ]
        assert all(count <= 5 + 2 for count in slots)


def test_a_window_on_llama_is_mistral() -> None:
    mistral = CAUSAL["mistral"]()
    rotary = mistral.config.rope_parameters
    llama = CAUSAL["llama"](head_dim=8, rope_parameters=rotary, rms_norm_eps=mistral.config.rms_norm_eps)
    llama.load_state_dict(mistral.state_dict())
    swap_attention(llama, "sliding_window", window_size=WINDOW)
    ids = tokens()
    for side in ("none", "left"):
        mask = padded(ids, 4, side)
        with torch.no_grad():
            a, b = (
                m(ids, attention_mask=mask, position_ids=positions(mask)).logits for m in (llama, mistral)
            )
        assert (a - b)[mask.bool()].abs().max() < 1e-12
        for options in CACHES.values():
            ours, theirs = generated(llama, ids, mask, **options), generated(mistral, ids, mask)
            assert error(ours, torch.stack(theirs.logits)) < TOLERANCE
    beams = [generated(m, ids, num_beams=3).sequences for m in (llama, mistral)]
    assert torch.equal(*beams)


def test_a_cache_from_before_the_swap_is_refused() -> None:
    model = CAUSAL["llama"]()
    cache = model(tokens(), use_cache=True).past_key_values
    report = swap_attention(model, "linear")
    with pytest.raises(ValueError, match="keys and values of layer 0, from before it was swapped"):
        model(tokens(length=1), past_key_values=cache)
    swapped = model(tokens(), use_cache=True).past_key_values
    report.restore()
    with pytest.raises(RuntimeError, match="put back since"):
        model(tokens(length=1), past_key_values=swapped)


def test_a_cache_can_be_used_for_another_text() -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, "linear")
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).past_key_values
        cache.reset()
        again = model(tokens(seed=9), past_key_values=cache).logits
        assert (again - model(tokens(seed=9), use_cache=False).logits).abs().max() < 1e-12


@pytest.mark.parametrize("family", ["bart", "whisper", "t5"])
def test_decoders_of_an_encoder_generate(family: str) -> None:
    from .models import OTHERS, inputs_of

    model = OTHERS[family]()
    swap_attention(model, "full")
    given = inputs_of(family)
    given.pop("decoder_input_ids")
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 2}
    with torch.no_grad():
        cached, plain = (model.generate(**given, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_a_bart_decoder_keeps_a_state_beside_its_stock_cross_attention() -> None:
    from .models import OTHERS, inputs_of

    model = OTHERS["bart"]()
    swap_attention(model, "linear")
    given = inputs_of("bart")
    given.pop("decoder_input_ids")
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3, "return_dict_in_generate": True}
    with torch.no_grad():
        cached, plain = (model.generate(**given, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    own, cross = cached.past_key_values.self_attention_cache, cached.past_key_values.cross_attention_cache
    assert all(isinstance(layer, StateLayer) for layer in own.layers)
    assert not any(isinstance(layer, StateLayer) for layer in cross.layers)
