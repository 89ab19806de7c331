"""The matrix of every mechanism, causal or not, on one example."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...mechanisms import MECHANISMS, Mechanism, create_mechanism
from .style import FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADS, HEAD_DIM, LENGTH = 8, 64, 64
TRIAL_LENGTH = 24
PAIRS_ACROSS = 3
PAPER = "white"
"""In dark pages too: it stands for a weight of zero."""

# Small enough that a pattern shows in 64 tokens; a mechanism that is not listed is drawn as its first example.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "flash": {},
    "sliding_window": {"window_size": 8, "num_sinks": 2},
    "longformer": {"window_size": 6, "global_tokens": (0, 1, 40)},
    "bigbird": {"block_size": 4, "num_random_blocks": 2},
    "sparse_transformer": {"pattern": "strided", "stride": 8},
    "linformer": {"rank": 16},
    "performer": {"num_features": 256},
    "linear": {"feature_map": "elu"},
}
EXAMPLE = "64 tokens, five passages on three subjects: A B A C B."
LEGEND = (
    "|weight|, relative to the largest of its row; white is exactly 0. Rows are queries, columns are keys."
)


def build(name: str, length: int, options: Mapping[str, Any] | None, *, is_causal: bool) -> Mechanism | None:
    """The mechanism `name` with `options`, or its first example if None; None if it has no such causality."""
    cls = MECHANISMS[name]
    if not any(mechanism.is_causal == is_causal for mechanism in cls.examples(TRIAL_LENGTH, HEADS, HEAD_DIM)):
        return None
    if options is None:
        return next(m for m in cls.examples(length, HEADS, HEAD_DIM) if m.is_causal == is_causal)
    sizes = {"num_heads": HEADS, "head_dim": HEAD_DIM, "max_seq_len": length}
    return create_mechanism(name, **sizes, is_causal=is_causal, **options)


def assignments(mechanism: Mechanism, options: Mapping[str, Any] | None) -> list[str]:
    """The options that `mechanism` was built with, as one writes them; of an example, its knob."""
    knob = mechanism.complexity.knob
    if options is None:
        options = {knob: getattr(mechanism, knob)} if knob else {}
    return [f"{key}={value!r}" for key, value in options.items()]


def example() -> Tensor:
    """64 tokens (1, 1, 64, E): five passages on three subjects, A B A C B, with neighbours alike."""
    generator = torch.Generator().manual_seed(0)
    subjects = torch.randn(3, HEAD_DIM, generator=generator, dtype=torch.float64)
    passages = torch.tensor([0, 1, 0, 2, 1]).repeat_interleave(torch.tensor([16, 12, 12, 12, 12]))
    angles = torch.arange(LENGTH, dtype=torch.float64)[:, None] * 0.5 ** torch.arange(HEAD_DIM // 2)
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    return (0.55 * subjects[passages] + 0.45 * waves)[None, None]


def every_matrix() -> Figure:
    """A title and two panels for each mechanism, a scale below."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    down = math.ceil(len(MECHANISMS) / PAIRS_ACROSS)
    figure = Figure(figsize=(12, 2.72 * down + 0.7), dpi=110, facecolor="white")
    *places, scale = _places(figure, len(MECHANISMS))
    for name, panels in zip(MECHANISMS, places, strict=True):
        caption = draw_matrices(name, OPTIONS.get(name), panels)
        panels[0].set_title(name, loc="left", fontsize=16, weight="bold", color=INK, pad=20)
        panels[0].text(0, 1.03, caption, transform=panels[0].transAxes, fontsize=11, color=FAINT)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), blues()), cax=scale, orientation="horizontal")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]: the stub takes it for a list of spines
    bar.ax.tick_params(labelsize=11, colors=FAINT)
    bar.set_label(LEGEND, fontsize=12, color=INK)
    return figure


def one_matrix(name: str, options: Mapping[str, Any] | None = None) -> Figure:
    """The two panels of one mechanism."""
    from .style import canvas

    figure, panels = canvas(2, height=2.7)
    for panel in panels:
        frame(panel)
    caption = draw_matrices(name, OPTIONS.get(name) if options is None else options, list(panels))
    panels[0].set_title(caption or " ", loc="left", fontsize=9, weight="normal", color=FAINT)
    return figure


def draw_matrices(name: str, options: Mapping[str, Any] | None, panels: list[Axes]) -> str:
    """Draws both causalities of one mechanism; returns the options that it was built with."""
    tokens = example()
    caption: list[str] = []
    for panel, is_causal in zip(panels, (False, True), strict=True):
        panel.set_xlabel(f"is_causal={is_causal}", fontsize=10, color=FAINT)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mechanism = build(name, LENGTH, options, is_causal=is_causal)
        if mechanism is None:
            panel.text(0.5, 0.5, "refused", ha="center", va="center", fontsize=12, color=FAINT)
            continue
        weights = mechanism.double().matrix(tokens, tokens)[0, 0].detach().abs()
        panel.set_facecolor(PAPER)
        panel.imshow(relative(weights), cmap=blues(), vmin=0, vmax=1, interpolation="none")
        caption = assignments(mechanism, options)
    return ", ".join(caption)


def _places(figure: Figure, count: int) -> list[Any]:
    """`count` pairs of panels, row by row, and then the place of the scale."""
    width, height = figure.get_size_inches()
    size, gap, margin, head = 1.82, 0.12, 0.15, 0.57
    step = (width - 2 * margin + 0.14) / PAIRS_ACROSS
    places: list[Any] = []
    for index in range(count):
        row, column = divmod(index, PAIRS_ACROSS)
        bottom = height - row * 2.72 - head - size
        lefts = [margin + column * step + side * (size + gap) for side in (0, 1)]
        boxes = [(left / width, bottom / height, size / width, size / height) for left in lefts]
        places.append([frame(figure.add_axes(box)) for box in boxes])
    return [*places, figure.add_axes((0.3, 0.5 / height, 0.4, 0.13 / height))]


def frame(axes: Axes) -> Axes:
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set(color="#bbbbbb", linewidth=0.8, visible=True)
    return axes


def relative(weights: Tensor) -> Any:
    """Each row over its largest entry, and NaN where a weight is exactly zero."""
    largest = weights.amax(1, keepdim=True)
    return torch.where(weights == 0, torch.nan, weights / largest).numpy()


def blues() -> Any:
    """matplotlib's Blues without its palest sixth: every weight differs from the white of no weight."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["Blues"](torch.linspace(0.17, 1, 256).numpy()))
