"""Draws docs/mechanisms.png: the matrix of every mechanism, causal or not, on one example.

python docs/picture.py           # draw it
python docs/picture.py FILE      # draw it elsewhere
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from tables import HEAD_DIM, assignments, build
from torch import Tensor

from efficient_attn import MECHANISMS

PICTURE = Path(__file__).parent / "mechanisms.png"
LENGTH = 64
PAIRS_ACROSS = 3
INK, FAINT = "#222222", "#666666"

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


def example() -> Tensor:
    """64 tokens (1, 1, 64, E): five passages on three subjects, A B A C B, with neighbours alike."""
    generator = torch.Generator().manual_seed(0)
    subjects = torch.randn(3, HEAD_DIM, generator=generator, dtype=torch.float64)
    passages = torch.tensor([0, 1, 0, 2, 1]).repeat_interleave(torch.tensor([16, 12, 12, 12, 12]))
    angles = torch.arange(LENGTH, dtype=torch.float64)[:, None] * 0.5 ** torch.arange(HEAD_DIM // 2)
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    return (0.55 * subjects[passages] + 0.45 * waves)[None, None]


def draw(path: Path) -> None:
    """The picture: a title and two panels for each mechanism, a scale below."""
    tokens = example()
    down = math.ceil(len(MECHANISMS) / PAIRS_ACROSS)
    figure = Figure(figsize=(12, 2.72 * down + 0.7), dpi=110, facecolor="white")
    *places, scale = _places(figure, len(MECHANISMS))
    for name, panels in zip(MECHANISMS, places, strict=True):
        _draw_mechanism(name, panels, tokens)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), _blues()), cax=scale, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=11, colors=FAINT)
    legend = "|weight|, relative to the largest of its row; white is exactly 0. Rows are queries, columns are keys."
    bar.set_label(legend, fontsize=12, color=INK)
    figure.savefig(path)


def _draw_mechanism(name: str, panels: list[Axes], tokens: Tensor) -> None:
    options = OPTIONS.get(name)
    caption: list[str] = []
    for panel, is_causal in zip(panels, (False, True), strict=True):
        panel.set_xlabel(f"is_causal={is_causal}", fontsize=11, color=FAINT)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mechanism = build(name, LENGTH, options, is_causal=is_causal)
        if mechanism is None:
            panel.text(0.5, 0.5, "refused", ha="center", va="center", fontsize=12, color=FAINT)
            continue
        weights = mechanism.double().matrix(tokens, tokens)[0, 0].detach().abs()
        panel.imshow(_relative(weights), cmap=_blues(), vmin=0, vmax=1)
        caption = assignments(mechanism, options)
    panels[0].set_title(name, loc="left", fontsize=16, weight="bold", color=INK, pad=20)
    panels[0].text(0, 1.03, ", ".join(caption), transform=panels[0].transAxes, fontsize=11, color=FAINT)


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
        places.append([_frame(figure.add_axes(box)) for box in boxes])
    return [*places, figure.add_axes((0.3, 0.5 / height, 0.4, 0.13 / height))]


def _frame(axes: Axes) -> Axes:
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color="#bbbbbb", linewidth=0.8)
    return axes


def _relative(weights: Tensor) -> Any:
    """Each row over its largest entry, and NaN where a weight is exactly zero."""
    largest = weights.amax(1, keepdim=True)
    return torch.where(weights == 0, torch.nan, weights / largest).numpy()


def _blues() -> ListedColormap:
    """matplotlib's Blues without its palest sixth: every weight differs from the white of no weight."""
    return ListedColormap(colormaps["Blues"](torch.linspace(0.17, 1, 256).numpy()))


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
