"""What is measured on a GPU, against whom, and what each number should reach. A target is data: a miss is shown.

Targets are ratios at 65,536 tokens in bfloat16, against peers timed in the same process in turns. A dry run, for
machines without a GPU, has the same cells at short lengths on the CPU, and no targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from benchmarks.harness.tables import Targets
from benchmarks.measure.tuning import TIMED_BY
from benchmarks.peers.sdpa import KERNELS
from efficient_attn.benchmarking.cells import (
    BACKWARD,
    CAPACITY,
    DECODE,
    FORWARD,
    RACES,
    TABLES,
    TRAINING,
    TUNE,
    Cell,
    Target,
)

AS_SDPA = Target(0.97)
AS_PRODUCTS = Target(1 / 1.1)
"""Linformer may take 1.1 times as long as its matrix products and SDPA."""
LEAST_MEMORY = Target(1.3, at_least=False)
"""Of inputs, output and gradients: the peak of a forward and backward pass over 1,048,576 tokens."""

TABLES_ARE_CHEAP = Target(0.05, at_least=False)
"""Of a forward pass: what building the block tables takes, once."""

FULL, WIDE, NARROW = "full, causal", "window 1024, causal", "window 256, causal"
BIGBIRD, LONGFORMER = "bigbird b64", "longformer 256 + 64"
STRIDED, FIXED = "strided 512, causal", "fixed 512, causal"
LINEAR, BOTH_WAYS = "linear, causal", "linear"
PERFORMER, LINFORMER = "performer 256, causal", "linformer 256"
SUBJECTS = (
    *(FULL, WIDE, NARROW, BIGBIRD, LONGFORMER, STRIDED, FIXED),
    *(LINEAR, BOTH_WAYS, PERFORMER, "performer 256", LINFORMER),
)
LONGEST = (WIDE, NARROW, BIGBIRD, LONGFORMER, LINEAR, BOTH_WAYS, PERFORMER)
DECODERS = (NARROW, LINEAR, PERFORMER, "bigbird b64, causal", FULL)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one kind of run; `judged` is the length that targets are about, `few` leaves out repetitions."""

    lengths: tuple[int, ...]
    judged: int
    alone: tuple[int, ...]
    head_dims: tuple[int, ...]
    capacity: int
    positions: tuple[int, ...]
    heads: int = 16
    dtype: str = "bfloat16"
    device: str = "cuda"
    few: bool = False


SIZES: Mapping[str, Sizes] = {
    "full": Sizes(
        lengths=(4096, 16_384, 65_536),
        judged=65_536,
        alone=(4096, 16_384, 65_536, 262_144),
        head_dims=(64, 128),
        capacity=1_048_576,
        positions=(1024, 16_384, 131_072),
    ),
    "quick": Sizes(
        lengths=(4096,),
        judged=4096,
        alone=(16_384,),
        head_dims=(64,),
        capacity=262_144,
        positions=(1024, 16_384),
        few=True,
    ),
    "dry": Sizes(
        lengths=(128,),
        judged=128,
        alone=(192,),
        head_dims=(16,),
        capacity=512,
        positions=(16, 64),
        heads=2,
        dtype="float32",
        device="cpu",
        few=True,
    ),
}


def full(at: Sizes) -> Iterator[Cell]:
    kernels = [f"SDPA {kernel}" for kernel in KERNELS]
    for n in at.lengths:
        for work in (FORWARD, TRAINING):
            for peer in kernels[: 2 if at.few else None]:
                # Math writes all weights: 128 GiB at 65,536 tokens.
                if peer != "SDPA math" or n == at.lengths[0]:
                    yield _race("full", FULL, work, n, peer, AS_SDPA if n == at.judged else None)


def window_1024(at: Sizes) -> Iterator[Cell]:
    targets = {
        (FORWARD, "flex"): 1.25,
        (FORWARD, "FlashAttention-2"): 1.4,
        (FORWARD, "xformers"): None,
        (BACKWARD, "flex"): 1.2,
        (BACKWARD, "FlashAttention-2"): None,
        (TRAINING, "flex"): None,
        (TRAINING, "FlashAttention-2"): None,
        (TRAINING, "xformers"): None,
    }
    yield from _races(at, "window_1024", WIDE, targets)
    yield _race("window_1024", WIDE, FORWARD, at.lengths[0], "masked SDPA")


def window_256(at: Sizes) -> Iterator[Cell]:
    targets = {
        (FORWARD, "flex"): 1.4,
        (FORWARD, "FlashAttention-2"): None,
        (FORWARD, "xformers"): None,
        (FORWARD, "local-attention"): None,
        (BACKWARD, "flex"): None,
        (TRAINING, "flex"): None,
    }
    yield from _races(at, "window_256", NARROW, targets)


def bigbird(at: Sizes) -> Iterator[Cell]:
    yield from _races(at, "bigbird", BIGBIRD, {(FORWARD, "flex"): 1.2, (BACKWARD, "flex"): 1.2})
    yield _race("bigbird", BIGBIRD, FORWARD, at.lengths[0], "masked SDPA")


def longformer(at: Sizes) -> Iterator[Cell]:
    yield from _races(at, "longformer", LONGFORMER, {(FORWARD, "flex"): 1.2, (BACKWARD, "flex"): 1.2})


