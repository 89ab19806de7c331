"""How long a call takes, at least."""

from __future__ import annotations

from dataclasses import dataclass

from ..layers import Attention
from .devices import Device
from .models import Model


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
    raise NotImplementedError
