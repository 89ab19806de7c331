"""Descriptions of transformers, and of the recurrent networks that they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from types import MappingProxyType
from typing import Any

import torch

from ..complexity.cost import check_choice
from ..inputs import check_flag, check_float_dtype, check_positive
from ..layers import Attention
from ..mechanisms import MECHANISMS, Mechanism, create_mechanism

NORMS = ("layer", "rms", "none")
RECURRENT_GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def customary_options(name: str, seq_len: int) -> dict[str, Any]:
    """What a mechanism's constructor must be told and nobody did: windows of 512, a stride of sqrt(length)."""
    return {
        "sliding_window": {"window_size": 512},
        "longformer": {"window_size": 512, "global_tokens": 64},
        "sparse_transformer": {"pattern": "strided", "stride": max(1, isqrt(seq_len))},
    }.get(name, {})


@dataclass(frozen=True)
class MechanismSpec:
    """A mechanism by its name and options, built anew for each length: strides, ranks and limits follow it.

    Args:
        name: a key of MECHANISMS.
        options: further arguments of its constructor; where one is needed and missing, a customary value is taken
            (windows of 512 tokens, 64 global tokens, a stride of about sqrt(length)).
    Raises:
        ValueError: if the name is unknown.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_choice("name", self.name, tuple(MECHANISMS))

    def build(self, model: Model, seq_len: int) -> Mechanism:
        """The mechanism for `seq_len` tokens of `model`, without memory for what it learns.

        Raises:
            ValueError: if it has no causal form and the model is causal, or an option does not fit.
            TypeError: if it has no such option.
        """
        options = {**customary_options(self.name, seq_len), **self.options}
        with torch.device("meta"):
            return create_mechanism(
                self.name,
                num_heads=model.num_heads,
                head_dim=model.head_dim,
                num_kv_heads=model.num_kv_heads,
                max_seq_len=max(1, seq_len),
                is_causal=model.is_causal,
                **options,
            )

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


MechanismLike = str | Mechanism | MechanismSpec


@dataclass(frozen=True)
class Model:
    """A transformer, as far as its costs go: an embedding, a stack of pre-norm layers, a norm and a head.

        x = x + attention(norm(x));  x = x + ffn(norm(x))
        ffn(x) = gelu(x W_1) W_2, or (silu(x W_g) * x W_1) W_2 if gated

    Args:
        num_layers: layers of the stack.
        embed_dim: features of a token.
        num_heads: query heads of a layer.
        num_kv_heads: key and value heads; num_heads by default.
        head_dim: features of a head; embed_dim // num_heads by default.
        ffn_dim: hidden features of the feed-forward network; 4 * embed_dim by default, 0 for none.
        gated_ffn: whether it has a gate: three matrices in place of two (SwiGLU, Shazeer 2020, arXiv:2002.05202).
        vocab_size: tokens; 0 for a stack without embedding and head.
        max_positions: learnt positions, added to the embedding; 0 for none. They count as parameters, and limit no
            length: planning for a longer one means a longer table.
        tied_embeddings: whether the head is the embedding's matrix.
        bias: whether projections and the feed-forward network have one; the head never does.
        norm: "layer" (LayerNorm with weight and bias), "rms" (weight alone) or "none".
        is_causal: whether a token sees only those before it.
        mechanism: of every layer, or one for each of them: a name, a MechanismSpec or a Mechanism.
        dtype: of weights and activations.
    Raises:
        ValueError, TypeError: for a size, a name or a number of mechanisms that does not fit.
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int = field(default=None, kw_only=True)  # type: ignore[assignment]
    head_dim: int = field(default=None, kw_only=True)  # type: ignore[assignment]
    ffn_dim: int = field(default=None, kw_only=True)  # type: ignore[assignment]
    gated_ffn: bool = field(default=False, kw_only=True)
    vocab_size: int = field(default=0, kw_only=True)
    max_positions: int = field(default=0, kw_only=True)
    tied_embeddings: bool = field(default=True, kw_only=True)
    bias: bool = field(default=True, kw_only=True)
    norm: str = field(default="layer", kw_only=True)
    is_causal: bool = field(default=True, kw_only=True)
    mechanism: MechanismLike | Sequence[MechanismLike] = field(default="full", kw_only=True)
    dtype: torch.dtype = field(default=torch.bfloat16, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("num_layers", "embed_dim", "num_heads"):
            check_positive(name, getattr(self, name))
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads must divide embed_dim = {self.embed_dim} unless head_dim is given, got {self.num_heads}"
            )
        defaults = {
            "num_kv_heads": self.num_heads,
            "head_dim": self.embed_dim // self.num_heads,
            "ffn_dim": 4 * self.embed_dim,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("num_kv_heads", "head_dim"):
            check_positive(name, getattr(self, name))
        for name in ("ffn_dim", "vocab_size", "max_positions"):
            check_positive(name, getattr(self, name), least=0)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}"
            )
        for name in ("gated_ffn", "tied_embeddings", "bias", "is_causal"):
            check_flag(name, getattr(self, name))
        check_choice("norm", self.norm, NORMS)
        check_float_dtype(self.dtype)
        if len(self.layer_mechanisms) != self.num_layers:
            raise ValueError(
                f"mechanism must be one, or one for each of {self.num_layers} layers, got {len(self.layer_mechanisms)}"
            )

    @property
    def layer_mechanisms(self) -> tuple[MechanismSpec | Mechanism, ...]:
        """The mechanism of each layer."""
        single = isinstance(self.mechanism, (str, Mechanism, MechanismSpec))
        given = (self.mechanism,) * self.num_layers if single else tuple(self.mechanism)  # type: ignore[arg-type]
        return tuple(as_mechanism(each) for each in given)  # type: ignore[arg-type]

    def with_mechanism(self, mechanism: MechanismLike | Sequence[MechanismLike]) -> Model:
        """This model with other mechanisms in its layers."""
        return replace(self, mechanism=mechanism)

    def built_mechanisms(self, seq_len: int) -> list[tuple[Mechanism, int]]:
        """Each kind of mechanism, built for `seq_len` tokens, and how many layers have it.

        Raises:
            ValueError: if one cannot be built, or is causal where the model is not or the reverse.
        """
        kinds: list[tuple[MechanismSpec | Mechanism, int]] = []
        for each in self.layer_mechanisms:
            known = next((i for i, (kind, _) in enumerate(kinds) if kind == each), None)
            if known is None:
                kinds.append((each, 1))
            else:
                kinds[known] = (each, kinds[known][1] + 1)
        return [(self.build(kind, seq_len), count) for kind, count in kinds]

    def build(self, mechanism: MechanismLike, seq_len: int) -> Mechanism:
        """One mechanism, as a layer of this model has it.

        Raises:
            ValueError: if it cannot be built, or is causal where the model is not or the reverse.
        """
        spec = as_mechanism(mechanism)
        built = spec.build(self, seq_len) if isinstance(spec, MechanismSpec) else spec
        if built.is_causal != self.is_causal:
            raise ValueError(
                f"mechanism must have is_causal={self.is_causal}, as the model has, got {type(built).__name__} "
                f"with is_causal={built.is_causal}"
            )
        return built

    @property
    def num_norms(self) -> int:
        """Norms of the whole model: one before each part of a layer, and one before the head."""
        parts = self.num_layers * (1 + (self.ffn_dim > 0))
        return 0 if self.norm == "none" else parts + 1

    @property
    def ffn_sizes(self) -> tuple[tuple[str, int, int], ...]:
        """The matrices of a feed-forward network: name, features in and out."""
        if not self.ffn_dim:
            return ()
        up = ("gate", "up") if self.gated_ffn else ("up",)
        return (
            *((name, self.embed_dim, self.ffn_dim) for name in up),
            ("down", self.ffn_dim, self.embed_dim),
        )

    @property
    def projection_sizes(self) -> tuple[tuple[str, int, int], ...]:
        """The projections of an attention layer: name, features in and out."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            ("q_proj", self.embed_dim, heads),
            ("k_proj", self.embed_dim, kv_heads),
            ("v_proj", self.embed_dim, kv_heads),
            ("out_proj", heads, self.embed_dim),
        )

    @property
    def num_params(self) -> int:
        """Learnt numbers, those of mechanisms excepted, which may depend on the length."""
        matrices = sum(a * b + b * self.bias for _, a, b in (*self.projection_sizes, *self.ffn_sizes))
        norms = self.num_norms * self.embed_dim * (2 if self.norm == "layer" else 1)
        tables = self.vocab_size * (1 if self.tied_embeddings else 2) + self.max_positions
        return self.num_layers * matrices + norms + tables * self.embed_dim

    @classmethod
    def of_attention(cls, layer: Attention) -> Model:
        """The one-layer model that is `layer` and nothing else: no feed-forward network, norms or vocabulary."""
        return cls(
            1,
            layer.embed_dim,
            layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            ffn_dim=0,
            bias=layer.q_proj.bias is not None,
            norm="none",
            is_causal=layer.mechanism.is_causal,
            mechanism=layer.mechanism,
            dtype=layer.q_proj.weight.dtype,
        )


def as_mechanism(given: MechanismLike) -> MechanismSpec | Mechanism:
    """A name as a MechanismSpec; what is one already, or a Mechanism, as it is."""
    if isinstance(given, str):
        return MechanismSpec(given)
    if not isinstance(given, (Mechanism, MechanismSpec)):
        raise TypeError(
            f"mechanism must be a name, a MechanismSpec or a Mechanism, got {type(given).__name__}"
        )
    return given


def as_model(given: Model | Attention) -> Model:
    """A description as it is; an attention layer as the model that it is alone."""
    if isinstance(given, Attention):
        return Model.of_attention(given)
    if not isinstance(given, Model):
        raise TypeError(f"model must be a planning.Model or an Attention, got {type(given).__name__}")
    return given


@dataclass(frozen=True)
class Recurrent:
    """A recurrent layer as wide as the model that it is compared with: W_x x_t and W_h h_{t-1}, per gate.

    Args:
        kind: "rnn" (one gate; Elman 1990), "gru" (three; Cho et al. 2014, arXiv:1406.1078) or "lstm" (four;
            Hochreiter and Schmidhuber 1997).
    Raises:
        ValueError: if the kind is unknown.
    """

    kind: str

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, tuple(RECURRENT_GATES))

    def __str__(self) -> str:
        return self.kind


def _gpt2(num_layers: int, embed_dim: int, num_heads: int) -> Model:
    """Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, table 2."""
    return Model(num_layers, embed_dim, num_heads, vocab_size=50_257, max_positions=1024)


def _llama(
    num_layers: int, embed_dim: int, num_heads: int, ffn_dim: int, vocab_size: int, num_kv_heads: int
) -> Model:
    return Model(
        num_layers, embed_dim, num_heads, num_kv_heads=num_kv_heads, ffn_dim=ffn_dim, gated_ffn=True,
        vocab_size=vocab_size, tied_embeddings=False, bias=False, norm="rms",
    )  # fmt: skip


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "gpt2-small": _gpt2(12, 768, 12),
        "gpt2-medium": _gpt2(24, 1024, 16),
        "gpt2-large": _gpt2(36, 1280, 20),
        "gpt2-xl": _gpt2(48, 1600, 25),
        "llama-2-7b": _llama(32, 4096, 32, 11_008, 32_000, 32),
        "llama-2-13b": _llama(40, 5120, 40, 13_824, 32_000, 40),
        "llama-3-8b": _llama(32, 4096, 32, 14_336, 128_256, 8),
    }
)
"""Well-known models by name: GPT-2 (Radford et al. 2019), Llama 2 (Touvron et al. 2023, arXiv:2307.09288), Llama 3
(Grattafiori et al. 2024, arXiv:2407.21783, table 3)."""
