"""Measures one cell of a GPU run, in the worker: time, memory and the distance to the roofline.

Nothing here knows which device it runs on, so a dry run on a CPU goes the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import PEERS, Contender, Race
from benchmarks.subjects import subject
from efficient_attn import Mechanism
from efficient_attn.benchmarking.cells import CAPACITY, DECODE, FORWARD, RACES, TABLES, TUNE, Cell
from efficient_attn.benchmarking.contender import backend_of, work_of
from efficient_attn.benchmarking.decode import measure_decode
from efficient_attn.benchmarking.gate import Exact, is_wrong, plain, said, sampled_strips
from efficient_attn.benchmarking.inputs import normal_inputs
from efficient_attn.benchmarking.instruments import INSTRUMENTS, times_of
from efficient_attn.benchmarking.records import OK, WRONG
from efficient_attn.benchmarking.timing import EFFORTS, ratio
from efficient_attn.benchmarking.worker import Outcome, Unsupported, failed

from .races import gate, ours_in
from .roofline import roofline, unavoidable
from .tuning import TIMED_BY, measure_tuning

OURS = "ours"
WHOLE = 4096
"""Up to this length every row is compared with fp64."""
SAMPLED_ROWS, ROWS_OF_A_STRIP = 256, 8
SHARE_OF_MEMORY = 32
"""The definition in fp64 holds some ten matrices of the size that this part of the free memory has room for."""
LARGEST_MATRIX = 1 << 31
WORSE = 1.5
"""Times a right peer's error, from which ours, in half precision, is too large to be compared by speed."""
GRAPH_BELOW = 5e-4
"""Seconds below which Python may be what is measured, so that a graph is timed, too."""


