"""What is measured on a CPU, against whom, and what each number should reach. A target is data: a miss is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from benchmarks.harness.tables import Targets
from benchmarks.peers import OWN_FORWARD
from benchmarks.subjects import FOR_GPUS, SUBJECTS, has_mask, is_causal_alone, is_subquadratic
from efficient_attn.benchmarking.cells import (
    CAPACITY,
    CAPACITY_FORWARD,
    DECODE,
    FORWARD,
    MEMORY,
    TRAINING,
    Cell,
    Target,
)

NEVER_SLOWER = Target(1.0)
LITTLE_SLOWER = Target(1 / 1.3)
"""At 1,024 tokens no mechanism may take more than 1.3 times as long as SDPA under its mask."""
AS_SDPA = Target(0.95)
WITHIN_4X_OF_FORWARD = Target(1 / 4)
MEMORY_EXPONENT = Target(1.1, at_least=False)
"""Of the peak in the length: 1 is linear. It belongs to a row of memory cells, not to one."""

WINDOW, LINEAR = "window 256, causal", "linear, causal"
SHORT_STRIDES = ("strided 128, causal", "fixed 128, causal")
LONG_STRIDES = ("strided 512, causal", "fixed 512, causal")
DECODERS = (WINDOW, LINEAR, "performer 256, causal", "bigbird b64, causal", "full, causal")


@dataclass(frozen=True)
class Sizes:
    """The lengths of one kind of run; `few` leaves out what takes long whatever the length."""

    short: int
    middle: int
    long: int
    full: tuple[int, ...]
    memory: tuple[int, ...]
    capacity: int
    capacity_forward: int
    positions: tuple[int, ...]
    few: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.short, self.middle, self.long


SIZES: Mapping[str, Sizes] = {
    "full": Sizes(
        short=1024,
        middle=4096,
        long=16_384,
        full=(128, 1024, 4096),
        memory=(4096, 8192, 16_384, 32_768, 65_536),
        capacity=262_144,
        capacity_forward=1_048_576,
        positions=(100, 1000, 10_000, 100_000),
    ),
    "quick": Sizes(
        short=256,
        middle=512,
        long=1024,
        full=(128,),
        memory=(2048, 8192),
        capacity=16_384,
        capacity_forward=32_768,
        positions=(100, 1000),
        few=True,
    ),
}


def full(at: Sizes) -> Iterator[Cell]:
    for n in at.full:
        for work in (FORWARD, TRAINING):
            for subject in ("full", "full, causal"):
                yield _race("full", subject, work, n, "SDPA", AS_SDPA)


def every(at: Sizes) -> Iterator[Cell]:
    for name in SUBJECTS:
        if name not in ("full", "full, causal", *LONG_STRIDES, *FOR_GPUS):
            peer = "masked SDPA" if has_mask(name) else "SDPA"
            for work in (FORWARD, TRAINING):
                yield _race("every", name, work, at.short, peer, LITTLE_SLOWER)
                if is_causal_alone(name):  # which SDPA can be told by a flag, and then does half of the work
                    yield _race("every", name, work, at.short, "SDPA")


def window(at: Sizes) -> Iterator[Cell]:
    for n in at.lengths:
        long = n == at.long
        yield _race("window", WINDOW, FORWARD, n, "masked SDPA", Target(28) if long else None)
        yield _race("window", WINDOW, FORWARD, n, "masked SDPA, float mask")
        if long or not at.few:
            yield _race("window", WINDOW, FORWARD, n, "flex", Target(1.8) if long else None)
    for n in (at.middle, at.long):
        yield _race("window", WINDOW, FORWARD, n, "local-attention", NEVER_SLOWER)
    yield _race("window", WINDOW, TRAINING, at.short, "masked SDPA")
    yield _race("window", WINDOW, TRAINING, at.middle, "masked SDPA", Target(6.5))


def linear(at: Sizes) -> Iterator[Cell]:
    targets = {"cumsum": Target(60), "chunks": Target(3), "fast-transformers": Target(2)}
    for n in at.lengths:
        for peer, target in targets.items():
            yield _race("linear", LINEAR, FORWARD, n, peer, target if n == at.long else None)
    for n in at.lengths:
        yield _race("linear", LINEAR, TRAINING, n, "chunks", Target(3) if n == at.long else None)


def bigbird(at: Sizes) -> Iterator[Cell]:
    for n in at.lengths:
        long = n == at.long
        yield _race("bigbird", "bigbird b64", FORWARD, n, "masked SDPA", Target(15) if long else None)
        if long or not at.few:
            yield _race("bigbird", "bigbird b64", FORWARD, n, "flex", Target(1.5) if long else None)
    for n in (at.middle, at.long):
        yield _race("bigbird", "bigbird b64", TRAINING, n, OWN_FORWARD, WITHIN_4X_OF_FORWARD)


def performer(at: Sizes) -> Iterator[Cell]:
    for subject in ("performer 256", "performer 256, causal"):
        for n in (at.middle, at.long):
            yield _race("performer", subject, FORWARD, n, "performer-pytorch", NEVER_SLOWER)
        yield _race("performer", subject, TRAINING, at.middle, "performer-pytorch", NEVER_SLOWER)
        yield _race("performer", subject, FORWARD, at.long, "SDPA", NEVER_SLOWER)


def linformer(at: Sizes) -> Iterator[Cell]:
    for n in (at.middle, at.long):
        yield _race("linformer", "linformer 256", FORWARD, n, "linformer", NEVER_SLOWER)
    yield _race("linformer", "linformer 256", TRAINING, at.middle, "linformer", NEVER_SLOWER)
    yield _race("linformer", "linformer 256", FORWARD, at.long, "SDPA", NEVER_SLOWER)


def longformer(at: Sizes) -> Iterator[Cell]:
    subject = "longformer 256 + 64"
    for n in (at.middle, at.long):
        yield _race("longformer", subject, FORWARD, n, "masked SDPA", NEVER_SLOWER)
        yield _race("longformer", subject, FORWARD, n, "local-attention", NEVER_SLOWER)
    yield _race("longformer", subject, TRAINING, at.middle, "masked SDPA", NEVER_SLOWER)


def sparse(at: Sizes) -> Iterator[Cell]:
    for subject in SHORT_STRIDES:
        for n in (at.middle, at.long):
            yield _race("sparse", subject, FORWARD, n, "masked SDPA", NEVER_SLOWER)
        yield _race("sparse", subject, TRAINING, at.middle, "masked SDPA", NEVER_SLOWER)


def bf16(at: Sizes) -> Iterator[Cell]:
    for work, n, target in ((FORWARD, at.long, Target(15)), (TRAINING, at.middle, None)):
        yield replace(_race("bf16", WINDOW, work, n, "masked SDPA", target), dtype="bfloat16")


def memory(at: Sizes) -> Iterator[Cell]:
    for name in _subquadratic(at, without=LONG_STRIDES):
        for n in at.memory:
            yield Cell("memory", name, MEMORY, n, heads=4)


def capacity(at: Sizes) -> Iterator[Cell]:
    # For the longest sequences the stride is what the paper makes it, the root of the length.
    for name in _subquadratic(at, without=SHORT_STRIDES):
        yield Cell("capacity", name, CAPACITY, at.capacity, heads=4)
    for name in (WINDOW, LINEAR):
        yield Cell("capacity", name, CAPACITY_FORWARD, at.capacity_forward, heads=4)


def decode(at: Sizes) -> Iterator[Cell]:
    for name in DECODERS:
        yield Cell("decode", name, DECODE, at.positions[-1], positions=at.positions)


SECTIONS: Mapping[str, Callable[[Sizes], Iterator[Cell]]] = {
    section.__name__: section
    for section in (
        *(full, every, window, linear, bigbird, performer, linformer, longformer, sparse, bf16),
        *(memory, capacity, decode),
    )
}
MOST_THREADS = ("memory", "capacity")
FEWEST_THREADS = ("decode",)
"""Measured once each: threads are not what these are about."""


def cells(sections: Iterable[str], threads: Iterable[int], effort: str) -> list[Cell]:
    """The cells of these sections, in the order in which they are measured. A quick run has no targets."""
    counts = sorted(set(threads))
    planned = []
    for section in sections:
        chosen = counts
        if section in MOST_THREADS + FEWEST_THREADS:
            chosen = counts[-1:] if section in MOST_THREADS else counts[:1]
        for count in chosen:
            for cell in SECTIONS[section](SIZES[effort]):
                target = cell.target if effort == "full" else None
                planned.append(replace(cell, threads=count, effort=effort, target=target))
    return planned


def target_of(cell: Cell) -> Target | None:
    """The target that the plan gives to `cell`, which may come from a file."""
    return _targets(cell.threads, cell.effort).get(cell)


def targets(effort: str) -> Targets:
    """What the tables of a run are held against: a quick run has nothing to judge."""
    return Targets(target_of, MEMORY_EXPONENT if effort == "full" else None)


@lru_cache
def _targets(threads: int, effort: str) -> dict[Cell, Target | None]:
    return {cell: cell.target for cell in cells(SECTIONS, (threads,), effort)}


def _race(
    section: str, subject: str, work: str, length: int, peer: str, target: Target | None = None
) -> Cell:
    return Cell(section, subject, work, length, peer, target=target)


def _subquadratic(at: Sizes, without: tuple[str, ...]) -> tuple[str, ...]:
    if at.few:
        return WINDOW, LINEAR
    left_out = (*without, *FOR_GPUS)
    return tuple(name for name in SUBJECTS if is_subquadratic(name) and name not in left_out)
