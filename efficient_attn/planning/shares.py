"""Where the FLOPs of a layer go, and how far information travels."""

from __future__ import annotations

from dataclasses import dataclass

from ..complexity.cost import BASES, check_choice
from ..inputs import check_positive
from .costs import model_cost
from .models import MechanismLike, Model, Recurrent, as_model


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
    """What part of the forward FLOPs of its layers goes where; layers with different mechanisms are averaged.

        n / (n + 6d), 4d / (2n + 12d) and 8d / (2n + 12d) for full attention without causality and ffn_dim = 4d

    Args:
        model: whose layers; embedding and head do not count.
        seq_len: n, in tokens.
        basis: "model", "hardware" or "torch", see `Mechanism.cost`.
    Raises:
        ValueError: if seq_len is not positive, or the basis is unknown.
    """
    check_positive("seq_len", seq_len)
    check_choice("basis", basis, BASES)
    parts = model_cost(as_model(model), 1, seq_len, basis=basis, device_type="cpu").parts
    flops = {
        name: parts[name].flops.forward if name in parts else 0
        for name in ("attention", "projections", "ffn")
    }
    whole = sum(flops.values())
    return LayerShares(**{name: value / whole for name, value in flops.items()})


@dataclass(frozen=True)
class PathLength:
    """Steps that information takes between two positions: layers of attention, or steps of a recurrence.

    Attributes:
        longest: between the two positions that are farthest apart; infinite if it never gets there.
        sequential_steps: that cannot be done at once, in one layer.
    """

    longest: float
    sequential_steps: float


def path_length(mechanism: MechanismLike | Recurrent, seq_len: int, *, model: Model) -> PathLength:
    """How far apart `seq_len` positions are under a mechanism (Vaswani et al. 2017, arXiv:1706.03762, table 1).

    What the mechanism declares, without causality. A recurrence takes seq_len - 1 steps from the first position to
    the last.

    Args:
        mechanism: by name, MechanismSpec or itself; or a Recurrent layer.
        seq_len: positions.
        model: whose width and heads the layer has.
    Raises:
        ValueError: if seq_len is not positive.
    """
    check_positive("seq_len", seq_len)
    if isinstance(mechanism, Recurrent):
        return PathLength(seq_len - 1, seq_len)
    built = model.build(mechanism, seq_len)
    return PathLength(
        built.evaluate("path", seq_len, model.head_dim),
        built.evaluate("sequential_steps", seq_len, model.head_dim),
    )
