"""What `bench` measures: cells by mechanism, work and length, and what a worker does with one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..backends import BackendError
from ..benchmarking.alone import judged, measure_alone
from ..benchmarking.cells import DECODE, FORWARD, TRAINING, Cell
from ..benchmarking.decode import measure_decode
from ..benchmarking.gate import plain
from ..benchmarking.records import OK
from ..benchmarking.worker import Outcome, Unsupported
from ..mechanisms import Mechanism
from ..planning import MechanismSpec, Model
from .arguments import built, mechanism, spelled

WORKS = {"forward": FORWARD, "training": TRAINING, "decode": DECODE}
CAUSAL = " causal"
"""Ends the name of a subject that is causal."""
SECTION = "bench"


def cells_of(
    specs: Iterable[MechanismSpec], works: Iterable[str], lengths: Iterable[int], causal: bool, **sizes: Any
) -> list[Cell]:
    """Mechanism by mechanism, so that each has a process of its own, short lengths first."""
    cells = []
    for spec in specs:
        for work in works:
            subject = spelled(spec) + CAUSAL * (causal or work == DECODE)
            for n in lengths:
                positions = (n,) if work == DECODE else ()
                cells.append(Cell(SECTION, subject, work, n, positions=positions, **sizes))
    return cells


def spec_of(cell: Cell) -> MechanismSpec:
    """The mechanism that `cell` measures, by its name and options."""
    return mechanism(cell.subject.removesuffix(CAUSAL))


def layer_of_cell(cell: Cell) -> Model:
    """The layer that it belongs to."""
    width, causal = cell.heads * cell.head_dim, cell.subject.endswith(CAUSAL)
    return Model(1, width, cell.heads, head_dim=cell.head_dim, ffn_dim=0, is_causal=causal)


def mechanism_of(cell: Cell) -> Mechanism:
    """The mechanism that `cell` measures. Raises ValueError if it cannot be built for these sizes."""
    return built(spec_of(cell), layer_of_cell(cell), cell.length).eval()


def measure(cell: Cell) -> Outcome:
    """In the worker. Raises Unsupported where the mechanism does not take the cell's sizes or device."""
    torch.set_num_threads(cell.threads)
    torch.manual_seed(0)
    try:
        subject = mechanism_of(cell)
        return _decode(cell, subject) if cell.work == DECODE else measure_alone(cell, subject)
    except (BackendError, ValueError) as refusal:
        raise Unsupported(" ".join(str(refusal).split())) from refusal


def _decode(cell: Cell, subject: Mechanism) -> Outcome:
    """One position, in the form of the other works."""
    outcome = measure_decode(cell, subject)
    found = outcome.result.pop("positions").get(str(cell.length), {})
    found.pop("ratio", None)
    outcome.result |= {**found, "errors": plain(outcome.result["errors"])}
    return judged(outcome.result, found["seconds"]) if outcome.status == OK else outcome
