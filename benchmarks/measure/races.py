"""Ours against a peer on the same inputs: first whether both are right, then how long they take."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.peers import OWN_FORWARD, PEERS, Contender, Race
from benchmarks.subjects import subject
from efficient_attn.benchmarking.cells import FORWARD, Cell
from efficient_attn.benchmarking.contender import Definition, backend_of, contender_of, work_of
from efficient_attn.benchmarking.gate import (
    Exact,
    errors,
    is_wrong,
    plain,
    said,
    sampled_strips,
    sparse_cotangent,
)
from efficient_attn.benchmarking.inputs import normal_inputs
from efficient_attn.benchmarking.instruments import times_of
from efficient_attn.benchmarking.records import OK, WRONG
from efficient_attn.benchmarking.timing import ratio
from efficient_attn.benchmarking.worker import Outcome

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


def ours_in(given: Race) -> Contender:
    """Our side."""
    return contender_of(given.mechanism, given.inputs)
