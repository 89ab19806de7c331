"""One side of a race: something that computes attention on inputs that lie ready in its own layout."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.harness.cells import Cell
from benchmarks.harness.environment import installed
from benchmarks.harness.worker import Unsupported
from efficient_attn import Mechanism


def _as_it_is(x: Tensor) -> Tensor:
    return x


class Definition(Protocol):
    """What a contender says that it computes: the matrix that weighs the values, as a module."""

    def matrix(self, q: Tensor, k: Tensor, *, q_offset: int) -> Tensor: ...

    def double(self) -> Definition: ...

    def parameters(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Contender:
    """A computation and what its gradients are taken with respect to.

    Args:
        forward: computes the output; masks, tables and layouts were prepared before.
        leaves: q, k and v, and any parameters in the order of ours.
        computes: the definition that the output is held against; mostly our own mechanism.
        to_heads: from its own layout to (B, H, L, E), for outputs and for gradients of q, k and v.
        remark: what a reader must know to judge the comparison.
        given: the q, k and v in heads that its definition starts from, if they are not the race's.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    computes: Definition
    to_heads: Callable[[Tensor], Tensor] = _as_it_is
    remark: str = ""
    given: tuple[Tensor, Tensor, Tensor] | None = None


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


def tokens_first(inputs: Iterable[Tensor]) -> list[Tensor]:
    """Leaves (B, L, H, E) with the numbers of `inputs` (B, H, L, E)."""
    return [x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad) for x in inputs]


def heads_first(x: Tensor) -> Tensor:
    """Back again."""
    return x.transpose(1, 2)


NO_KERNEL = ("No available kernel", "No viable backend")
"""How scaled_dot_product_attention says that the kernel asked for does not take these inputs, on a GPU and a CPU."""


def tried(forward: Callable[[], Tensor]) -> None:
    """Run `forward` once. Raises Unsupported where the library says that it has no kernel for this."""
    try:
        with torch.no_grad():
            forward()
    except NotImplementedError as error:
        raise Unsupported(f"not implemented: {error}") from error
    except RuntimeError as error:
        if any(said in str(error) for said in NO_KERNEL):
            raise Unsupported("no such kernel for these inputs") from error
        raise


def needed(library: str, module: str) -> ModuleType:
    """The module, if its library is installed and can be imported. Raises Unsupported."""
    if installed(library) is None:
        raise Unsupported(f"{library} is not installed")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unsupported(f"{library} {installed(library)} cannot be imported: {error}") from error
