"""The longest sequence that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..inputs import check_positive
from ..layers import Attention
from ..mechanisms import Mechanism
from .costs import MemoryNeeds, model_cost
from .devices import Device
from .models import Model, as_model


@dataclass(frozen=True)
class LengthLimit:
    """The answer of `max_seq_len`.

    Attributes:
        length: the most tokens that fit; 0 if not even one does.
        bound_by: what fills the memory: of the terms that grow with the length the largest, "weights" and the like
            if these alone are too much; "at_most" at the end of the search, "mechanism" where that takes no more.
        memory: what `length` tokens need.
        budget: bytes that could be used.
    """

    length: int
    bound_by: str
    memory: MemoryNeeds
    budget: int


def max_seq_len(
    model: Model | Attention,
    device: Device | int,
    *,
    batch: int = 1,
    training: bool = False,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    phase: str = "prefill",
    usable: float = 1.0,
    at_most: int = 2**24,
) -> LengthLimit:
    """The largest sequence length whose memory, exactly as `model_cost` counts it, fits: by bisection.

    Args:
        model: a description, or an `Attention` layer, alone.
        device: a Device, or bytes of memory; bytes are planned with the backends of "cuda".
        batch: sequences at once.
        training, checkpointing, optimizer, phase: as for `model_cost`; to "decode" is one more token after so many.
        usable: the part of memory that may be filled: allocators, libraries and other programs take the rest.
        at_most: where the search ends, in tokens.
    Raises:
        ValueError: if `usable` is not in (0, 1], or another argument is out of range.
        TypeError: if device is neither a Device nor an int.
    """
    described = as_model(model)
    budget = usable_bytes(device, usable)
    check_positive("at_most", at_most)
    check_positive("batch", batch)
    device_type = device.type if isinstance(device, Device) else "cuda"

    def needs(length: int) -> MemoryNeeds:
        return model_cost(
            described, batch, length, training=training, checkpointing=checkpointing, optimizer=optimizer,
            phase=phase, device_type=device_type,
        ).memory  # fmt: skip

    limit = min([at_most, *_longest_taken(described)])
    length = _largest(lambda n: needs(n).total <= budget, limit)
    if length == 0:
        return LengthLimit(0, needs(1).largest, needs(0 if phase == "prefill" else 1), budget)
    memory = needs(length)
    if length == limit:
        return LengthLimit(length, "at_most" if limit == at_most else "mechanism", memory, budget)
    return LengthLimit(
        length, _growing(memory, needs(length + 1), needs(max(1, length // 2))), memory, budget
    )


def usable_bytes(device: Device | int, usable: float) -> int:
    """Bytes of `device` that may be filled."""
    if not isinstance(device, Device):
        if isinstance(device, bool) or not isinstance(device, int):
            raise TypeError(f"device must be a Device or bytes of memory, got {device!r}")
        check_positive("device", device)
    if not isinstance(usable, (int, float)) or isinstance(usable, bool):
        raise TypeError(f"usable must be a float, got {usable!r}")
    if not 0 < usable <= 1:
        raise ValueError(f"usable must be in (0, 1], got {usable}")
    memory = device.memory_bytes if isinstance(device, Device) else device
    return int(memory * usable)


def _longest_taken(model: Model) -> list[int]:
    """The limits of mechanisms that were built for a length; those described by name are built for any."""
    built = (each for each in model.layer_mechanisms if isinstance(each, Mechanism))
    return [each.max_seq_len for each in built if each.max_seq_len is not None]


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest length up to `limit` that fits, 0 if none does: doubling, then halving the gap."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _growing(memory: MemoryNeeds, longer: MemoryNeeds, half: MemoryNeeds) -> str:
    """The largest of the terms that a longer sequence makes larger."""
    terms, more, less = memory.as_dict(), longer.as_dict(), half.as_dict()
    growing = [name for name in terms if more[name] > less[name]]
    return max(growing, key=lambda name: terms[name])