def sparse(at: Sizes) -> Iterator[Cell]:
    for subject in (STRIDED,) if at.few else (STRIDED, FIXED):
        yield from _races(at, "sparse", subject, {(FORWARD, "flex"): None, (TRAINING, "flex"): None})


def linear(at: Sizes) -> Iterator[Cell]:
    targets = {
        (FORWARD, "fla raw"): 1.5,
        (FORWARD, "fla"): 3.0,
        (FORWARD, "chunks"): None,
        (TRAINING, "fla raw"): 2.0,
        (TRAINING, "fla"): 4.0,
        (TRAINING, "chunks"): None,
    }
    yield from _races(at, "linear", LINEAR, targets)
    yield from _races(
        at, "linear", BOTH_WAYS, {(FORWARD, "two products"): 2.0, (TRAINING, "two products"): None}
    )


def performer(at: Sizes) -> Iterator[Cell]:
    yield from _races(at, "performer", PERFORMER, {(FORWARD, "performer-pytorch"): 10.0})
    yield _race("performer", PERFORMER, TRAINING, at.lengths[0], "performer-pytorch")


def linformer(at: Sizes) -> Iterator[Cell]:
    targets = {(FORWARD, "projected SDPA"): AS_PRODUCTS.bound, (TRAINING, "projected SDPA"): None}
    yield from _races(at, "linformer", LINFORMER, targets)


def alone(at: Sizes) -> Iterator[Cell]:
    for subject in SUBJECTS:
        for n in at.alone:
            for work in (TRAINING,) if at.few else RACES:
                yield _race("alone", subject, work, n, "")


def tables(at: Sizes) -> Iterator[Cell]:
    for subject in (BIGBIRD, LONGFORMER):
        yield _race("tables", subject, TABLES, at.judged, "", TABLES_ARE_CHEAP)


def capacity(at: Sizes) -> Iterator[Cell]:
    for subject in (WIDE, LINEAR) if at.few else LONGEST:
        yield _race("capacity", subject, CAPACITY, at.capacity, "", LEAST_MEMORY)


def decode(at: Sizes) -> Iterator[Cell]:
    for subject in DECODERS:
        yield Cell("decode", subject, DECODE, at.positions[-1], positions=at.positions)


SECTIONS: Mapping[str, Callable[[Sizes], Iterator[Cell]]] = {
    section.__name__: section
    for section in (
        *(full, window_1024, window_256, bigbird, longformer, sparse, linear, performer, linformer),
        *(alone, tables, capacity, decode),
    )
}
ONE_HEAD_SIZE = ("tables", "capacity", "decode")
"""Measured at the smallest head size alone."""
JUDGED = {"performer": (64,)}
"""Sections whose targets are about some head sizes only."""


def cells(sections: Iterable[str], effort: str) -> list[Cell]:
    """The cells of these sections, in the order in which they are measured. Only a full run has targets."""
    at, planned = SIZES[effort], []
    for section in sections:
        for size in at.head_dims[:1] if section in ONE_HEAD_SIZE else at.head_dims:
            for cell in SECTIONS[section](at):
                sizes = {"head_dim": size, "heads": at.heads, "dtype": at.dtype, "device": at.device}
                target = cell.target if effort == "full" and size in JUDGED.get(section, (size,)) else None
                planned.append(replace(cell, **sizes, effort=effort, target=target))
    return planned


TUNED_HEAD_SIZES = {"full": (64, 128, 256), "quick": (64,), "dry": (64,)}


def tuning(effort: str) -> list[Cell]:
    """A cell for each kernel and class of head sizes; in a dry run, for one kernel of each family."""
    at, planned = SIZES[effort], []
    one_of_each = {name.partition(".")[0]: name for name in TIMED_BY}
    for kernel in one_of_each.values() if effort == "dry" else TIMED_BY:
        for size in TUNED_HEAD_SIZES[effort]:
            cell = Cell("tune", TIMED_BY[kernel][0], TUNE, at.judged, kernel, effort=effort)
            planned.append(replace(cell, dtype="bfloat16", heads=at.heads, head_dim=size, device=at.device))
    return planned


def target_of(cell: Cell) -> Target | None:
    """The target that the plan gives to `cell`, which may come from a file."""
    return _targets(cell.effort).get(cell)


def targets(effort: str) -> Targets:
    """What the tables of a run are held against."""
    return Targets(target_of)


@lru_cache
def _targets(effort: str) -> dict[Cell, Target | None]:
    return {cell: cell.target for cell in cells(SECTIONS, effort)} if effort in SIZES else {}


def _races(
    at: Sizes, section: str, subject: str, targets: Mapping[tuple[str, str], float | None]
) -> Iterator[Cell]:
    for n in at.lengths:
        for (work, peer), bound in targets.items():
            # A compilation that the backward pass alone has asked for already.
            if at.few and work == TRAINING and (BACKWARD, peer) in targets:
                continue
            target = Target(bound) if bound is not None and n == at.judged else None
            yield _race(section, subject, work, n, peer, target)


def _race(
    section: str, subject: str, work: str, length: int, peer: str, target: Target | None = None
) -> Cell:
    return Cell(section, subject, work, length, peer, target=target)
