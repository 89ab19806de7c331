"""Tiny models of many families, in fp64 so that a difference is a difference."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor

VOCABULARY = 97
WINDOW = 6
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 96}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SPECIAL, **SIZES, "num_key_value_heads": 2}
SEQ2SEQ = {
    **SPECIAL,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
}


def _causal(name: str, **options: Any) -> Callable[..., Any]:
    def make(**more: Any) -> Any:
        config = getattr(transformers, name + "Config")(**{**options, **more})
        suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        return _built(getattr(transformers, name + suffix), config)

    return make


def _built(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return model_class(config).to(torch.float64).eval()


HEADS = {"head_dim": 8}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
GPT2 = {**SPECIAL, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, **NO_DROPOUT}
OPT = {**SPECIAL, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": 128, "word_embed_proj_dim": 32, "dropout": 0.0}
WINDOWED = {**GROUPED, **HEADS, "sliding_window": WINDOW}
GEMMA = {**WINDOWED, "query_pre_attn_scalar": 8}

CAUSAL: dict[str, Callable[..., Any]] = {
    "llama": _causal("Llama", **GROUPED),
    "gpt2": _causal("GPT2", **GPT2),
    "mistral": _causal("Mistral", **WINDOWED),
    "qwen3": _causal("Qwen3", **GROUPED, **HEADS),
    "gemma2": _causal("Gemma2", **GEMMA, attn_logit_softcapping=None),
    "gemma3": _causal("Gemma3", **GEMMA),
    "gpt_neox": _causal("GPTNeoX", **SPECIAL, **SIZES),
    "phi3": _causal("Phi3", **GROUPED),
    "opt": _causal("OPT", **OPT),
}
CAUSAL["gemma3"] = lambda **more: _built(
    transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**{**GEMMA, **more})
)


def bert(**more: Any) -> Any:
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {**SIZES, "vocab_size": VOCABULARY, **no_dropout}
    return _built(transformers.BertModel, transformers.BertConfig(**{**sizes, **more}))


def vit(**more: Any) -> Any:
    sizes = {name: SIZES[name] for name in SIZES if name != "max_position_embeddings"}
    return _built(
        transformers.ViTModel, transformers.ViTConfig(**{**sizes, "image_size": 32, "patch_size": 8, **more})
    )


def clip(**more: Any) -> Any:
    text = {**SPECIAL, **SIZES}
    vision = {name: SIZES[name] for name in SIZES if name != "max_position_embeddings"}
    vision |= {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, **more)
    return _built(transformers.CLIPModel, config)


def t5(**more: Any) -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    special = {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return _built(
        transformers.T5ForConditionalGeneration, transformers.T5Config(**{**sizes, **special, **more})
    )


def bart(**more: Any) -> Any:
    config = transformers.BartConfig(**{**SEQ2SEQ, "max_position_embeddings": 64, "dropout": 0.0, **more})
    return _built(transformers.BartForConditionalGeneration, config)


def whisper(**more: Any) -> Any:
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40, "dropout": 0.0}
    config = transformers.WhisperConfig(**{**SEQ2SEQ, **sizes, **more})
    return _built(transformers.WhisperForConditionalGeneration, config)


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 90, (batch, length), generator=generator)


def padded(ids: Tensor, count: int, side: str) -> Tensor:
    """A mask that pads `count` tokens of the first row."""
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :count] = 0
    elif side == "right":
        mask[0, -count:] = 0
    return mask


def positions(mask: Tensor) -> Tensor:
    """Position ids that count from each row's first valid token, as `generate` makes them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


OTHERS: dict[str, Callable[..., Any]] = {
    "bert": bert,
    "vit": vit,
    "clip": clip,
    "t5": t5,
    "bart": bart,
    "whisper": whisper,
}


def inputs_of(name: str, side: str = "none") -> dict[str, Tensor]:
    """What to call a model of that family with."""
    ids = tokens()
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    mask = {} if side == "none" else {"attention_mask": padded(ids, 4, side)}
    if name == "vit":
        return {"pixel_values": images}
    if name == "clip":
        return {"input_ids": ids, "pixel_values": images, **mask}
    if name in ("t5", "bart"):
        return {"input_ids": ids, "decoder_input_ids": tokens(length=7, seed=3), **mask}
    if name == "whisper":
        features = torch.randn(2, 8, 40, generator=generator, dtype=torch.float64)
        return {"input_features": features, "decoder_input_ids": tokens(length=7, seed=3)}
    return {"input_ids": ids, **mask}
