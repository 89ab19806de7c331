"""How every figure looks, and how one becomes an SVG that follows the colours of the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...mechanisms import MECHANISMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID, PAPER = "#1b1f26", "#69707c", "#d9dde4", "#fffffe"
"""Drawn with these; within a page they are its own, and so follow light and dark."""
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", GRID: "var(--grid)", PAPER: "var(--paper)"}

# Told apart on white and on black, and by most colour-blind readers; markers do the rest.
COLOURS = (
    *("#e4572e", "#f0a13a", "#1f9e89", "#6a994e", "#c0587e", "#9467d6", "#7d8ba3", "#2f87d0", "#b8860b"),
)
MARKERS = "osD^vP*Xh"
LINES = ("-", "--", "-", "-", "--", "-", "-.", "-", "-")
"""Lines of one colour family, or that often lie upon each other, differ in kind, too."""
WIDTH, HEIGHT = 4.5, 3.5
"""Inches: small, so that ten-point letters are still letters on a phone."""
LONGEST_OF_TWO_COLUMNS = 20
"""Letters of a name in a legend."""
SETTINGS: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 9.5,
    "axes.titleweight": "normal",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.8,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "svg.fonttype": "none",
}


def look(name: str) -> dict[str, Any]:
    """The colour, marker and line of a mechanism, by the first word of its name: the same in every figure."""
    names = list(MECHANISMS)
    base = re.split(r"[:,\s(]", name)[0]
    place = names.index(base) if base in names else len(names) + sum(map(ord, base))
    kinds = {"color": COLOURS, "marker": MARKERS, "ls": LINES}
    return {kind: choices[place % len(choices)] for kind, choices in kinds.items()}


@contextmanager
def styled() -> Iterator[None]:
    """Inside, matplotlib draws as it should."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):  # pyright: ignore[reportArgumentType]: the stub lists the keys
        yield


def canvas(
    columns: int = 1, rows: int = 1, *, width: float = WIDTH, height: float = HEIGHT
) -> tuple[Figure, Any]:
    """A figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def tokens_axis(axes: Axes, lengths: Sequence[int], most: int = 5) -> None:
    """The lengths as a logarithmic axis, with few round ticks."""
    axes.set_xscale("log", base=2)
    step = max(1, -(-len(lengths) // most))
    shown = list(lengths)[::step]
    axes.set_xticks(shown, [length_text(n) for n in shown])
    axes.minorticks_off()
    axes.set_xlabel("tokens")


def length_text(n: float) -> str:
    """512, 4k, 1M."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if n >= size:
            return f"{n / size:g}{unit}"
    return f"{n:g}"


def legend_below(figure: Figure, axes: Axes) -> None:
    """The legend under the plot, where it hides nothing: each name once, in two columns where they fit."""
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(reversed(labels), reversed(handles), strict=True))
    names = list(dict.fromkeys(labels))
    columns = 2 if max(map(len, names)) <= LONGEST_OF_TWO_COLUMNS else 1
    figure.legend([named[name] for name in names], names, loc="outside lower center", ncols=columns)


def save(figure: Figure, path: Path, name: str) -> None:
    """Write the figure in the format that the file's name asks for. Raises ValueError for an unknown one."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element: its ids are its own, its text is text, its colours are those of the page."""
    import matplotlib

    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(
            written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for drawn, variable in VARIABLES.items():
        svg = svg.replace(drawn, variable)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()
