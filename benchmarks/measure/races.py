"""Ours against a peer on the same inputs: first whether both are right, then how long they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.cells import BACKWARD, FORWARD, Cell
from benchmarks.harness.records import OK, WRONG
from benchmarks.harness.worker import Outcome
from benchmarks.peers import OWN_FORWARD, PEERS, Contender, Race
from benchmarks.peers.contender import Definition
from benchmarks.subjects import subject

from .gate import Exact, errors, is_wrong, sampled_strips, sparse_cotangent
from .inputs import normal_inputs
from .instruments import INSTRUMENTS
from .timing import EFFORTS, interleaved, ratio, warmed_up

SHARE = "the share of the forward pass in forward and backward; 0.25 is 4 times as long"


def measure_race(cell: Cell) -> Outcome:
    """How many times as long the peer takes, with everything that one needs to believe it."""
    mechanism = subject(cell)
    given = Race(cell, mechanism, *normal_inputs(cell, grad=cell.work != FORWARD))
    ours = ours_in(given)
    peer = ours if cell.peer == OWN_FORWARD else PEERS[cell.peer](given)
    peer_work = FORWARD if cell.peer == OWN_FORWARD else cell.work

    found = gate(given, {"ours": ours} if peer is ours else {"ours": ours, cell.peer: peer})
    wrong = [name for name, error in found.items() if is_wrong(error, given.q.dtype)]

    times = times_of(cell, {"ours": work_of(ours, cell.work), "peer": work_of(peer, peer_work)})
    sides = {
        "ours": {
            "what": " ".join(str(mechanism).split()),
            "backend": backend_of(mechanism.explain(*given.inputs)),
            "errors": plain(found["ours"]),
            "seconds": times["ours"],
        },
        "peer": {
            "what": cell.peer,
            "remark": SHARE if peer is ours else peer.remark,
            "errors": plain(found.get(cell.peer, {})),
            "seconds": times["peer"],
        },
    }
    result = {"ratio": asdict(ratio(times["peer"], times["ours"])), "wrong": wrong, **sides}
    reason = "; ".join(f"{name} is wrong: {said(found[name])}" for name in wrong)
    return Outcome(WRONG if wrong else OK, reason, result)


def gate(
    given: Race, contenders: dict[str, Contender], strips: list[slice] | None = None
) -> dict[str, dict[str, float]]:
    """Each contender's relative errors, held against the definition of what it says that it computes."""
    strips = sampled_strips(given.cell.length) if strips is None else strips
    cotangent = sparse_cotangent(given.v.detach(), strips) if given.cell.work != FORWARD else None
    exact: dict[Definition, Exact] = {}
    found = {}
    for name, contender in contenders.items():
        what = contender.computes
        if what not in exact:
            exact[what] = Exact(what, contender.given or given.inputs, strips, cotangent)
        found[name] = errors(contender, exact[what], strips, cotangent)
    return found


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


def ours_in(given: Race) -> Contender:
    mechanism = given.mechanism
    leaves = (*given.inputs, *mechanism.parameters())
    return Contender(lambda: mechanism(*given.inputs), leaves, mechanism)


def times_of(cell: Cell, works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    samplers, seconds_a_round, effort = {}, 0.0, EFFORTS[cell.effort]
    for name, work in works.items():
        samplers[name], seconds = warmed_up(work, INSTRUMENTS[cell.device].clock, effort.warm_up)
        seconds_a_round += seconds
    samples = interleaved(samplers, effort.rounds(seconds_a_round))
    return {name: [float(f"{s:.5g}") for s in each] for name, each in samples.items()}


def plain(found: dict[str, float]) -> dict[str, Any]:
    return {name: error if math.isfinite(error) else None for name, error in found.items()}


def said(found: dict[str, float]) -> str:
    return ", ".join(f"{name} off by {error:.2g}" for name, error in found.items())
