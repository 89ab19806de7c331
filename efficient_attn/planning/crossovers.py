"""The length from which one mechanism is cheaper than another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..complexity import Cost, Flops, Shape
from ..complexity.cost import BASES, check_choice
from ..inputs import check_flag, check_positive
from ..mechanisms import Mechanism
from .costs import planned_backend
from .devices import Device
from .models import RECURRENT_GATES, MechanismLike, Model, Recurrent
from .shares import path_length

METRICS = (
    "flops", "training_flops", "saved_bytes", "peak_bytes", "state_bytes", "decode_flops", "decode_bytes",
    "sequential_steps", "path_length", "seconds",
)  # fmt: skip
GRID = 1.5
"""The largest ratio of two lengths that are tried one after the other."""


@dataclass(frozen=True)
class Crossover:
    """The answer of `crossover`.

    Attributes:
        length: from here on `b` costs no more than `a`; None if `a` is still cheaper at the last length tried.
        at_length: the metric of `a` and of `b` at `length`, or at the last length tried.
        metric: which one.
    """

    length: int | None
    at_length: tuple[float, float]
    metric: str


def crossover(
    a: MechanismLike | Recurrent,
    b: MechanismLike | Recurrent,
    metric: str = "flops",
    *,
    model: Model,
    projections: bool = False,
    basis: str = "model",
    device: Device | None = None,
    at_most: int = 2**20,
) -> Crossover:
    """The smallest length from which on, up to `at_most`, a layer with `b` costs no more than one with `a`.

    Lengths are tried on a grid with steps of at most a half, then bisected between the last point where `a` is
    cheaper and the next: a dip between two points of the grid is not seen.

    Args:
        a, b: a mechanism, by name, MechanismSpec or itself; or a Recurrent layer, which always counts W_x and W_h.
        metric: one of METRICS. "decode_bytes" are those that one more token reads and writes at the least; "seconds"
            needs `device`.
        model: whose width and heads the layer has.
        projections: whether a mechanism is counted with its four projections: in FLOPs, bytes and seconds.
        basis: in which FLOPs are counted.
        device: for "seconds".
        at_most: the last length tried; less where a mechanism takes fewer tokens.
    Raises:
        ValueError: for an unknown metric, "seconds" without a device, or decoding that does not exist.
    """
    check_choice("metric", metric, METRICS)
    check_choice("basis", basis, BASES)
    check_positive("at_most", at_most)
    check_flag("projections", projections)
    if metric == "seconds" and not isinstance(device, Device):
        raise ValueError(f"device must be a Device for the metric 'seconds', got {device!r}")
    layers = [_Layer(each, model, projections, basis, device) for each in (a, b)]
    last = min([at_most, *(layer.longest for layer in layers if layer.longest is not None)])

    def dearer(length: int) -> bool:
        return layers[1].measure(metric, length) > layers[0].measure(metric, length)

    length = _first_after(dearer, last)
    shown = last if length is None else length
    return Crossover(length, (layers[0].measure(metric, shown), layers[1].measure(metric, shown)), metric)


def _first_after(holds: Callable[[int], bool], last: int) -> int | None:
    """The first length after the last one at which `holds`; None if that is `last`."""
    grid = [1]
    while grid[-1] < last:
        grid.append(min(last, max(grid[-1] + 1, int(grid[-1] * GRID))))
    held = [i for i, length in enumerate(grid) if holds(length)]
    if not held:
        return 1
    if held[-1] == len(grid) - 1:
        return None
    low, high = grid[held[-1]], grid[held[-1] + 1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


@dataclass(frozen=True)
class _Layer:
    """One side of a comparison."""

    kind: MechanismLike | Recurrent
    model: Model
    projections: bool
    basis: str
    device: Device | None

    @property
    def longest(self) -> int | None:
        """The most tokens that it takes, if it was built for so many."""
        return self.kind.max_seq_len if isinstance(self.kind, Mechanism) else None

    def measure(self, metric: str, length: int) -> float:
        """The metric of one layer on one sequence of `length` tokens."""
        if metric in ("sequential_steps", "path_length"):
            path = path_length(self.kind, length, model=self.model)
            return path.sequential_steps if metric == "sequential_steps" else path.longest
        decode, training = metric.startswith("decode"), metric in ("training_flops", "saved_bytes")
        cost = self._recurrent(length, decode, training) if isinstance(self.kind, Recurrent) else None
        if cost is None:
            cost = self._attention(length, decode, training)
        if metric == "seconds":
            assert self.device is not None
            return max(
                cost.flops.total / self.device.flops_per_second, cost.traffic / self.device.bytes_per_second
            )
        if metric in ("flops", "decode_flops", "training_flops"):
            return cost.flops.total
        return cost.traffic if metric == "decode_bytes" else getattr(cost, metric)

    def _attention(self, length: int, decode: bool, training: bool) -> Cost:
        assert not isinstance(self.kind, Recurrent)
        model = self.model
        mechanism = model.build(self.kind, length)
        shape = Shape(
            1, model.num_heads, 1 if decode else length, length, model.head_dim,
            num_kv_heads=model.num_kv_heads, dtype=model.dtype,
        )  # fmt: skip
        phase = "decode" if decode else "prefill"
        device_type = "cpu" if self.device is None else self.device.type
        backend = planned_backend(mechanism, device_type, model.dtype, model.head_dim)
        cost = mechanism.cost(shape, training=training, phase=phase, basis=self.basis, backend=backend)
        for name, in_features, out_features in model.projection_sizes if self.projections else ():
            cost += Cost.of_product(
                name, shape.q_len, in_features, out_features,
                bias=model.bias, itemsize=model.dtype.itemsize, training=training,
            )  # fmt: skip
        return cost

    def _recurrent(self, length: int, decode: bool, training: bool) -> Cost:
        """W_x and W_h for each gate, d x d each; kept are the inputs, gates and states of every step."""
        assert isinstance(self.kind, Recurrent)
        width, item = self.model.embed_dim, self.model.dtype.itemsize
        gates, cells = RECURRENT_GATES[self.kind.kind], 2 if self.kind.kind == "lstm" else 1
        tokens = 1 if decode else length
        cost = Cost(Flops(0))
        for name in ("input", "recurrent"):
            cost += Cost.of_product(
                name, tokens, width, gates * width, bias=self.model.bias, itemsize=item, training=training
            )
        row = width * item
        return replace(
            cost,
            saved_bytes=tokens * row * (1 + gates + cells) * training,
            peak_bytes=tokens * row * (1 + gates + cells if training else 1 + gates),
            state_bytes=cells * row,
        )
