"""One forward pass of swapped models: exact where it says so, and no mask, segment or dtype is lost."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import swap_attention
from efficient_attn.mechanisms import create_mechanism

from .models import CAUSAL, OTHERS, inputs_of, padded, positions, tokens
from .swaps import CAUSAL_SWAPS, SWAPS
from .test_generation import swapped

EXACT = 1e-12
SINGLE = 1e-6
"""Where the model itself computes in fp32: Gemma's eager softmax."""

SIDES = ("none", "left", "right")


def arguments(family: str, side: str) -> dict[str, Any]:
    """What to call a model with: position ids too where padding moves them, and no cache."""
    given: dict[str, Any] = dict(inputs_of(family, side))
    if family in CAUSAL and side != "none":
        given["position_ids"] = positions(given["attention_mask"])
    return given if family in ("bert", "vit", "clip") else {**given, "use_cache": False}


def outputs(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """Every floating-point output."""
    out = model(**given)
    return {name: x for name, x in out.items() if isinstance(x, Tensor) and x.is_floating_point()}


def valid(x: Tensor, given: dict[str, Any]) -> Tensor:
    """The rows of tokens that are no padding, where there is one row for each token."""
    mask = given.get("attention_mask")
    return x if mask is None or x.shape[:2] != mask.shape else x[mask.bool()]


# Without T5's flash, which cannot add its position bias: test_refusals.
@pytest.mark.parametrize(
    ("family", "to"),
    [(f, to) for f in (*CAUSAL, *OTHERS) for to in ("full", "flash") if (f, to) != ("t5", "flash")],
)
def test_exact_mechanisms_change_nothing(family: str, to: str) -> None:
    make = {**CAUSAL, **OTHERS}[family]
    model, stock = make(), make()
    if family == "gemma2":  # its eager attention adds the least fp64 number and then computes in fp32: NaN
        model, stock = model.float(), stock.float()
    keys = list(model.state_dict())
    report = swap_attention(model, to)
    assert list(model.state_dict()) == keys and report.swapped
    tolerance = SINGLE if family.startswith("gemma") else EXACT
    for side in SIDES:
        given = arguments(family, side)
        for m in (model, stock):
            m.zero_grad()
        ours, theirs = outputs(model, given), outputs(stock, given)
        for name in theirs:
            assert (valid(ours[name], given) - valid(theirs[name], given)).abs().max() < tolerance, (
                side,
                name,
            )
            valid(ours[name], given).square().sum().backward(retain_graph=True)
            valid(theirs[name], given).square().sum().backward(retain_graph=True)
        gradients = [
            (a.grad, b.grad)
            for a, b in zip(model.parameters(), stock.parameters(), strict=True)
            if b.grad is not None
        ]
        for a, b in gradients:
            assert a is not None and (a - b).norm() <= 100 * tolerance * max(b.norm(), 1.0), side
    with torch.no_grad():
        report.restore()
        given = arguments(family, "left")
        for name, x in outputs(stock, given).items():
            assert torch.equal(outputs(model, given)[name], x)


# Linformer cannot be causal: test_refusals.
@pytest.mark.parametrize(
    ("family", "to"),
    [(f, to) for f in ("llama", "gpt2") for to in CAUSAL_SWAPS] + [("bert", to) for to in SWAPS],
)
def test_padding_changes_nothing(family: str, to: str) -> None:
    model = {**CAUSAL, **OTHERS}[family]()
    swap_attention(model, to, **SWAPS[to])
    ids, name = tokens(), "logits" if family in CAUSAL else "last_hidden_state"
    for side, alone in (("left", ids[:1, 4:]), ("right", ids[:1, :-4])):
        given = arguments(family, side)
        given.setdefault("position_ids", positions(given["attention_mask"]))
        embedded = model.get_input_embeddings()(ids).detach()
        results, gradients = [], []
        for content in (0.0, 1e3):
            x = embedded.clone()
            x[given["attention_mask"] == 0] += content
            x.requires_grad_()
            passed = {key: value for key, value in given.items() if key != "input_ids"}
            out = getattr(model(inputs_embeds=x, **passed), name)
            out[given["attention_mask"].bool()].square().sum().backward()
            results.append(out[given["attention_mask"].bool()].detach())
            assert x.grad is not None
            gradients.append(x.grad)
        assert torch.equal(*results) and torch.equal(*gradients), "the content of padding shows"
        assert gradients[0][given["attention_mask"] == 0].abs().max() == 0
        without = {key: value for key, value in given.items() if key == "use_cache"}
        expected = getattr(model(alone, **without), name)[0]
        assert (results[0][: len(expected)] - expected).abs().max() < EXACT, side


@pytest.mark.parametrize("to", CAUSAL_SWAPS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_packed_documents_do_not_see_each_other(family: str, to: str) -> None:
    model = CAUSAL[family]()
    swapped(model, to)
    ids, lengths = tokens(batch=1, length=20), (5, 8, 7)
    packed = torch.cat([torch.arange(n) for n in lengths])[None]
    anchored = create_mechanism(to, num_heads=4, head_dim=8, is_causal=True, **CAUSAL_SWAPS[to]).anchored
    if anchored:
        with pytest.raises(ValueError, match="cannot honour segment_ids"):
            model(ids, position_ids=packed, use_cache=False)
        return
    together = model(ids, position_ids=packed, use_cache=False).logits[0]
    apart = [model(part, use_cache=False).logits[0] for part in ids.split(lengths, 1)]
    for a, b in zip(together.split(lengths), apart, strict=True):
        assert (a - b).abs().max() < (SINGLE if family == "gemma3" else EXACT)


def test_packing_by_cumulative_lengths() -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, "linear")
    ids, lengths = tokens(batch=1, length=12), torch.tensor([0, 5, 12], dtype=torch.int32)
    given = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 7, "max_length_k": 7}
    where = torch.cat([torch.arange(5), torch.arange(7)])[None]
    mask = torch.ones_like(ids)  # without it, the position ids alone would say it
    together = model(ids, position_ids=where, attention_mask=mask, use_cache=False, **given).logits[0]
    apart = torch.cat([model(part, use_cache=False).logits[0] for part in ids.split((5, 7), 1)])
    assert (together - apart).abs().max() < EXACT


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("to", ["linear", "sliding_window", "bigbird"])
def test_some_layers_swapped_the_others_as_they_were(to: str, implementation: str) -> None:
    """The swapped layer takes the dense mask of the others, bool or float; it must be as good as a flat one."""
    ids = tokens()
    for side in SIDES:
        mask = padded(ids, 4, side)
        given = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
        mixed, every = (CAUSAL["llama"](attn_implementation=implementation) for _ in range(2))
        swap_attention(mixed, to, layers=[1], **CAUSAL_SWAPS[to])
        swap_attention(every, functools.partial(_mixed, to))
        with torch.no_grad():
            a, b = (model(ids, **given).logits[mask.bool()] for model in (mixed, every))
        assert (a - b).abs().max() < SINGLE, side
        names = [layer.self_attn.config._attn_implementation for layer in mixed.model.layers]
        assert names == [implementation, "efficient_attn"]


