"""Where the FLOPs of a layer go, and how far information travels."""

from __future__ import annotations

from dataclasses import dataclass

from .models import MechanismLike, Model, Recurrent


@dataclass(frozen=True)
class LayerShares:
    """Parts of a layer's forward FLOPs; they sum to 1.

    Attributes:
        attention: of the mechanism.
        projections: of queries, keys, values and output.
        ffn: of the feed-forward network.
    """

    attention: float
    projections: float
    ffn: float


def layer_shares(model: Model, seq_len: int, *, basis: str = "model") -> LayerShares:
    """What part of the forward FLOPs of its layers goes where; layers with different mechanisms are averaged."""
    raise NotImplementedError


@dataclass(frozen=True)
class PathLength:
    """Steps that information takes between two positions: layers of attention, or steps of a recurrence.

    Attributes:
        longest: between the two positions that are farthest apart.
        sequential_steps: that cannot be done at once, in one layer.
    """

    longest: float
    sequential_steps: float


def path_length(mechanism: MechanismLike | Recurrent, seq_len: int, *, model: Model) -> PathLength:
    """How far apart `seq_len` positions are under a mechanism (Vaswani et al. 2017, table 1)."""
    raise NotImplementedError
