"""One side of a race: something that computes attention on inputs that lie ready in its own layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..mechanisms import Mechanism
from .cells import BACKWARD, FORWARD


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


def contender_of(mechanism: Mechanism, inputs: tuple[Tensor, Tensor, Tensor]) -> Contender:
    """One of our mechanisms on q, k and v in heads."""
    return Contender(lambda: mechanism(*inputs), (*inputs, *mechanism.parameters()), mechanism)


def work_of(contender: Contender, work: str) -> Callable[[], object]:
    """What is timed: the forward pass without a graph, the backward pass, or both."""
    if work == FORWARD:
        return torch.no_grad()(contender.forward)
    output = contender.forward()
    cotangent = torch.randn_like(output.detach())
    if work == BACKWARD:
        return lambda: torch.autograd.grad(output, contender.leaves, cotangent, retain_graph=True)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(contender.forward(), contender.leaves, cotangent)

    return forward_backward


def backend_of(explanation: str) -> str:
    return next(line.removeprefix("backend: ") for line in explanation.splitlines() if "backend: " in line)
