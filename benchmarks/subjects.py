"""Our mechanisms as they are benchmarked, by name. A mechanism that is not listed runs as its first example."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from efficient_attn import (
    MECHANISMS,
    BigBirdAttention,
    FlashAttention,
    FullAttention,
    LinearAttention,
    LinformerAttention,
    LongformerAttention,
    Mechanism,
    PerformerAttention,
    SlidingWindowAttention,
    SparseTransformerAttention,
)
from efficient_attn.benchmarking.cells import Cell
from efficient_attn.masks import Causal, Everything

Build = Callable[[int, int, int], Mechanism]
"""From length, heads and head size."""

SUBJECTS: dict[str, Build] = {
    "full": lambda n, h, e: FullAttention(),
    "full, causal": lambda n, h, e: FullAttention(is_causal=True),
    "flash, causal": lambda n, h, e: FlashAttention(is_causal=True),
    "window 256, causal": lambda n, h, e: SlidingWindowAttention(256, is_causal=True),
    "window 1024, causal": lambda n, h, e: SlidingWindowAttention(1024, is_causal=True),
    "longformer 256 + 64": lambda n, h, e: LongformerAttention(256, global_tokens=64),
    "bigbird b64": lambda n, h, e: BigBirdAttention(block_size=64),
    "bigbird b64, causal": lambda n, h, e: BigBirdAttention(block_size=64, is_causal=True),
    "strided 128, causal": lambda n, h, e: SparseTransformerAttention("strided", 128, is_causal=True),
    "fixed 128, causal": lambda n, h, e: SparseTransformerAttention("fixed", 128, is_causal=True),
    "strided 512, causal": lambda n, h, e: SparseTransformerAttention("strided", 512, is_causal=True),
    "fixed 512, causal": lambda n, h, e: SparseTransformerAttention("fixed", 512, is_causal=True),
    "linformer 256": lambda n, h, e: LinformerAttention(n, h, rank=256),
    "performer 256": lambda n, h, e: PerformerAttention(e, num_features=256),
    "performer 256, causal": lambda n, h, e: PerformerAttention(e, num_features=256, is_causal=True),
    "linear": lambda n, h, e: LinearAttention(),
    "linear, causal": lambda n, h, e: LinearAttention(is_causal=True),
}

FOR_GPUS = ("window 1024, causal",)
"""Too long to be measured at the lengths of a CPU."""

_TRIAL = (64, 8, 64)


def _others() -> Mapping[str, Build]:
    """The first example of every mechanism in the table that no subject above stands for."""
    shown = {type(build(*_TRIAL)) for build in SUBJECTS.values()}
    others: dict[str, Build] = {}
    for name, cls in MECHANISMS.items():
        if cls not in shown:
            others[name] = lambda n, h, e, cls=cls: cls.examples(n, h, e)[0]
    return others


SUBJECTS |= _others()


def subject(cell: Cell) -> Mechanism:
    """The mechanism that `cell` measures, in evaluation mode."""
    return SUBJECTS[cell.subject](cell.length, cell.heads, cell.head_dim).eval()


def is_subquadratic(name: str) -> bool:
    """Whether the subject declares less than the square of the length, in time and in memory."""
    declared = SUBJECTS[name](*_TRIAL).complexity
    return not any("L**2" in formula for formula in (declared.time, declared.memory))


def has_mask(name: str) -> bool:
    """Whether SDPA needs a mask, a dense one or causality's, to let each query see the same keys."""
    return getattr(SUBJECTS[name](*_TRIAL), "mask", Everything()) != Everything()


def is_causal_alone(name: str) -> bool:
    """Whether causality is all of the mask."""
    return getattr(SUBJECTS[name](*_TRIAL), "mask", None) == Causal()
