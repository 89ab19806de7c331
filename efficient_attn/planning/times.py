"""How long a call takes, at least."""

from __future__ import annotations

from dataclasses import dataclass

from ..complexity import Cost
from ..layers import Attention
from .costs import model_cost
from .devices import Device
from .models import Model, as_model


@dataclass(frozen=True)
class TimeEstimate:
    """The answer of `estimate_time`.

    Attributes:
        seconds: of the call: the sum of `parts`.
        parts: seconds by part; each takes the longer of its FLOPs and its traffic.
        bound_by: "compute" or "traffic", by part.
        kind: "lower bound" on a datasheet's peaks, "estimate" on measured rates.
        provenance: the device, its source, and what was counted.
    """

    seconds: float
    parts: dict[str, float]
    bound_by: dict[str, str]
    kind: str
    provenance: str


def estimate_time(
    model: Model | Attention,
    device: Device,
    *,
    batch: int = 1,
    seq_len: int,
    training: bool = False,
    checkpointing: bool = False,
    phase: str = "prefill",
) -> TimeEstimate:
    """A roofline: each part takes max(FLOPs / peak FLOP/s, bytes / bandwidth), one part after another.

    FLOPs are those of the basis "model", recomputation of checkpointing included; bytes are the least traffic, each
    tensor once. A backward pass is twice the traffic of its forward pass: it reads what that read and wrote, and the
    gradients of what it wrote, and writes those of what it read. On a datasheet's peaks this is a lower bound.
    Williams et al., "Roofline", 2009, doi:10.1145/1498765.1498785.

    Args:
        model: a description, or an `Attention` layer, alone.
        device: rates; see `DEVICES` and `calibrate`.
        batch, seq_len, training, checkpointing, phase: as for `model_cost`.
    Raises:
        ValueError: as `model_cost` raises it.
        TypeError: if device is no Device.
    """
    if not isinstance(device, Device):
        raise TypeError(f"device must be a planning.Device, got {type(device).__name__}")
    described = as_model(model)
    cost = model_cost(
        described, batch, seq_len,
        training=training, checkpointing=checkpointing, phase=phase, device_type=device.type,
    )  # fmt: skip
    rates = _rates(described, device, seq_len)
    seconds, bound_by = {}, {}
    for name, part in cost.parts.items():
        flops = part.flops.total
        compute = flops / (rates if name == "attention" else device.flops_per_second)
        traffic = _passes(part, training) * part.traffic / device.bytes_per_second
        seconds[name] = max(compute, traffic)
        bound_by[name] = "compute" if compute > traffic else "traffic"
    kind = "lower bound" if device.kind == "datasheet" else "estimate"
    provenance = (
        f"{device.name}: {device.source}; FLOPs in the basis 'model', least traffic, "
        f"{'forward and backward' if training else phase}"
    )
    return TimeEstimate(sum(seconds.values()), seconds, bound_by, kind, provenance)


def _passes(part: Cost, training: bool) -> int:
    """Forward passes that the traffic amounts to: a backward pass is two, and what is checkpointed runs again."""
    if not training:
        return 1
    return 3 + (part.flops.recompute > 0)


def _rates(model: Model, device: Device, seq_len: int) -> float:
    """FLOP/s of attention, the harmonic mean over the layers of what was measured for their mechanisms."""
    kinds = model.built_mechanisms(seq_len)
    peak, measured = device.flops_per_second, device.mechanism_flops_per_second
    total = sum(count for _, count in kinds)
    return total / sum(count / measured.get(type(m).__name__, peak) for m, count in kinds)
