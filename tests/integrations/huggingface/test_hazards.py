"""Ways in which a swap could be silently wrong: each computes the right thing, or is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers

from efficient_attn import LinearAttention, SlidingWindowAttention, SwapError, load_swapped, swap_attention

from .models import CAUSAL, GROUPED, HEADS, SIZES, SPECIAL, _built, bert, padded, tokens
from .test_generation import error, generated, recomputed

EXACT = 1e-12


def test_packed_training_with_a_cache_that_nobody_asked_for() -> None:
    model, ids = CAUSAL["llama"](), tokens(batch=1)
    swap_attention(model, "linear")
    lengths = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 7, "max_length_k": 7}
    where = torch.cat([torch.arange(5), torch.arange(7)])[None]
    out = model(ids, position_ids=where, use_cache=True, **packed)
    apart = torch.cat([model(part, use_cache=False).logits for part in ids.split((5, 7), 1)], 1)
    assert (out.logits - apart).abs().max() < EXACT
    with pytest.raises(
        ValueError, match="this cache cannot be used any further: it was given packed documents"
    ):
        model(ids[:, :1], past_key_values=out.past_key_values)


def test_a_model_that_does_not_say_whether_it_is_causal() -> None:
    splinter = _built(transformers.SplinterModel, transformers.SplinterConfig(vocab_size=97, **SIZES))
    stock = _built(transformers.SplinterModel, transformers.SplinterConfig(vocab_size=97, **SIZES))
    swap_attention(splinter, "full")
    ids = tokens()
    for mask in (None, padded(ids, 4, "right")):
        a, b = (m(ids, attention_mask=mask)[0] for m in (splinter, stock))
        assert (a - b).abs().max() < 1e-6
    layout = _built(transformers.LayoutLMModel, transformers.LayoutLMConfig(vocab_size=97, **SIZES))
    with pytest.raises(SwapError, match="neither the module nor its model says whether it is causal"):
        swap_attention(layout, "full")


def test_a_layer_that_attends_twice() -> None:
    sizes = {**GROUPED, "num_key_value_heads": 4}
    model = _built(transformers.DiffLlamaForCausalLM, transformers.DiffLlamaConfig(**sizes))
    swap_attention(model, "linear")
    model(tokens(), use_cache=False)
    with pytest.raises(ValueError, match="calls its attention more than once"):
        model(tokens(), use_cache=True)


def test_a_bias_in_the_place_of_a_mask() -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, "full")
    with pytest.raises(ValueError, match="hides no token from any other"):
        model(tokens(), attention_mask=torch.randn(2, 1, 12, 12).double(), use_cache=False)


def test_taking_back_after_the_rows_have_moved() -> None:
    model, ids = CAUSAL["llama"](), tokens()
    swap_attention(model, "linear")
    with torch.no_grad():
        for rows in ([1, 0], [1]):
            cache = model(ids, use_cache=True).past_key_values
            cache.reorder_cache(torch.tensor(rows)) if len(rows) > 1 else cache.batch_select_indices(
                torch.tensor(rows)
            )
            cache.crop(-2)
            assert cache.get_seq_length() == 10
            again = model(ids[rows, 10:], past_key_values=cache).logits
            assert (again - model(ids[rows], use_cache=False).logits[:, 10:]).abs().max() < EXACT
    with pytest.raises(ValueError, match="tokens_to_remove must not be positive, got 10"):
        cache.layers[0].crop(10)


def test_a_state_of_another_mechanism() -> None:
    model, ids = CAUSAL["llama"](), tokens()
    report = swap_attention(model, "linear")
    cache = model(ids, use_cache=True).past_key_values
    report.restore()
    swap_attention(model, "sliding_window", window_size=4)
    with pytest.raises(
        ValueError, match=r"(?s)holds a state of LinearAttention.*attends by SlidingWindowAttention"
    ):
        model(ids[:, :1], past_key_values=cache)


def test_a_copied_cache_goes_its_own_way_and_shares_the_mechanism() -> None:
    model, ids = CAUSAL["llama"](), tokens()
    swap_attention(model, "performer")
    with torch.no_grad():
        prefix = model(ids[:, :8], use_cache=True).past_key_values
        copied = copy.deepcopy(prefix)
        assert copied.layers[0].mechanism is prefix.layers[0].mechanism
        for cache in (prefix, copied):
            out = model(ids[:, 8:], past_key_values=cache).logits
            assert (out - model(ids, use_cache=False).logits[:, 8:]).abs().max() < EXACT


def test_a_mask_that_hides_what_it_showed() -> None:
    model, ids = CAUSAL["llama"](), tokens()
    swap_attention(model, "linear")
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        hidden = torch.ones(2, 13, dtype=torch.int64)
        hidden[:, :6] = 0
        with pytest.raises(ValueError, match="hides earlier tokens that it showed before"):
            model(ids[:, :1], attention_mask=hidden, past_key_values=cache)
        left = model(ids, attention_mask=padded(ids, 4, "left"), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="or shows hidden ones"):
            model(ids[:, :1], past_key_values=left)


def test_a_named_mechanism_wider_than_the_models_window() -> None:
    model = CAUSAL["mistral"](attn_implementation="efficient_attn:linear")
    with pytest.raises(
        ValueError, match="its cache keeps a window of 6, and linear looks further back: swap it in"
    ):
        model(tokens())


def test_a_swap_that_a_checkpoint_remembers_and_its_model_does_not_have(tmp_path: Path) -> None:
    model = CAUSAL["llama"]()
    swap_attention(model, "linear")
    model.save_pretrained(tmp_path / "both")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "both", dtype=torch.float64)
    swap_attention(plain, "performer", layers=[0])
    plain.save_pretrained(tmp_path / "one")
    loaded = load_swapped(tmp_path / "one", dtype=torch.float64)
    assert not hasattr(loaded.model.layers[1].self_attn, "efficient_attn")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens()).logits, plain.eval()(tokens()).logits)


def test_an_implementation_set_after_a_swap() -> None:
    model = CAUSAL["llama"]()
    report = swap_attention(model, "linear")
    model.set_attn_implementation("sdpa")
    with pytest.raises(SwapError, match=r"set to 'sdpa' since: restore\(\) the swap first"):
        model(tokens())
    report.restore()
    model(tokens())


def test_dropout_under_another_name() -> None:
    sizes = {
        name: SIZES[name]
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    sizes |= {"image_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2}
    config = transformers.VideoMAEConfig(**sizes, attention_probs_dropout_prob=0.3)
    report = swap_attention(_built(transformers.VideoMAEModel, config), "full", dry_run=True)
    assert {row.mechanism.dropout_p for row in report.swapped if row.mechanism} == {0.3}


def test_dropout_that_a_mechanism_made_by_hand_does_not_know_of() -> None:
    from efficient_attn import FullAttention

    model = CAUSAL["llama"](attention_dropout=0.5).train()
    swap_attention(model, lambda site: FullAttention(is_causal=True))
    outputs = [model(tokens(), use_cache=False).logits for _ in range(2)]
    assert not torch.equal(*outputs)


def test_a_model_that_shares_its_config() -> None:
    teacher = CAUSAL["llama"]()
    student = _built(transformers.LlamaForCausalLM, teacher.config)
    expected = teacher(tokens()).logits
    report = swap_attention(student, "linear")
    assert torch.equal(teacher(tokens()).logits, expected)
    assert student.config is student.model.config, "what is set on a model's config holds inside of it, too"
    assert not hasattr(teacher.config, "efficient_attn")
    student.config.use_cache = False
    report.restore()
    assert student.config is teacher.config and teacher.config.use_cache is False


def test_a_part_of_a_model() -> None:
    from .models import bart, inputs_of

    model, stock = bart(), bart()
    swap_attention(model.model.encoder, "full")
    with torch.no_grad():
        a, b = (m(**inputs_of("bart", "left")).logits for m in (model, stock))
    assert (a - b).abs().max() < EXACT


def test_an_encoder_beside_cross_attention_gets_no_dense_mask() -> None:
    from .models import bart, inputs_of

    model, seen = bart(), []
    swap_attention(model, "linear")
    layer = model.model.encoder.layers[0].self_attn
    layer.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["attention_mask"]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs_of("bart", "left"))
    assert [mask.shape for mask in seen] == [(2, 12)]


def test_layers_that_share_keys_and_values() -> None:
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20):
        pytest.skip("this transformers cannot import it without torchvision")
    sizes = {
        **GROUPED,
        **HEADS,
        "num_kv_shared_layers": 1,
        "sliding_window": 6,
        "vocab_size_per_layer_input": 97,
    }
    sizes |= {
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    }
    model = _built(transformers.Gemma3nForCausalLM, transformers.Gemma3nTextConfig(**sizes))
    with pytest.raises(SwapError, match="share keys and values with each other"):
        swap_attention(model, "linear")


def test_one_mechanism_for_every_layer(tmp_path: Path) -> None:
    model, one = CAUSAL["llama"](), LinearAttention(is_causal=True)
    swap_attention(model, lambda site: one)
    own = [layer.self_attn.efficient_attn for layer in model.model.layers]
    assert own[0] is one and own[1] is not one
    model.save_pretrained(tmp_path)
    load_swapped(tmp_path)


def test_a_prompt_under_autocast_and_a_step_without() -> None:
    model, ids = CAUSAL["llama"]().float(), tokens()
    swap_attention(model, "sliding_window", window_size=4)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            cache = model(ids, use_cache=True).past_key_values
        one = model(ids[:, :1], past_key_values=cache).logits
        whole = model(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits
    assert (one[:, 0] - whole[:, -1]).abs().max() < 0.02


def test_full_attention_takes_patterns_of_the_models_own() -> None:
    sizes = {
        **SPECIAL,
        **SIZES,
        "local_attention": 6,
        "attn_implementation": "sdpa",
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    model, stock = (
        _built(transformers.ModernBertModel, transformers.ModernBertConfig(**sizes)) for _ in range(2)
    )
    swap_attention(model, "full")
    ids = tokens(length=20)
    for mask in (None, padded(ids, 4, "right")):
        with torch.no_grad():
            a, b = (m(ids, attention_mask=mask)[0] for m in (model, stock))
        rows = slice(None) if mask is None else mask.bool()
        assert (a - b)[rows].abs().max() < EXACT
    swapped = _built(transformers.ModernBertModel, transformers.ModernBertConfig(**sizes))
    swap_attention(swapped, "linear")
    with pytest.raises(ValueError, match="this model's attention pattern would be lost"):
        swapped(ids)


def test_chunked_attention_of_llama4_in_full() -> None:
    sizes = {
        **GROUPED,
        **HEADS,
        "num_local_experts": 2,
        "attention_chunk_size": 4,
        "intermediate_size_mlp": 64,
    }
    model, stock = (
        _built(transformers.Llama4ForCausalLM, transformers.Llama4TextConfig(**sizes)).float()
        for _ in range(2)
    )
    swap_attention(model, "full")
    with torch.no_grad():
        a, b = (m(tokens(), use_cache=False).logits for m in (model, stock))
    assert (a - b).abs().max() < 1e-5


def test_latent_attention_has_heads_of_two_sizes() -> None:
    sizes = {
        **SPECIAL,
        **SIZES,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
    }
    sizes |= {
        "num_key_value_heads": 4,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    }
    sizes |= {"moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 2}
    model = _built(transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config(**sizes))
    swap_attention(model, "performer")
    ids = tokens()
    out = generated(model, ids)
    assert error(out, recomputed(model, out.sequences, torch.ones_like(ids))) < 1e-6


def test_a_chat_of_two_turns() -> None:
    model, first, second = CAUSAL["llama"](), tokens(), tokens(seed=4, length=5)
    swap_attention(model, "linear")
    out = generated(model, first, padded(first, 4, "left"))
    both = torch.cat([out.sequences, second], 1)
    mask = torch.cat([padded(first, 4, "left"), torch.ones(2, both.shape[1] - 12, dtype=torch.int64)], 1)
    with torch.no_grad():
        again = generated(model, both, mask, past_key_values=out.past_key_values)
    assert error(again, recomputed(model, again.sequences, mask)) < 1e-6


def test_bert_as_a_decoder_with_cross_attention() -> None:
    config = transformers.BertConfig(
        vocab_size=97, **SIZES, is_decoder=True, add_cross_attention=True, hidden_dropout_prob=0.0
    )
    model, stock = (_built(transformers.BertLMHeadModel, config) for _ in range(2))
    report = swap_attention(model, "flash")
    assert [row.path for row in report.swapped] == [f"bert.encoder.layer.{i}.attention.self" for i in (0, 1)]
    other = torch.randn(2, 7, 32, dtype=torch.float64)
    with torch.no_grad():
        a, b = (m(tokens(), encoder_hidden_states=other, use_cache=False).logits for m in (model, stock))
    assert (a - b).abs().max() < EXACT
    assert bert().config.is_decoder is False


def test_a_window_made_by_hand_that_is_wider_than_the_models() -> None:
    wide = SlidingWindowAttention(50, is_causal=True)
    with pytest.warns(
        UserWarning, match="the model's own window of 6 no longer bounds what SlidingWindowAttention"
    ):
        swap_attention(CAUSAL["mistral"](), lambda site: wide)
