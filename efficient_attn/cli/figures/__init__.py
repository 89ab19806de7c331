"""The figures, by name. matplotlib is imported when one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ...mechanisms import MECHANISMS
from ..arguments import CommandError
from . import matrices, measured, theory
from .data import Data, NoData
from .style import styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """
    Args:
        title: over it.
        caption: what a reader should know to read it.
        draw: raises NoData where the data do not suffice.
    """

    title: str
    caption: str
    draw: Callable[[Data], Figure]


FIGURES: Mapping[str, Picture] = {
    "flops": Picture(
        "FLOPs over length and width",
        "Full attention without projections. Lines join equal cost: to the right they lie four times as dense as"
        " upwards twice, for cost is quadratic in the length and linear in the width.",
        theory.flops,
    ),
    "memory": Picture(
        "Memory kept for the backward pass",
        "GiB of attention in all layers, fp16, one sequence. Written out, the weights of every head are kept; a fused"
        " kernel keeps inputs, output and one number a row.",
        theory.memory,
    ),
    "rnn": Picture(
        "Attention against recurrent layers",
        f"One layer of width {theory.RNN_WIDTH}. Circles mark where the lines cross. A recurrent layer always counts"
        " W_x and W_h, so with its four projections attention never costs less than a vanilla RNN.",
        theory.rnn,
    ),
    "latency": Picture(
        "Time by length",
        "Attention of twelve layers, forward, one sequence: the longer of its FLOPs and its traffic. On datasheet"
        " peaks a lower bound, which no implementation reaches.",
        theory.latency,
    ),
    "shares": Picture(
        "Where a layer's FLOPs go",
        "A layer of width 768 with full attention. The dotted line is where attention takes half.",
        theory.shares,
    ),
    "variants": Picture(
        "FLOPs of every mechanism",
        "Attention alone, default options; where a stride is not given it follows the root of the length.",
        theory.variants,
    ),
    "times": Picture(
        "Measured time by length",
        "Medians of a forward pass on the machine that is named above.",
        measured.times,
    ),
    "roofline": Picture(
        "Roofline",
        "What the device allows by arithmetic and by traffic, and where mechanisms stand. FLOPs are those of the"
        " mathematics, bytes every tensor once.",
        measured.roofline,
    ),
    "predicted": Picture(
        "Predicted against measured",
        "On the dashed line both agree. Seconds are predicted by the roofline of the calibrated machine, peak bytes by"
        " cost().peak_bytes, a bound.",
        measured.predicted,
    ),
    "quality": Picture(
        "Quality against speed",
        "The demo's language models: the same size, steps and text, another mechanism. Bars: standard error of the"
        " difference to full attention.",
        measured.quality,
    ),
    "learning": Picture(
        "Learning",
        "Bits per character of held-out text by training step. The dashed line is a bigram table.",
        measured.learning,
    ),
    "layer-time": Picture(
        "One attention layer by length",
        "Forward and backward of one layer of the demo's model, one sequence, one thread.",
        measured.layer_time,
    ),
    "state": Picture(
        "Decode state by length",
        "Bytes that a causal layer keeps between tokens. Lines are declared; points were measured, where records hold"
        " decoding.",
        measured.state,
    ),
    **{
        f"matrix-{name}": Picture(
            f"The matrix of {name}",
            "",
            partial(lambda name, data: matrices.one_matrix(name, matrix_options(name, data)), name),
        )
        for name in MECHANISMS
    },
}


def matrix_options(name: str, data: Data) -> Mapping[str, object] | None:
    """The options that the caller gave to `name`, if any."""
    return next((spec.options for spec in data.mechanisms or () if spec.name == name and spec.options), None)


def draw(name: str, data: Data) -> Figure:
    """The figure `name`. Raises NoData, or CommandError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("matplotlib is not installed: pip install 'efficient-attn[plot]'")
    with styled():
        return FIGURES[name].draw(data)


__all__ = ["FIGURES", "Data", "NoData", "Picture", "draw"]
