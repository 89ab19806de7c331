"""`attn_implementation="efficient_attn:NAME"`, without a swap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from efficient_attn import swap_attention
from efficient_attn.integrations.huggingface import register

from .models import CAUSAL, OTHERS, inputs_of, padded, positions, tokens
from .swaps import CAUSAL_SWAPS
from .test_generation import CACHES, TOLERANCE, error, generated, recomputed

NAMES = {
    to: register(to, f"test_{to.replace('flash', 'fused')}", **options)
    for to, options in CAUSAL_SWAPS.items()
}


@pytest.mark.parametrize("to", NAMES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_computes_what_a_swap_computes(family: str, to: str) -> None:
    named, swapped = CAUSAL[family](attn_implementation=NAMES[to]), CAUSAL[family]()
    swap_attention(swapped, to, **CAUSAL_SWAPS[to])
    ids = tokens()
    for side in ("none", "left", "right"):
        mask = padded(ids, 4, side)
        given = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
        with torch.no_grad():
            a, b = (m(ids, **given).logits for m in (named, swapped))
        assert torch.equal(a, b)
        if side == "right":
            continue
        for cache, options in CACHES.items():
            out = generated(named, ids, mask, **options)
            assert error(out, recomputed(named, out.sequences, mask)) < TOLERANCE, (side, cache)


@pytest.mark.parametrize("family", OTHERS)
def test_full_changes_nothing(family: str) -> None:
    model, stock = OTHERS[family](), OTHERS[family]()
    model.set_attn_implementation(NAMES["full"])
    with torch.no_grad():
        ours, theirs = (m(**inputs_of(family)) for m in (model, stock))
    assert torch.equal(ours[0], theirs[0])


def test_a_decoder_beside_cross_attention_generates() -> None:
    model = OTHERS["bart"](attn_implementation=NAMES["linear"])
    given = inputs_of("bart")
    given.pop("decoder_input_ids")
    with torch.no_grad():
        cached, plain = (
            model.generate(**given, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
        )
    assert torch.equal(cached, plain)


def test_from_pretrained_takes_the_name(tmp_path: Path) -> None:
    CAUSAL["llama"]().save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, attn_implementation="efficient_attn:linear", dtype=torch.float64)
    swapped = load(tmp_path, dtype=torch.float64)
    swap_attention(swapped, "linear")
    with torch.no_grad():
        assert torch.equal(model(tokens(), use_cache=False).logits, swapped(tokens(), use_cache=False).logits)


def test_bad_names_and_options() -> None:
    with pytest.raises(ValueError, match="linformer has learnt parameters"):
        register("linformer", max_seq_len=8)
    with pytest.raises(ValueError, match="name must contain none of"):
        register("linear", "a/b")
    with pytest.raises(TypeError, match="linear has no option 'window_size'"):
        register("linear", window_size=3)
    with pytest.raises(ValueError, match="sliding_window needs window_size"):
        register("sliding_window")


def test_what_it_cannot_do_is_refused_when_it_runs() -> None:
    model = CAUSAL["gemma2"](attn_logit_softcapping=50.0)
    model.set_attn_implementation(NAMES["linear"])
    with pytest.raises(ValueError, match="only full attention can apply the layer's softcap"):
        model(tokens())


def test_the_plain_name_needs_a_swap() -> None:
    model = CAUSAL["llama"](attn_implementation="efficient_attn")
    with pytest.raises(ValueError, match="LlamaAttention has no mechanism: choose one with swap_attention"):
        model(tokens())
