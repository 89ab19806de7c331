"""The figures that follow from formulas alone. FLOPs count 2 for each multiply-accumulate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ...complexity import Shape
from ...mechanisms import MECHANISMS, FullAttention
from ...planning import MechanismSpec, Model, Recurrent, crossover, estimate_time, layer_shares
from ...planning.models import RECURRENT_GATES
from ..arguments import spelled
from ..output import count_text, seconds_text
from .data import Data
from .style import INK, canvas, legend_below, length_text, look, tokens_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAD_DIM = 64
RNN_WIDTH = 512
GIB = 2**30
SIZES = (
    ("GPT-2 small", 768, 12, 12),
    ("GPT-2 medium", 1024, 16, 24),
    ("GPT-2 large", 1280, 20, 36),
    ("13B", 5120, 40, 40),
)
"""Width, heads and layers of the models in the memory heatmap."""


def powers(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... last."""
    return [first << i for i in range(int(math.log2(last // first)) + 1)]


def flops(data: Data) -> Figure:
    """FLOPs of full attention over length and width, with lines of equal cost."""
    # Contours are straight only where the axes are those of the power law, so the plot is of logarithms.
    log_lengths, log_heads = range(7, 18), range(1, 8)
    full = FullAttention(is_causal=data.layer.is_causal)
    counted = [
        [math.log10(full.cost(Shape(1, 1 << h, 1 << n, 1 << n, HEAD_DIM)).flops.forward) for n in log_lengths]
        for h in log_heads
    ]
    figure, axes = canvas()
    log_widths = [h + int(math.log2(HEAD_DIM)) for h in log_heads]
    filled = axes.contourf(log_lengths, log_widths, counted, levels=range(6, 17), cmap="viridis")
    lines = axes.contour(
        log_lengths, log_widths, counted, levels=range(7, 16), colors="white", linewidths=0.8
    )
    axes.clabel(lines, fmt=lambda power: count_text(10**power), fontsize=9)
    axes.set_xticks(log_lengths[::2], [length_text(1 << n) for n in log_lengths[::2]])
    axes.set_yticks(log_widths, [length_text(1 << d) for d in log_widths])
    axes.set(xlabel="tokens", ylabel="model width d")
    axes.grid(visible=False)
    bar = figure.colorbar(filled, ax=axes, ticks=range(6, 17, 3))
    bar.set_ticklabels([count_text(10**power) for power in range(6, 17, 3)])
    bar.set_label("FLOPs", color=INK)
    return figure


def memory(data: Data) -> Figure:
    """GiB kept for the backward pass by all layers: weights written out, and the fused kernel."""
    lengths = powers(512, 32_768)
    figure, panels = canvas(rows=2, height=4.6)
    for axes, kept_by, title in zip(panels, (_eager, _fused), ("weights written out", "fused"), strict=True):
        kept = [[layers * kept_by(d, h, n) / GIB for n in lengths] for _, d, h, layers in SIZES]
        _heatmap(axes, kept, [length_text(n) for n in lengths], [size[0] for size in SIZES])
        axes.set_title(title)
    panels[-1].set_xlabel("tokens")
    return figure


def _eager(width: int, heads: int, length: int) -> int:
    """Queries, keys, values and output, and the weights of every head, in two bytes each."""
    return 2 * (4 * length * width + heads * length**2)


def _fused(width: int, heads: int, length: int) -> int:
    shape = Shape(1, heads, length, length, width // heads, dtype=torch.float16)
    return FullAttention().cost(shape, training=True).saved_bytes


def _heatmap(axes: Any, values: list[list[float]], columns: list[str], rows: list[str]) -> None:
    from matplotlib.colors import LogNorm

    norm = LogNorm(0.02, 5000)
    axes.pcolormesh(values, cmap="inferno", norm=norm, edgecolors="none")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = norm(value) < 0.6
            text = f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"
            colour = "#fefefe" if dark else "#101010"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def rnn(data: Data) -> Figure:
    """FLOPs of attention and of recurrent layers of one width, and where they cross."""
    lengths = powers(128, 8192)
    layer = _layer(RNN_WIDTH)
    figure, axes = canvas()
    core = [FullAttention().cost(Shape(1, layer.num_heads, n, n, HEAD_DIM)).flops.forward for n in lengths]
    projections = [8 * n * RNN_WIDTH**2 for n in lengths]
    axes.plot(lengths, core, label="attention", **look("full") | {"marker": ""})
    both = [a + b for a, b in zip(core, projections, strict=True)]
    axes.plot(lengths, both, label="with projections", **look("full") | {"marker": "", "ls": "--"})
    for (kind, gates), name in zip(
        RECURRENT_GATES.items(), ("linear", "performer", "sliding_window"), strict=True
    ):
        counted = [4 * gates * n * RNN_WIDTH**2 for n in lengths]
        axes.plot(lengths, counted, label=kind.upper(), **look(name) | {"marker": ""})
        for projected in (False, True):
            crossing = crossover("full", Recurrent(kind), model=layer, projections=projected).length
            if crossing and crossing > 1:
                _mark(axes, crossing, 4 * gates * crossing * RNN_WIDTH**2, above=projected)
    tokens_axis(axes, lengths)
    axes.set(yscale="log", ylabel="FLOPs of a layer")
    axes.yaxis.set_major_formatter(lambda value, _: count_text(value))
    legend_below(figure, axes)
    return figure


def _mark(axes: Any, length: int, height: float, *, above: bool) -> None:
    """A circle where two lines cross, its length beside it: above for lines with projections, which come first."""
    axes.plot(length, height, "o", ms=6, mfc="none", color=INK)
    offset, side = ((-6, 6), "right") if above else ((6, -13), "left")
    axes.annotate(f"{length:,}", (length, height), offset, textcoords="offset points", ha=side, fontsize=9)


def _layer(width: int, causal: bool = False) -> Model:
    return Model(1, width, width // HEAD_DIM, ffn_dim=0, norm="none", is_causal=causal)


def specs(data: Data, causal: bool = False) -> Iterable[MechanismSpec]:
    """Those to draw, as far as they exist with this causality."""
    for spec in data.mechanisms or map(MechanismSpec, MECHANISMS):
        try:
            spec.build(_layer(768, causal), 4096)
        except ValueError:
            continue
        yield spec


def latency(data: Data) -> Figure:
    """Seconds of the attention of twelve layers, by the roofline of a device."""
    lengths = powers(512, 1 << 20)
    figure, axes = canvas()
    model = replace(data.layer, num_layers=12)
    for spec in specs(data, model.is_causal):
        took = [
            estimate_time(model.with_mechanism(spec), data.device, seq_len=n).parts["attention"]
            for n in lengths
        ]
        axes.plot(lengths, took, label=spelled(spec), **look(spec.name))
    tokens_axis(axes, lengths)
    axes.set_yscale("log")
    kind = "at least" if data.device.kind == "datasheet" else "about"
    axes.set(ylabel=f"time, {kind}", title=f"12 layers of {model.embed_dim} on {data.device.name}")
    axes.yaxis.set_major_formatter(lambda value, _: seconds_text(value))
    legend_below(figure, axes)
    return figure


def shares(data: Data) -> Figure:
    """Where the FLOPs of a layer go, by length."""
    lengths = powers(128, 65_536)
    model = Model(1, 768, 12, is_causal=data.layer.is_causal)
    found = [layer_shares(model, n) for n in lengths]
    parts = ("ffn", "projections", "attention")
    values = [[getattr(each, part) for each in found] for part in parts]
    figure, axes = canvas()
    colours = [look(name)["color"] for name in ("performer", "sliding_window", "full")]
    labels = ("feed-forward", "projections", "attention")
    axes.stackplot(lengths, values, labels=labels, colors=colours, alpha=0.85)
    half = 12 * model.embed_dim - 1 if model.is_causal else 6 * model.embed_dim
    axes.axvline(half, color=INK, ls=":", lw=1.2)
    axes.annotate(f"half at {half:,}", (half, 0.03), (5, 0), textcoords="offset points", fontsize=9)
    tokens_axis(axes, lengths)
    axes.set(ylabel="share of a layer's FLOPs", ylim=(0, 1), xlim=(lengths[0], lengths[-1]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    legend_below(figure, axes)
    return figure


def variants(data: Data) -> Figure:
    """FLOPs of every mechanism by length."""
    lengths = powers(512, 1 << 20)
    figure, axes = canvas()
    layer = data.layer
    for spec in specs(data, layer.is_causal):
        counted = [
            spec.build(layer, n).cost(Shape(1, layer.num_heads, n, n, layer.head_dim)).flops.forward
            for n in lengths
        ]
        axes.plot(lengths, counted, label=spelled(spec), **look(spec.name))
    tokens_axis(axes, lengths)
    axes.set(yscale="log", ylabel="FLOPs forward", title=f"{layer.num_heads} heads of {layer.head_dim}")
    axes.yaxis.set_major_formatter(lambda value, _: count_text(value))
    legend_below(figure, axes)
    return figure
