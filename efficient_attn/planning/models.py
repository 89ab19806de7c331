"""Descriptions of transformers, and of the recurrent networks that they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from ..complexity.cost import check_choice
from ..layers import Attention
from ..mechanisms import MECHANISMS, Mechanism

NORMS = ("layer", "rms", "none")
RECURRENT_GATES = {"rnn": 1, "gru": 3, "lstm": 4}


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
        """The mechanism for `seq_len` tokens of `model`.

        Raises:
            ValueError: if it has no causal form and the model is causal, or an option does not fit.
        """
        raise NotImplementedError

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
        max_positions: learnt positions, added to the embedding; 0 for none.
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

    def with_mechanism(self, mechanism: MechanismLike | Sequence[MechanismLike]) -> Model:
        """This model with other mechanisms in its layers."""
        return replace(self, mechanism=mechanism)

    @property
    def num_params(self) -> int:
        """Learnt numbers, those of mechanisms excepted, which may depend on the length."""
        raise NotImplementedError

    @classmethod
    def of_attention(cls, layer: Attention) -> Model:
        """The one-layer model that is `layer` and nothing else: no feed-forward network, norms or vocabulary."""
        raise NotImplementedError


@dataclass(frozen=True)
class Recurrent:
    """A recurrent layer as wide as the model that it is compared with: W_x x_t and W_h h_{t-1}, per gate.

    Args:
        kind: "rnn" (one gate; Elman 1990), "gru" (three; Cho et al. 2014, arXiv:1406.1078) or "lstm" (four;
            Hochreiter and Schmidhuber 1997).
    """

    kind: str

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, tuple(RECURRENT_GATES))


MODELS: Mapping[str, Model] = MappingProxyType({})
"""Well-known models by name."""
