"""The length from which one mechanism is cheaper than another."""

from __future__ import annotations

from dataclasses import dataclass

from .devices import Device
from .models import MechanismLike, Model, Recurrent

METRICS = (
    "flops", "training_flops", "saved_bytes", "peak_bytes", "state_bytes", "decode_flops", "decode_bytes",
    "sequential_steps", "path_length", "seconds",
)  # fmt: skip


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
    cheaper and the next.

    Args:
        a, b: a mechanism, by name, MechanismSpec or itself; or a Recurrent layer, which always counts W_x and W_h.
        metric: one of METRICS. "decode_bytes" are those that one more token reads and writes at the least; "seconds"
            needs `device`.
        model: whose width and heads the layer has.
        projections: whether a mechanism is counted with its four projections.
        basis: in which FLOPs are counted.
        device: for "seconds".
        at_most: the last length tried.
    Raises:
        ValueError: for an unknown metric, or "seconds" without a device.
    """
    raise NotImplementedError
