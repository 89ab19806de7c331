"""Peak memory of a training step, and whether very long sequences go through at all."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.subjects import subject
from efficient_attn import Mechanism
from efficient_attn.benchmarking.allocations import peak_allocated
from efficient_attn.benchmarking.cells import CAPACITY, Cell
from efficient_attn.benchmarking.gate import Exact, is_wrong, sampled_strips
from efficient_attn.benchmarking.inputs import normal_inputs
from efficient_attn.benchmarking.records import OK, WRONG
from efficient_attn.benchmarking.worker import Outcome

WARM_UP = 1024


def measure_memory(cell: Cell) -> Outcome:
    """Peak bytes of one forward and backward pass beyond the inputs: output, gradients and all in between.

    Twice: what the process had resident, which includes what malloc keeps, then what torch's allocator gave out.
    """
    mechanism = subject(cell)
    _training_step(mechanism, *normal_inputs(cell, min(WARM_UP, cell.length), seed=1, grad=True))
    inputs = normal_inputs(cell, grad=True)
    measured = peak_resident(lambda: _training_step(mechanism, *inputs))
    measured["allocated_bytes"] = peak_allocated(lambda: _training_step(mechanism, *inputs))
    measured["inputs_bytes"] = sum(x.nbytes for x in inputs)
    return Outcome(result=measured)


def measure_capacity(cell: Cell) -> Outcome:
    """One pass over a very long sequence: seconds, peak bytes, and a few of its rows against the definition."""
    mechanism = subject(cell)
    inputs = normal_inputs(cell, grad=cell.work == CAPACITY)
    outputs: list[Tensor] = []

    def work() -> None:
        if cell.work == CAPACITY:
            outputs.extend(_training_step(mechanism, *inputs))
        else:
            with torch.no_grad():
                outputs.append(mechanism(*inputs))

    began = time.perf_counter()
    measured = peak_resident(work)
    measured["seconds"] = time.perf_counter() - began
    finite = all(bool(torch.isfinite(x).all()) for x in outputs)
    strips = sampled_strips(cell.length, strips=4, rows=2)
    one_head = Exact(mechanism, [x[:, :1] for x in inputs], strips).output
    rows = torch.cat([outputs[0][:, :1, s] for s in strips], 2).double()
    error = float((rows - one_head).norm() / one_head.norm())
    measured |= {"error": error if finite else None, "inputs_bytes": sum(x.nbytes for x in inputs)}
    if not finite or is_wrong({"output": error}, inputs[0].dtype):
        return Outcome(WRONG, f"ours is wrong: output off by {error:.2g}, finite: {finite}", measured)
    return Outcome(OK, "", measured)


def peak_resident(work: Callable[[], object]) -> dict[str, Any]:
    """The most bytes that this process held during `work`, beyond those that it held before."""
    gc.collect()
    before = _status_bytes("VmRSS")
    if before is not None and _reset_high_water():
        work()
        return {
            "resident_bytes": max(0, (_status_bytes("VmHWM") or 0) - before),
            "resident_is": "VmHWM - VmRSS before",
        }
    before = _max_rss()
    work()
    return {"resident_bytes": _max_rss() - before, "resident_is": "growth of ru_maxrss"}


def _training_step(mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The output and every gradient, all alive at once, as in a real step."""
    out = mechanism(q, k, v)
    leaves = (q, k, v, *mechanism.parameters())
    gradients = torch.autograd.grad(out, leaves, torch.randn_like(out))
    return [out.detach(), *gradients]


def _status_bytes(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _reset_high_water() -> bool:
    """Make VmHWM start again from what is resident now. Linux only, and containers may forbid it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _max_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
