"""The package broken on purpose, in one place at a time: the tests must notice each of these mistakes."""

from __future__ import annotations

from . import (
    blocked,
    costs,
    decoding,
    features,
    layers,
    layout,
    linear_ops,
    masks,
    mechanisms,
    operands,
    patterns,
    problems,
    scan,
    state,
    tiles,
    torch_mha,
)
from .mutant import Mutant, Subject

SUBJECTS: tuple[Subject, ...] = (
    *(module.SUBJECT for module in (masks, patterns, features, mechanisms, operands, state, costs, layers)),
    torch_mha.SUBJECT,
    *(tiles.SUBJECT, blocked.SUBJECT, blocked.DROPPING, blocked.OFFSETS, layout.SUBJECT, layout.BLOCK_LAYOUT),
    *(scan.SUBJECT, linear_ops.SUBJECT, linear_ops.IN_HALF, decoding.ROOM, decoding.SUBJECT),
    *(problems.SUBJECT, problems.COUNTED),
)

__all__ = ["SUBJECTS", "Mutant", "Subject"]
