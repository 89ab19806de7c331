"""Draws docs/mechanisms.png: the matrix of every mechanism, causal or not, on one example.

python docs/picture.py           # draw it
python docs/picture.py FILE      # draw it elsewhere
"""

from __future__ import annotations

import sys
from pathlib import Path

from efficient_attn.cli.figures.matrices import every_matrix

PICTURE = Path(__file__).parent / "mechanisms.png"


def draw(path: Path) -> None:
    """The picture: a title and two panels for each mechanism, a scale below."""
    every_matrix().savefig(path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