class Stopped(Exception):
    """One side failed: `outcome` says which and how."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


def measure(cell: Cell) -> Outcome:
    """The outcome of `cell`. Raises Unsupported where it cannot be measured here."""
    torch.set_num_threads(cell.threads)
    try:
        if cell.work in RACES:
            return measure_pass(cell)
        if cell.work == CAPACITY:
            return measure_capacity(cell)
        if cell.work == TABLES:
            return measure_tables(cell)
        if cell.work == TUNE:
            return measure_tuning(cell, TIMED_BY[cell.peer][1])
    except Stopped as stopped:
        return stopped.outcome
    if cell.work == DECODE:
        return measure_decode(cell, subject(cell))
    raise ValueError(f"work of a cell must be one that is measured, got {cell.work!r}")


def measure_pass(cell: Cell) -> Outcome:
    """Ours, against the peer if the cell has one: gate, times in turns, peak bytes, fraction of the roofline."""
    mechanism = prepared_subject(cell)
    roof = roofline(cell.device, cell.dtype)
    given = Race(cell, mechanism, *normal_inputs(cell, grad=cell.work != FORWARD))
    sides: dict[str, dict[str, Any]] = {}
    contenders: dict[str, Contender] = {}
    for name, build in _builders(cell).items():
        with blamed(name):
            contenders[name], sides[name] = _built(build, given)
    sides[OURS] |= {
        "what": " ".join(str(mechanism).split()),
        "backend": backend_of(mechanism.explain(*given.inputs)),
    }
    strips, found = strips_of(cell), {}
    for name, contender in contenders.items():
        with blamed(name):
            found |= gate(given, {name: contender}, strips)
    reasons = wrong_ones(found, getattr(torch, cell.dtype), _same(contenders))

    works: dict[str, Callable[[], object]] = {}
    for name, contender in contenders.items():
        with blamed(name):
            works[name] = work_of(contender, cell.work)
            sides[name]["peak_bytes"] = INSTRUMENTS[cell.device].peak_bytes(works[name])
    times = times_of(cell, works)
    for name, side in sides.items():
        side |= {"errors": plain(found[name]), "seconds": times[name]}
    result: dict[str, Any] = {
        "wrong": list(reasons),
        "ours": sides[OURS],
        "roofline": _judged(cell, mechanism),
    }
    result["inputs_bytes"] = sum(x.nbytes for x in given.inputs)
    if cell.peer:
        result["peer"] = sides[cell.peer]
        result["ratio"] = asdict(ratio(times[cell.peer], times[OURS]))
    floor = result["roofline"]["floor_seconds"]
    result["roofline"] |= {"fraction": floor / median(times[OURS]), **asdict(roof)}
    outcome = Outcome(WRONG if reasons else OK, "; ".join(reasons.values()), result)
    if cell.work == FORWARD and min(map(min, times.values())) < GRAPH_BELOW:
        _add_graphs(cell, works, outcome)
    return outcome


def prepared_subject(cell: Cell) -> Mechanism:
    """The mechanism that `cell` measures, on its device, parameters in its dtype as in a model cast to it."""
    return subject(cell).to(device=cell.device, dtype=getattr(torch, cell.dtype))


def strips_of(cell: Cell) -> list[slice]:
    """The rows to compare with fp64: all of a short sequence, 256 of a long one, fewer where memory is short."""
    memory = min(LARGEST_MATRIX, INSTRUMENTS[cell.device].free_bytes() // SHARE_OF_MEMORY)
    affordable = memory // (8 * cell.batch * cell.heads * cell.length)
    if cell.length <= min(WHOLE, affordable):
        return [slice(0, cell.length)]
    strips = max(2, min(SAMPLED_ROWS, affordable) // ROWS_OF_A_STRIP)
    return sampled_strips(cell.length, strips, ROWS_OF_A_STRIP)


def wrong_ones(
    found: dict[str, dict[str, float]], dtype: torch.dtype, comparable: bool = True
) -> dict[str, str]:
    """Why each wrong side is wrong: beyond rounding, or, for ours, beyond the rounding of a right peer."""
    reasons = {
        name: f"{name} is wrong: {said(error)}" for name, error in found.items() if is_wrong(error, dtype)
    }
    peers = [name for name in found if name != OURS and name not in reasons]
    if OURS in reasons or not peers or not comparable or dtype == torch.float32:
        return reasons
    theirs = found[peers[0]]
    worse = {kind: error for kind, error in found[OURS].items() if error > WORSE * theirs[kind]}
    if worse:
        reasons[OURS] = f"ours rounds worse than {peers[0]} ({said(theirs)}): {said(worse)}"
    return reasons


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """What fails inside is the failure of this side of the race."""
    try:
        yield
    except (Unsupported, Stopped):
        raise
    except Exception as error:
        raise Stopped(failed(error, name)) from None


def _builders(cell: Cell) -> dict[str, Callable[[Race], Contender]]:
    peers = {cell.peer: PEERS[cell.peer]} if cell.peer else {}
    return {OURS: ours_in, **peers}


def _built(build: Callable[[Race], Contender], given: Race) -> tuple[Contender, dict[str, Any]]:
    """The contender, with what it cost to prepare: masks, tables, layouts, and the first call that compiles."""
    instruments = INSTRUMENTS[given.cell.device]
    before, began = instruments.held_bytes(), time.perf_counter()
    contender = build(given)
    with torch.set_grad_enabled(given.cell.work != FORWARD):
        contender.forward()
    instruments.synchronize()
    seconds = time.perf_counter() - began
    side = {"remark": contender.remark, "prepared_seconds": seconds}
    return contender, side | {"prepared_bytes": instruments.held_bytes() - before}


def _same(contenders: dict[str, Contender]) -> bool:
    """Whether all compute the same thing, so that their rounding can be compared."""
    return len({id(contender.computes) for contender in contenders.values()}) == 1


def _judged(cell: Cell, mechanism: Mechanism) -> dict[str, Any]:
    work, roof = unavoidable(cell, mechanism), roofline(cell.device, cell.dtype)
    return {"flops": work.flops, "bytes": work.bytes, "floor_seconds": work.floor(roof)}


def _add_graphs(cell: Cell, works: dict[str, Callable[[], object]], outcome: Outcome) -> None:
    """The same race between graphs. A capture that fails leaves a process in which nothing more is measured."""
    try:
        replays = {name: INSTRUMENTS[cell.device].captured(work) for name, work in works.items()}
        times = times_of(cell, replays)
    except Unsupported:
        return
    except Exception as error:
        outcome.result["graph"] = {"reason": failed(error).reason}
        outcome.spent = True
        return
    outcome.result["graph"] = {"seconds": times}
    if cell.peer:
        outcome.result["graph"]["ratio"] = asdict(ratio(times[cell.peer], times[OURS]))


def measure_tables(cell: Cell) -> Outcome:
    """Seconds that the block tables of a mask take to be built, once for all calls, over those of a forward pass."""
    mechanism, instruments = prepared_subject(cell), INSTRUMENTS[cell.device]
    inputs = normal_inputs(cell)
    backend = backend_of(mechanism.explain(*inputs))
    if backend != "triton":
        raise Unsupported(f"tables are built for the kernels, and {backend} runs here")
    from efficient_attn.kernels.block_sparse.table import tables

    def forward() -> None:
        with torch.no_grad():
            mechanism(*inputs)
        instruments.synchronize()

    def seconds_of_call() -> float:
        began = time.perf_counter()
        forward()
        return time.perf_counter() - began

    forward()
    cold, warm = [], []
    for _ in range(EFFORTS[cell.effort].least):
        tables.cache_clear()
        cold.append(seconds_of_call())
        warm.append(seconds_of_call())
    forward_seconds = instruments.clock(forward, 1)
    built = max(0.0, median(cold) - median(warm))
    share = built / forward_seconds
    return Outcome(result={"built_seconds": built, "forward_seconds": forward_seconds, "table_share": share})


def measure_capacity(cell: Cell) -> Outcome:
    """One forward and backward pass over a very long sequence, alone in its process: does it go, and in how much?

    `peak_ratio` is the peak, inputs included, over inputs, output and all gradients, that of the output among them.
    """
    instruments = INSTRUMENTS[cell.device]
    mechanism = prepared_subject(cell)
    inputs = normal_inputs(cell, grad=True)
    kept: list[Tensor] = []

    def work() -> None:
        kept.clear()
        out = mechanism(*inputs)
        leaves = (*inputs, *mechanism.parameters())
        kept.extend([out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))])

    with blamed(OURS):
        peak = instruments.peak_bytes(work)
        seconds = instruments.clock(work, 1)
    finite = all(bool(torch.isfinite(x).all()) for x in kept)
    strips = sampled_strips(cell.length, strips=4, rows=2)
    exact = Exact(mechanism, [x[:, :1] for x in inputs], strips).output
    rows = torch.cat([kept[0][:, :1, s] for s in strips], 2).double()
    error = float((rows - exact).norm() / exact.norm())
    given = sum(x.nbytes for x in inputs)
    least = given + kept[0].nbytes + sum(x.nbytes for x in kept)
    result = {
        "what": " ".join(str(mechanism).split()),
        "backend": backend_of(mechanism.explain(*inputs)),
        "seconds": seconds,
        "error": error if finite else None,
        "inputs_bytes": given,
        "peak_bytes": peak,
        "peak_ratio": (given + peak) / least,
    }
    if not finite or is_wrong({"output": error}, inputs[0].dtype):
        return Outcome(WRONG, f"ours is wrong: output off by {error:.2g}, finite: {finite}", result)
    return Outcome(OK, "", result)
