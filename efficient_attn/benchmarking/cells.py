"""A cell: one number to measure, as plain data that travels between processes and into files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FORWARD = "forward"
BACKWARD = "backward"
TRAINING = "forward+backward"
MEMORY = "memory"
CAPACITY = "capacity"
CAPACITY_FORWARD = "capacity, forward"
DECODE = "decode"
TUNE = "tune"
TABLES = "tables"
RACES = (FORWARD, BACKWARD, TRAINING)
ALONE = (MEMORY, CAPACITY, CAPACITY_FORWARD)
"""What is measured in a process that has measured nothing before."""


@dataclass(frozen=True)
class Target:
    """What a number is hoped to reach. A miss is shown, never raised."""

    bound: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:.3g}"


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Args:
        section: the table that it belongs to.
        subject: which of our mechanisms, by its name in `subjects.SUBJECTS`.
        work: one of RACES for a race against `peer`, or ours alone without one; the others for ours alone.
        length: tokens.
        peer: whom ours is compared with, by its name in `peers.PEERS`; empty if with nobody. TUNE: our kernel.
        threads: CPU threads of both sides.
        effort: how often to repeat, by its name in `measure.timing.EFFORTS`.
        positions: DECODE only: the tokens already in the state.
        target: what the ratio should reach; not part of the identity, so that changing one measures nothing anew.
    """

    section: str
    subject: str
    work: str
    length: int
    peer: str = ""
    threads: int = 1
    effort: str = "full"
    dtype: str = "float32"
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    device: str = "cpu"
    positions: tuple[int, ...] = ()
    target: Target | None = field(default=None, compare=False)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that makes it another measurement."""
        plain = asdict(self) | {"positions": list(self.positions)}
        del plain["target"]
        return plain

    @property
    def label(self) -> str:
        versus = "of" if self.work == TUNE else "vs"
        against = f" {versus} {self.peer}" if self.peer else ""
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        size = "" if self.head_dim == 64 else f" D{self.head_dim}"
        where = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        where = where if self.device == "cpu" else self.device
        return f"{self.section}: {self.subject}{dtype}{size} {self.work} at {self.length:,}{against}, {where}"

    @classmethod
    def from_identity(cls, plain: Mapping[str, Any]) -> Cell:
        """The cell that `identity` describes. Raises TypeError if it is not one."""
        return cls(**{**plain, "positions": tuple(plain["positions"])})
