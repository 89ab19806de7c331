"""Measures one mechanism without a peer: whether it is right, then how long it takes, then what it holds."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from ..complexity import Shape
from ..mechanisms import Mechanism
from .cells import FORWARD, Cell
from .contender import Contender, backend_of, work_of
from .gate import Exact, errors, is_wrong, plain, said, sampled_strips, sparse_cotangent
from .inputs import normal_inputs
from .instruments import INSTRUMENTS, times_of
from .records import OK, UNSTABLE, WRONG
from .worker import Outcome

LARGEST_COPY, LARGEST_MATRIX = 1 << 30, 1 << 29
"""Bytes of q, k and v in fp64, and of the rows of the matrix, that the check may take."""
UNSTABLE_SPREAD = 0.5
"""Of the median, between the quartiles of the samples: from here on a number says little."""


def measure_alone(cell: Cell, mechanism: Mechanism) -> Outcome:
    """The outcome of one pass of `mechanism`: the cell's work, on its device, in its dtype."""
    mechanism = mechanism.to(device=cell.device, dtype=getattr(torch, cell.dtype))
    inputs = normal_inputs(cell, grad=cell.work != FORWARD)
    contender = Contender(lambda: mechanism(*inputs), (*inputs, *mechanism.parameters()), mechanism)
    result: dict[str, Any] = {
        "what": " ".join(str(mechanism).split()),
        "backend": backend_of(mechanism.explain(*inputs)),
        "inputs_bytes": sum(x.nbytes for x in inputs),
        "declared": _declared(cell, mechanism),
    }
    found = check(cell, mechanism, inputs, contender)
    result["errors"] = plain(found)
    if is_wrong(found, inputs[0].dtype):
        return Outcome(WRONG, f"against the definition in fp64: {said(found)}", result)
    work = work_of(contender, cell.work)
    result["seconds"] = times_of(cell, {"ours": work})["ours"]
    result["peak_bytes"] = INSTRUMENTS[cell.device].peak_bytes(work)
    return judged(result, result["seconds"])


def check(
    cell: Cell, mechanism: Mechanism, inputs: tuple[Tensor, Tensor, Tensor], contender: Contender
) -> dict[str, float]:
    """Relative errors against the definition in fp64, on as many rows and heads as are affordable."""
    batch, heads = affordable_heads(cell, mechanism)
    row_bytes = 8 * batch * heads * cell.length
    strips = sampled_strips(cell.length, strips=max(2, min(8, LARGEST_MATRIX // (8 * row_bytes))))

    def checked(x: Tensor) -> Tensor:
        return x[:batch, :heads]

    some = Contender(contender.forward, contender.leaves, mechanism, checked)
    like = checked(inputs[2].detach())
    cotangent = None if cell.work == FORWARD else sparse_cotangent(like, strips)
    exact = Exact(mechanism, [checked(x) for x in inputs], strips, cotangent)
    return errors(some, exact, strips, cotangent)


def affordable_heads(cell: Cell, mechanism: Mechanism) -> tuple[int, int]:
    """Rows of the batch and heads to check: all, or the first of each where the copies in fp64 would be too large."""
    copies = 3 * 8 * cell.batch * cell.heads * cell.length * cell.head_dim
    if copies <= LARGEST_COPY:
        return cell.batch, cell.heads
    return 1, 1 if mechanism.num_kv_heads is None else cell.heads


def judged(result: dict[str, Any], seconds: list[float]) -> Outcome:
    """OK, or UNSTABLE where the samples lie far apart."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    result["spread"] = spread = (high - low) / median
    if spread > UNSTABLE_SPREAD:
        return Outcome(UNSTABLE, f"half of {len(seconds)} samples span {spread:.0%} of the median", result)
    return Outcome(OK, "", result)


def _declared(cell: Cell, mechanism: Mechanism) -> dict[str, int]:
    """What `cost` says of this call, for whoever holds it against the measurement."""
    sizes = cell.batch, cell.heads, cell.length, cell.length, cell.head_dim
    training = cell.work != FORWARD
    cost = mechanism.cost(Shape(*sizes, dtype=getattr(torch, cell.dtype)), training=training)
    moved = cost.bytes_read + cost.bytes_written
    return {"flops": cost.flops.total, "bytes": moved, "peak_bytes": cost.peak_bytes}
