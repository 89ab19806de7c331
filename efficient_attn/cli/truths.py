"""Claims held against what is counted and measured here, one mechanism at a time."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..benchmarking.timing import interleaved, warmed_up
from ..complexity import Shape
from ..mechanisms import Mechanism, SoftmaxMechanism
from ..ops.costs import register_flop_formulas
from ..testing.counting import count, peak_bytes, saved_bytes
from ..testing.sampling import EQUAL, in_dtype, sample

COUNTED, MEASURED, ADVISORY = "counted", "measured", "measured, advisory"
GROWTH = 0.05
"""How far an exponent of exact counts may lie from the declared one: lower-order terms."""
LOOSEST = 4.0
"""How many times what is allocated a peak may be declared to be, which is a bound."""
FAR = (1 << 14, 1 << 16)
TIMED = (1024, 4096)


@dataclass(frozen=True)
class Truth:
    """One claim and what was found.

    Args:
        what: is claimed.
        claimed, found: numbers, equal but for `tolerance`.
        how: COUNTED, MEASURED, or ADVISORY, which is shown and never a failure.
        unit: of both.
        bound: `claimed` is no less than `found`, and at most so many times it.
    """

    what: str
    claimed: float
    found: float
    how: str
    unit: str = ""
    tolerance: float = 0.0
    bound: float | None = None

    @property
    def holds(self) -> bool:
        if self.bound is not None:
            return self.found <= self.claimed <= self.bound * self.found
        return self.how == ADVISORY or abs(self.claimed - self.found) <= self.tolerance


def truths(mechanism: Mechanism, length: int) -> list[Truth]:
    """Everything that can be held against this machine, at `length` tokens where it has one."""
    m = in_dtype(mechanism, torch.float32)
    m.backend = m._default_backend()
    return [*_flops(m, length), *_bytes(m, length), *_growth(m)]


def _inputs(m: Mechanism, length: int, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return sample(m, length, dtype=torch.float32, grad=grad, v_head_dim=EQUAL, batch=1)


def _shape(inputs: tuple[Tensor, Tensor, Tensor]) -> Shape:
    q, k, _ = inputs
    return Shape(
        len(q), q.shape[1], q.shape[2], k.shape[2], q.shape[3], num_kv_heads=k.shape[1], dtype=torch.float32
    )


def _flops(m: Mechanism, length: int) -> Iterator[Truth]:
    inputs = _inputs(m, length)
    shape = _shape(inputs)
    if isinstance(m, SoftmaxMechanism):
        q, k, _ = inputs
        pairs = int((m.matrix(q.detach(), k.detach()) > 0).sum())
        each = 2 * (shape.head_dim + shape.v_head_dim)
        yield Truth("FLOPs forward: pairs of the matrix", m.cost(shape).flops.forward, pairs * each, COUNTED)
    flops = m.cost(shape, training=True, basis="hardware").flops
    # torch's unfused attention, which can be looked into, recomputes nothing, where its fused kernels do.
    whole = flops.total - flops.recompute if m.backend == "sdpa" else flops.total
    yield Truth(
        "FLOPs forward: products of the backend", flops.forward, count(lambda: m(*inputs)).flops, COUNTED
    )
    counted = count(lambda: m(*inputs).sum().backward()).flops
    yield Truth("FLOPs of a training step: products of the backend", whole, counted, COUNTED)
    register_flop_formulas()
    on_meta, meta = copy.deepcopy(m).to("meta"), [x.detach().to("meta") for x in inputs]
    with FlopCounterMode(display=False) as counter:
        on_meta(*meta)
    declared = m.cost(shape, basis="torch").flops.forward
    yield Truth("FLOPs forward: torch's FlopCounterMode", declared, counter.get_total_flops(), COUNTED)


def _bytes(m: Mechanism, length: int) -> Iterator[Truth]:
    inputs = _inputs(m, length)
    cost = m.cost(_shape(inputs), training=True)
    others = (*m.parameters(), *m.buffers())
    kept = saved_bytes(lambda: m(*inputs), besides=others)
    yield Truth("bytes kept for the backward pass", cost.saved_bytes, kept, MEASURED, "B")
    if m.is_causal:
        q, k, v = (x.detach() for x in inputs)
        state = m.init_state(len(k), k.shape[1], k.shape[3], dtype=torch.float32)
        _, state = m.step(q, k, v, state)
        yield Truth("bytes of decode state", cost.state_bytes, state.nbytes, MEASURED, "B")
    peak = peak_bytes(m, inputs, [*others])
    yield Truth("peak bytes of a training step, at most", cost.peak_bytes, peak, MEASURED, "B", bound=LOOSEST)


def _growth(m: Mechanism) -> Iterator[Truth]:
    near, far = FAR if m.max_seq_len is None else (m.max_seq_len // 2, m.max_seq_len)
    degree = m.complexity.degree("time")
    shapes = {n: Shape(1, m.num_kv_heads or 4, n, n, m.head_dim or 8) for n in (near, far)}
    flops = {n: m.cost(shape).flops.forward for n, shape in shapes.items()}
    grown = math.log(flops[far] / flops[near]) / math.log(far / near)
    yield Truth("exponent of time: of the exact count", degree, grown, COUNTED, tolerance=GROWTH)
    lengths = [min(n, m.max_seq_len or n) for n in TIMED]
    if lengths[0] == lengths[1]:
        return
    took = seconds(m, lengths)
    slope = math.log(took[1] / took[0]) / math.log(lengths[1] / lengths[0])
    yield Truth(
        f"exponent of time: of seconds, {lengths[0]:,} to {lengths[1]:,} tokens", degree, slope, ADVISORY
    )


def seconds(m: Mechanism, lengths: list[int]) -> list[float]:
    """Of a forward pass at each length, in turns."""

    def forward(n: int) -> Callable[[], object]:
        inputs = _inputs(m, n, grad=False)
        return torch.no_grad()(lambda: m(*inputs))

    samplers = {str(n): warmed_up(forward(n), seconds=0.01)[0] for n in lengths}
    return [statistics.median(found) for found in interleaved(samplers, 5).values()]
