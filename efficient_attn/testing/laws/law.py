"""What a law is, and how it says what was violated and by how much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...mechanisms import Mechanism


class LawViolation(AssertionError):
    """A mechanism broke a law; the message says where, and by how much."""


@dataclass(frozen=True)
class Law:
    """A statement about every mechanism for which `applies` holds; `run` returns the number of cases it tried."""

    name: str
    statement: str
    applies: Callable[[Mechanism], bool]
    run: Callable[[Mechanism], int]


LAWS: dict[str, Law] = {}
"""Every law by its name, in the order in which they are run."""


def law(applies: Callable[[Mechanism], bool] = lambda m: True) -> Callable[[Callable], Callable]:
    """Register a function of a mechanism as a law; its docstring is the statement."""

    def register(run: Callable[[Mechanism], int]) -> Callable[[Mechanism], int]:
        LAWS[run.__name__] = Law(run.__name__, (run.__doc__ or "").strip(), applies, run)
        return run

    return register


def expect(holds: bool, message: str) -> None:
    """Raise LawViolation unless `holds`."""
    if not holds:
        raise LawViolation(message)


def expect_identical(actual: Tensor, expected: Tensor, what: str) -> None:
    """Bit for bit equal, NaN nowhere."""
    expect(
        actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    expect(bool(torch.isfinite(actual).all()), f"{what}: not finite")
    if not torch.equal(actual, expected):
        difference = (actual.double() - expected.double()).abs()
        raise LawViolation(
            f"{what}: {int((difference > 0).sum())} entries differ, by up to {difference.max():.3g}"
        )


def expect_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Within `tolerance` of the largest expected magnitude (or of 1): for the fp64 comparisons."""
    expect(
        actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    if actual.numel() == 0:
        return
    expect(bool(torch.isfinite(actual).all()), f"{what}: not finite")
    error = (actual.double() - expected.double()).abs().max().item()
    bound = tolerance * max(1.0, expected.abs().max().item())
    expect(error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}")
