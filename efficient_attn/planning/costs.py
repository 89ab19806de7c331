"""What a whole model costs: FLOPs, traffic and memory, by part."""

from __future__ import annotations

from dataclasses import dataclass

from ..complexity import Cost
from ..layers import Attention
from .models import Model

OPTIMIZERS = ("adamw", "sgd", "none")


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes held at the worst moment, by what they are for; they sum to `total`.

    Attributes:
        weights: parameters.
        gradients: of the parameters, in their dtype; 0 unless training.
        optimizer: its state; 0 unless training.
        activations: kept for the backward pass; 0 unless training.
        workspace: what comes and goes while the most is held.
        state: the decode state of every layer; 0 unless the model is causal and not training.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    state: int

    @property
    def total(self) -> int:
        """All of them together."""
        raise NotImplementedError

    @property
    def largest(self) -> str:
        """The name of the largest one."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, int]:
        """The terms by name, in the order of the page."""
        raise NotImplementedError


@dataclass(frozen=True)
class ModelCost:
    """What a call of a model costs.

    Attributes:
        parts: a `Cost` for each part, all layers together: "attention" (the mechanisms), "projections", "ffn",
            "norms", "embedding", "head". Parts that the model lacks are left out.
        memory: bytes held at the worst moment.
    """

    parts: dict[str, Cost]
    memory: MemoryNeeds

    @property
    def total(self) -> Cost:
        """The parts one after another."""
        raise NotImplementedError


def model_cost(
    model: Model | Attention,
    batch: int,
    seq_len: int,
    *,
    training: bool = False,
    checkpointing: bool = False,
    phase: str = "prefill",
    basis: str = "model",
    optimizer: str = "adamw",
) -> ModelCost:
    """What one call of `model` on `batch` sequences of `seq_len` tokens costs.

    Args:
        model: a description, or an `Attention` layer, alone.
        batch: sequences.
        seq_len: tokens of each.
        training: count the backward pass, and what it needs. Logits are then those of every token, and a loss
            follows; otherwise those of the last token, as generation needs.
        checkpointing: keep of each layer its input alone, and compute the rest again in the backward pass
            (Chen et al. 2016, arXiv:1604.06174). Only with `training`.
        phase: "prefill" for the whole sequence, "decode" for one more token, the last of `seq_len`.
        basis: "model", "hardware" or "torch", see `Mechanism.cost`.
        optimizer: "adamw": two moments in fp32, and a copy of weights of 16 bits in fp32 (Rajbhandari et al. 2020,
            arXiv:1910.02054, section 3.1); "sgd": that copy alone; "none".
    Raises:
        ValueError: for sizes or names out of range, and for options that do not go together.
    """
    raise NotImplementedError
