"""Which mechanism for which work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..complexity.cost import check_choice
from ..complexity.symbolic import EXACTNESS
from ..inputs import check_flag, check_positive
from ..mechanisms import MECHANISMS
from .costs import MemoryNeeds, model_cost
from .devices import GIB, Device
from .lengths import usable_bytes
from .models import MechanismSpec, Model
from .times import TimeEstimate, estimate_time

MASKS = ("key_mask", "segment_ids", "attn_bias")


@dataclass(frozen=True)
class Workload:
    """What is to be run.

    Args:
        model: the transformer; its own mechanisms are not looked at.
        seq_len: tokens of a sequence.
        device: where.
        batch: sequences at once.
        training: a forward and a backward pass, rather than a forward pass.
        decode: one token after another, rather than a forward pass; time and memory are those of one token, the last
            of `seq_len`. Only if the model is causal, and not with training.
        checkpointing: "auto" tries without, and with it only where nothing fits without; True or False decide.
        allow_approximate: whether mechanisms that estimate softmax attention, or are another operator, may be
            recommended; they need training or finetuning.
        allow_patterns: whether mechanisms that are exact within a pattern may be; a trained model needs finetuning.
        needs: masks that will be passed: "key_mask", "segment_ids", "attn_bias".
        usable: the part of the device's memory that may be filled.
    Raises:
        ValueError, TypeError: for an argument that is out of range, or decoding that cannot be.
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

    def __post_init__(self) -> None:
        for name, kind in (("model", Model), ("device", Device)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a planning.{kind.__name__}, got {getattr(self, name)!r}")
        check_positive("seq_len", self.seq_len)
        check_positive("batch", self.batch)
        for name in ("training", "decode", "allow_approximate", "allow_patterns"):
            check_flag(name, getattr(self, name))
        check_choice("checkpointing", self.checkpointing, (True, False, "auto"))  # type: ignore[arg-type]
        if isinstance(self.needs, str):
            raise TypeError(f"needs must be a sequence of names, got {self.needs!r}")
        for mask in self.needs:
            check_choice("needs", mask, MASKS)
        if self.decode and (self.training or not self.model.is_causal):
            raise ValueError("decode must be False when training, and for a model that is not causal")
        if self.checkpointing is True and not self.training:
            raise ValueError("checkpointing must be False or 'auto' without training, got True")
        usable_bytes(self.device, self.usable)


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
        ranked: what can do it, best first: exact mechanisms before patterns before approximations before other
            operators, among them the quicker before the slower, then the smaller before the larger.
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

    Mechanisms have their customary options (see MechanismSpec). Memory is what `model_cost` counts, with AdamW when
    training; times are those of `estimate_time`. Nothing here knows the quality that your task gets.

    Raises:
        TypeError: if workload is no Workload.
    """
    if not isinstance(workload, Workload):
        raise TypeError(f"workload must be a planning.Workload, got {type(workload).__name__}")
    ranked: list[Candidate] = []
    rejected: list[Rejection] = []
    for name in MECHANISMS:
        spec = MechanismSpec(name)
        answer = _refused(spec, workload) or _fitted(spec, workload)
        if isinstance(answer, Candidate):
            ranked.append(answer)
        else:
            rejected.append(Rejection(spec, answer))
    ranked.sort(key=lambda c: (EXACTNESS.index(c.exactness), c.time.seconds, c.memory.total))
    return Plan(workload, tuple(ranked), tuple(rejected))


def _refused(spec: MechanismSpec, workload: Workload) -> str | None:
    """Why the mechanism may not be taken, whatever it costs."""
    exactness = MECHANISMS[spec.name].complexity.exactness
    if exactness in ("approximate", "different operator") and not workload.allow_approximate:
        return f"{exactness}: not softmax attention; allow_approximate=True admits it"
    if exactness == "exact within a pattern" and not workload.allow_patterns:
        return f"{exactness}: leaves keys out; allow_patterns=True admits it"
    try:
        mechanism = workload.model.build(spec, workload.seq_len)
    except (TypeError, ValueError) as error:
        return str(error)
    for mask, honoured in (
        ("segment_ids", mechanism.supports_segments),
        ("attn_bias", mechanism.supports_bias),
    ):
        if mask in workload.needs and not honoured:
            return f"does not honour {mask}"
    return None


def _fitted(spec: MechanismSpec, workload: Workload) -> Candidate | str:
    """The mechanism, with checkpointing if it must be; or what it needs and has not."""
    choices = (
        (False, True) if workload.checkpointing == "auto" and workload.training else (workload.checkpointing,)
    )
    model, budget = workload.model.with_mechanism(spec), usable_bytes(workload.device, workload.usable)
    memory = None
    for checkpointing in (choice is True for choice in choices):
        memory = _memory(model, workload, checkpointing)
        if memory.total <= budget:
            time = estimate_time(
                model,
                workload.device,
                batch=workload.batch,
                seq_len=workload.seq_len,
                training=workload.training,
                checkpointing=checkpointing,
                phase="decode" if workload.decode else "prefill",
            )
            exactness = MECHANISMS[spec.name].complexity.exactness
            return Candidate(spec, exactness, time, memory, checkpointing)
    assert memory is not None
    return (
        f"needs {memory.total / GIB:.1f} GiB of the {budget / GIB:.1f} GiB that may be filled, "
        f"{memory.as_dict()[memory.largest] / GIB:.1f} GiB of it {memory.largest}"
    )


def _memory(model: Model, workload: Workload, checkpointing: bool) -> MemoryNeeds:
    """Decoding needs that of a step alone: a prompt goes through `step` in pieces."""
    return model_cost(
        model,
        workload.batch,
        workload.seq_len,
        training=workload.training,
        checkpointing=checkpointing,
        phase="decode" if workload.decode else "prefill",
        device_type=workload.device.type,
    ).memory
