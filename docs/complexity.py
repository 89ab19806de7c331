"""Prints docs/complexity.md: what mechanisms declare, what devices can do, and a known article's tables, corrected.

python docs/complexity.py            # print it
python docs/complexity.py --write    # write it
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tables import formula, markdown

from efficient_attn import MECHANISMS
from efficient_attn.planning import DEVICES
from efficient_attn.planning.article import Table, all_tables

PAGE = Path(__file__).parent / "complexity.md"

HEAD = """\
# Complexity

`python docs/complexity.py --write` makes this page from what the code declares and counts; a test holds it up to date.

FLOPs count 2 for each multiply-accumulate, in matrix products alone. GiB is 2^30 bytes, GB 10^9. Every count names its
basis:

- `model`: the pairs of the mathematics, nothing computed twice. What a utilisation (MFU) divides by.
- `hardware`: what the backend multiplies, edges of tiles and recomputation included.
- `torch`: what `torch.utils.flop_counter` reports. Causality does not halve it. On a CPU it counts nothing for
  `scaled_dot_product_attention`, and nothing for custom operators: `efficient_attn.count_flops` counts them, or says
  which it does not know.
"""

DECLARED = """\
## What the mechanisms declare

Per batch row and head. L length, E head size, w window, g global tokens, s stride, b block, r blocks a row, m features,
k rank, P ranks. Constant factors are left out, except of what a rank sends when a sequence is split among P (derived,
never run). The tests hold time against what is counted from 4,096 to 1,048,576 tokens, the state and the time of a
token against what is counted, and the path against walks over the matrix.
"""

ARTICLE = """\
## Two articles' tables, corrected

Michael Brenndoerfer, [Attention Complexity: Quadratic Scaling, Memory Limits & Efficient Alternatives](
https://mbrenndoerfer.com/writing/attention-complexity-quadratic-scaling-memory-efficient-transformers), 2025; the first
table also shows the figures of "Why faster training still hit a length limit". Columns that begin with "article" follow
their conventions, which count multiplications alone and call GiB GB; the others are this library's counts.
`efficient_attn.planning.article` computes both.
"""


def declared() -> str:
    """The formulas of every mechanism."""
    names = ("time", "memory", "sequential_steps", "path", "decode_time", "state", "sent")
    rows = [
        [f"`{name}`", *(formula(getattr(cls.complexity, each)) for each in names), cls.complexity.knob or ""]
        for name, cls in MECHANISMS.items()
    ]
    headings = [
        "mechanism",
        "time",
        "memory",
        "steps",
        "path",
        "time of a token",
        "state",
        "sent by a rank",
        "knob",
    ]
    return markdown(headings, rows)


def devices() -> str:
    """The profiles that planning knows."""
    rows = [
        [
            device.name,
            f"{device.flops_per_second / 1e12:,.0f}",
            f"{device.bytes_per_second / 1e9:,.0f}",
            f"{device.memory_bytes / 1e9:,.0f}",
            f"{device.balance:,.0f}",
            device.source,
        ]
        for device in DEVICES.values()
    ]
    return markdown(["device", "TFLOP/s", "GB/s", "GB", "FLOPs a byte", "source"], rows)


def shown(value: str | float) -> str:
    """A number with as many digits as say something."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.2f}"


def article(table: Table) -> str:
    """One table of the article."""
    rows = [[shown(value) for value in row] for row in table.rows]
    columns = markdown(list(table.columns), rows, numbers=len(table.columns) - 1)
    return f'### {table.title}\n\nThe article\'s section "{table.section}".\n\n{columns}\n\n{table.note}\n'


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            HEAD,
            DECLARED,
            f"{declared()}\n",
            "## Devices\n\nDense bfloat16, no sparsity. A CPU is measured: `planning.calibrate()`.\n",
            f"{devices()}\n",
            ARTICLE,
            *(article(table) for table in all_tables()),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write docs/complexity.md")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(page())
