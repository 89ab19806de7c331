"""Which mechanism for which work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .costs import MemoryNeeds
from .devices import Device
from .models import MechanismSpec, Model
from .times import TimeEstimate


@dataclass(frozen=True)
class Workload:
    """What is to be run.

    Args:
        model: the transformer; its own mechanisms are not looked at.
        seq_len: tokens of a sequence.
        device: where.
        batch: sequences at once.
        training: a forward and a backward pass, rather than a forward pass.
        decode: also, or rather than the forward pass, one token after another. Only if the model is causal.
        checkpointing: "auto" tries without, and with it only where nothing fits without; True or False decide.
        allow_approximate: whether mechanisms that estimate softmax attention, or are another operator, may be
            recommended; they need training or finetuning.
        allow_patterns: whether mechanisms that are exact within a pattern may be; a trained model needs finetuning.
        needs: masks that will be passed: "key_mask", "segment_ids", "attn_bias".
        usable: the part of the device's memory that may be filled.
    """

    model: Model
    seq_len: int
    device: Device
    batch: int = field(default=1, kw_only=True)
    training: bool = field(default=False, kw_only=True)
    decode: bool = field(default=False, kw_only=True)
    checkpointing: bool | str = field(default="auto", kw_only=True)
    allow_approximate: bool = field(default=False, kw_only=True)
    allow_patterns: bool = field(default=True, kw_only=True)
    needs: Sequence[str] = field(default=(), kw_only=True)
    usable: float = field(default=0.9, kw_only=True)


@dataclass(frozen=True)
class Candidate:
    """A mechanism that can do the work."""

    mechanism: MechanismSpec
    exactness: str
    time: TimeEstimate
    memory: MemoryNeeds
    checkpointing: bool


@dataclass(frozen=True)
class Rejection:
    """A mechanism that cannot, or may not, and why."""

    mechanism: MechanismSpec
    reason: str


@dataclass(frozen=True)
class Plan:
    """The answer of `recommend`.

    Attributes:
        workload: the question.
        ranked: what can do it, best first: exact mechanisms before patterns before approximations, and the quicker
            before the slower among them. Patterns precede exact ones that do not fit, which are rejected.
        rejected: what cannot, with reasons.
    """

    workload: Workload
    ranked: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]

    @property
    def best(self) -> Candidate | None:
        """The first of the ranking, if anything fits."""
        return self.ranked[0] if self.ranked else None


def recommend(workload: Workload) -> Plan:
    """Every mechanism of MECHANISMS, ranked for `workload` or rejected with a reason.

    Raises:
        TypeError: if workload is no Workload.
    """
    raise NotImplementedError
