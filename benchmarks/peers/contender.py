"""What peers are given, and how they say that they cannot take it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from efficient_attn import Mechanism
from efficient_attn.benchmarking.cells import Cell
from efficient_attn.benchmarking.environment import installed
from efficient_attn.benchmarking.worker import Unsupported


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
