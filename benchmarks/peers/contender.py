"""One side of a race: something that computes attention on inputs that lie ready in its own layout."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from benchmarks.harness.cells import Cell
from benchmarks.harness.environment import installed
from benchmarks.harness.worker import Unsupported
from efficient_attn import Mechanism


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Contender:
    """A computation and what its gradients are taken with respect to.

    Args:
        forward: computes the output; masks, tables and layouts were prepared before.
        leaves: q, k and v, and any parameters in the order of ours.
        computes: the mechanism whose definition the output is held against.
        to_heads: from its own layout to (B, H, L, E), for outputs and for gradients of q, k and v.
        remark: what a reader must know to judge the comparison.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    computes: Mechanism
    to_heads: Callable[[Tensor], Tensor] = _as_it_is
    remark: str = ""


@dataclass(frozen=True)
class Race:
    """What both sides of a race are given."""

    cell: Cell
    mechanism: Mechanism
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def needed(library: str, module: str) -> ModuleType:
    """The module, if its library is installed and can be imported. Raises Unsupported."""
    if installed(library) is None:
        raise Unsupported(f"{library} is not installed")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unsupported(f"{library} {installed(library)} cannot be imported: {error}") from error
