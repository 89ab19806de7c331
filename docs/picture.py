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
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from tables import HEAD_DIM, build
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
    *cells, scale = _places(figure, down)
    shown = None
    for name, panels in zip(MECHANISMS, cells, strict=False):
        options = OPTIONS.get(name, {})
        caption = ", ".join(f"{key}={value!r}" for key, value in options.items())
        panels[0].set_title(name, loc="left", fontsize=16, weight="bold", color=INK, pad=20)
        panels[0].text(0, 1.03, caption, transform=panels[0].transAxes, fontsize=11, color=FAINT)
        for panel, is_causal in zip(panels, (False, True), strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                mechanism = build(name, LENGTH, OPTIONS.get(name), is_causal=is_causal)
            panel.set_xlabel("is_causal=True" if is_causal else "is_causal=False", fontsize=11, color=FAINT)
            if mechanism is None:
                panel.text(0.5, 0.5, "refused", ha="center", va="center", fontsize=12, color=FAINT)
                continue
            weights = mechanism.double().matrix(tokens, tokens)[0, 0].detach().abs()
            shown = panel.imshow(_relative(weights), cmap=_blues(), vmin=0, vmax=1)
    assert shown is not None, "no mechanism to draw"
    bar = figure.colorbar(shown, cax=scale, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=11, colors=FAINT)
    bar.set_label(
        "|weight|, relative to the largest of its row; white is exactly 0. Rows are queries, columns are keys.",
        fontsize=12,
        color=INK,
    )
    figure.savefig(path)


def _places(figure: Figure, down: int) -> list[Any]:
    """The pairs of panels, row by row, and then the place of the scale."""
    width, height = figure.get_size_inches()
    size, gap, margin, head = 1.82, 0.12, 0.15, 0.52
    step = (width - 2 * margin + 0.14) / PAIRS_ACROSS
    places: list[Any] = []
    for row in range(down):
        bottom = height - row * 2.72 - head - size - 0.05
        for column in range(PAIRS_ACROSS):
            lefts = [margin + column * step + side * (size + gap) for side in (0, 1)]
            boxes = [(left / width, bottom / height, size / width, size / height) for left in lefts]
            places.append([_frame(figure.add_axes(box)) for box in boxes])
    return [*places, figure.add_axes((0.3, 0.5 / height, 0.4, 0.13 / height))]


def _frame(axes: Axes) -> Axes:
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color="#bbbbbb", linewidth=0.8)
    return axes


def _relative(weights: Tensor) -> Tensor:
    """Each row over its largest entry, and NaN where a weight is exactly zero."""
    largest = weights.amax(1, keepdim=True)
    return torch.where(weights == 0, torch.nan, weights / largest)


def _blues() -> ListedColormap:
    """matplotlib's Blues without its palest sixth: every weight differs from the white of no weight."""
    return ListedColormap(colormaps["Blues"](torch.linspace(0.17, 1, 256).numpy()))


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
