"""Counting the FLOPs of anything that runs, in the basis "torch", without silent zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FlopCount:
    """What `count_flops` counted.

    Attributes:
        total: FLOPs in matrix products, 2 for each multiply-accumulate.
        by_operator: the same by operator, such as "aten::mm".
        unknown: calls of operators whose FLOPs are not known, hence not counted; empty if `strict`.
    """

    total: int
    by_operator: dict[str, int]
    unknown: dict[str, int]


def count_flops(run: Callable[..., Any], *args: Any, strict: bool = True) -> FlopCount:
    """The FLOPs in matrix products of `run(*args)`, in the basis "torch": what the operators that ran multiply.

    Like torch.utils.flop_counter.FlopCounterMode, but for what that counts as nothing: scaled_dot_product_attention
    on a CPU, products with a vector, and custom operators. Causal attention is counted as the kernels declare it,
    which is as if nothing were masked, except in this package's own operators. Nothing in torch is patched.
    Kernels that are launched without an operator cannot be seen by anyone.

    Args:
        run: a model or a function; for a backward pass, a function that calls it.
        args: its arguments, on any device, "meta" included.
        strict: raise for operators that multiply and have no formula, rather than list them.
    Raises:
        NotImplementedError: if `strict`, naming the operators; torch.utils.flop_counter.register_flop_formula
            teaches it yours.
    """
    raise NotImplementedError
