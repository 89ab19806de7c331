"""One token at a time, after few and after many."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from ..mechanisms import Mechanism
from ..state import State
from .cells import Cell
from .gate import is_wrong
from .inputs import normal_inputs
from .instruments import INSTRUMENTS
from .records import OK, WRONG
from .timing import EFFORTS, Sampler, interleaved, ratio
from .worker import Outcome

FILL = 2048
STEPS = 16
"""Tokens of one sample; the state is put back between samples, outside the clock."""


def measure_decode(cell: Cell, mechanism: Mechanism) -> Outcome:
    """Seconds of a token at each of the cell's positions, interleaved, and how many times those of the first."""
    mechanism, positions = mechanism.to(cell.device), sorted(cell.positions)
    token = normal_inputs(cell, 1, seed=1)
    with torch.no_grad():
        states, found = {}, {}
        for position, state, keys, values in _filled(mechanism, cell, positions):
            states[position] = state
            found[f"at {position}"] = _error(mechanism, state, token, keys, values)
        samplers = {str(p): _stepping(mechanism, state, token, cell.device) for p, state in states.items()}
        a_round = STEPS * sum(sampler() for sampler in samplers.values())
        samples = interleaved(samplers, EFFORTS[cell.effort].rounds(a_round))
    first = samples[str(positions[0])]
    result = {
        "what": " ".join(str(mechanism).split()),
        "errors": found,
        "positions": {
            name: {
                "seconds": [float(f"{s:.5g}") for s in each],
                "ratio": asdict(ratio(each, first)),
                "state_bytes": states[int(name)].nbytes,
            }
            for name, each in samples.items()
        },
    }
    if is_wrong(found, token[0].dtype):
        return Outcome(WRONG, f"ours is wrong: {found}", result)
    return Outcome(OK, "", result)


def _filled(
    mechanism: Mechanism, cell: Cell, positions: list[int]
) -> Iterator[tuple[int, State, Tensor, Tensor]]:
    """For each position the state by then, stepped there in chunks, and the keys and values of its first head."""
    state = mechanism.init_state(
        cell.batch, cell.heads, cell.head_dim, dtype=getattr(torch, cell.dtype), device=cell.device
    )
    keys, values, seen = [], [], 0
    for position in positions:
        while seen < position:
            q, k, v = normal_inputs(cell, min(FILL, position - seen), seed=2 + seen)
            _, state = mechanism.step(q, k, v, state)
            keys.append(k[:, :1])
            values.append(v[:, :1])
            seen += k.shape[2]
        yield position, state.clone(), torch.cat(keys, 2), torch.cat(values, 2)


def _stepping(mechanism: Mechanism, state: State, token: tuple[Tensor, ...], device: str) -> Sampler:
    q, k, v = token
    synchronize = INSTRUMENTS[device].synchronize

    def sample() -> float:
        # The first token after a clone copies a state that grows into a buffer with room for more.
        _, current = mechanism.step(q, k, v, state.clone())
        synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            _, current = mechanism.step(q, k, v, current)
        synchronize()
        return (time.perf_counter() - began) / STEPS

    return sample


def _error(
    mechanism: Mechanism, state: State, token: tuple[Tensor, ...], keys: Tensor, values: Tensor
) -> float:
    """Of the next token's first head, relative to the definition in fp64."""
    q, k, v = token
    stepped, _ = mechanism.step(q, k, v, state.clone())
    all_keys, all_values = torch.cat([keys, k[:, :1]], 2).double(), torch.cat([values, v[:, :1]], 2).double()
    weights = copy.deepcopy(mechanism).double().matrix(q[:, :1].double(), all_keys)
    exact = weights @ all_values
    return float((stepped[:, :1].double() - exact).norm() / exact.norm())