def _mixed(to: str, site: Any) -> Any:
    name, chosen = ("full", {}) if site.layer == 0 else (to, CAUSAL_SWAPS[to])
    return create_mechanism(name, num_heads=4, head_dim=8, num_kv_heads=2, is_causal=True, **chosen)


@pytest.mark.parametrize("to", ["linear", "sliding_window", "bigbird", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_generation_with_some_layers_swapped(family: str, to: str) -> None:
    from .test_generation import CACHES, TOLERANCE, error, generated, recomputed, warnings

    for layer in (0, 1):
        model = CAUSAL[family]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            swap_attention(model, to, layers=[layer], **CAUSAL_SWAPS[to])
        ids = tokens()
        for side in ("none", "left"):
            mask = padded(ids, 4, side)
            for cache, options in CACHES.items():
                out = generated(model, ids, mask, **options)
                assert error(out, recomputed(model, out.sequences, mask)) < TOLERANCE, (layer, side, cache)


def test_a_dense_mask_of_another_pattern_is_refused() -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, "linear")
    ids = tokens()
    prefix = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    model(ids, attention_mask=prefix, use_cache=False)
    prefix[..., :4] = True  # a prefix that sees all of itself
    with pytest.raises(ValueError, match=r"LinearAttention honours padding under causality, not this dense"):
        model(ids, attention_mask=prefix, use_cache=False)


def test_full_attention_takes_any_dense_mask() -> None:
    model, stock = CAUSAL["llama"](), CAUSAL["llama"]()
    swap_attention(model, "full")
    ids = tokens()
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    mask[..., :4] = True
    a, b = (m(ids, attention_mask=mask, use_cache=False).logits for m in (model, stock))
    assert (a - b).abs().max() < EXACT


def test_softcap_of_gemma2() -> None:
    model, stock = (
        CAUSAL["gemma2"](attn_logit_softcapping=0.01, attn_implementation="eager").float() for _ in range(2)
    )
    plain = CAUSAL["gemma2"]().float()
    swap_attention(model, "full")
    for side in SIDES:
        given = arguments("gemma2", side)
        with torch.no_grad():
            a, b, c = (valid(m(**given).logits, given) for m in (model, stock, plain))
        assert (a - b).abs().max() < SINGLE < (a - c).abs().max()


def test_sinks_of_gpt_oss() -> None:
    import transformers

    from .models import GROUPED, HEADS, WINDOW, _built

    sizes = {**GROUPED, **HEADS, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": WINDOW}
    model, stock = (
        _built(
            transformers.GptOssForCausalLM, transformers.GptOssConfig(**sizes, attn_implementation="eager")
        ).float()
        for _ in range(2)
    )
    for m in (model, stock):
        for layer in m.model.layers:
            torch.nn.init.constant_(layer.self_attn.sinks, 1.5)
    swap_attention(model, "full")
    ids = tokens()
    with torch.no_grad():
        a, b = (m(ids, use_cache=False).logits for m in (model, stock))
    assert (a - b).abs().max() < SINGLE


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_weights_are_those_of_the_model(family: str) -> None:
    make = {**CAUSAL, **OTHERS}[family]
    model, stock = make(attn_implementation="eager"), make(attn_implementation="eager")
    swap_attention(model, "full")
    given = arguments(family, "none")
    with torch.no_grad():
        ours, theirs = (m(**given, output_attentions=True) for m in (model, stock))
    name = "encoder_attentions" if family == "t5" else "attentions"
    assert len(ours[name]) == len(theirs[name]) == 2
    for a, b in zip(ours[name], theirs[name], strict=True):
        assert (a - b).abs().max() < SINGLE


@pytest.mark.parametrize("to", CAUSAL_SWAPS)
def test_autocast_with_mixed_dtypes(to: str) -> None:
    model, ids = CAUSAL["llama"]().float(), tokens()
    swap_attention(model, to, **CAUSAL_SWAPS[to])
    exact = model(ids, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rough = model(ids, use_cache=False).logits
        cached = model(ids[:, 8:], past_key_values=model(ids[:, :8], use_cache=True).past_key_values).logits
    assert 0 < (rough - exact).abs().max() < 0.02
    assert (cached - rough[:, 8:]).abs().max() < 0.02


@pytest.mark.parametrize("to", CAUSAL_SWAPS)
def test_gradient_checkpointing(to: str) -> None:
    ids, gradients = tokens(), []
    for checkpointing in (False, True):
        model = CAUSAL["llama"]().train()
        swap_attention(model, to, **CAUSAL_SWAPS[to])
        if checkpointing:
            enable = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )
            enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_swapped_model_can_be_copied_and_pickled() -> None:
    model, ids = CAUSAL["llama"](), tokens()
    swap_attention(model, "performer")
    expected = model(ids).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, expected)
        assert (
            copied.model.layers[0].self_attn.efficient_attn
            is not model.model.layers[0].self_attn.efficient_attn
        )
