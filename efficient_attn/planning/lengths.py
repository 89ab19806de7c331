"""The longest sequence that fits."""

from __future__ import annotations

from dataclasses import dataclass

from ..layers import Attention
from .costs import MemoryNeeds
from .devices import Device
from .models import Model


@dataclass(frozen=True)
class LengthLimit:
    """The answer of `max_seq_len`.

    Attributes:
        length: the most tokens that fit; 0 if not even one does.
        bound_by: the term of memory that grows most with one more token; "nothing" at the limit of the search,
            "the mechanism" where it takes no more tokens.
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
    usable: float = 1.0,
    at_most: int = 2**30,
) -> LengthLimit:
    """The largest sequence length whose memory, exactly as `model_cost` counts it, fits: by bisection.

    Args:
        model: a description, or an `Attention` layer, alone.
        device: a Device, or bytes of memory.
        batch: sequences at once.
        training, checkpointing, optimizer: as for `model_cost`.
        usable: the part of memory that may be filled: allocators, libraries and other programs take the rest.
        at_most: where the search ends.
    Raises:
        ValueError: if `usable` is not in (0, 1], or another argument is out of range.
    """
    raise NotImplementedError
