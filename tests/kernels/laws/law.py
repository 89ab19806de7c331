"""The laws' register, and the dtypes that Triton's interpreter computes rightly."""

from __future__ import annotations

from collections.abc import Callable

import torch

from efficient_attn.mechanisms import Mechanism
from efficient_attn.testing.laws.law import Law

LAWS: dict[str, Law] = {}
"""Every law by its name, in the order in which they are run."""

DTYPES = (torch.float32, torch.float16)

SHORT = 20
"""Tokens that cross one edge of the interpreter's blocks; the other length of the laws crosses two."""


def law(applies: Callable[[Mechanism], bool] = lambda m: True) -> Callable[[Callable], Callable]:
    """Register a function of a mechanism as a law of kernels; its docstring is the statement."""

    def register(check: Callable[[Mechanism], int]) -> Callable[[Mechanism], int]:
        LAWS[check.__name__] = Law(check.__name__, (check.__doc__ or "").strip(), applies, check)
        return check

    return register
