"""`report`: everything on one page that loads nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..benchmarking.tables import Table
from ..planning import DEVICES
from .arguments import add_json, blamed, checked_out, device, with_causality
from .figures.data import ELSEWHERE, Data, read_demo, read_records
from .measuring import SECTION
from .output import emit, say

DEFAULT_OUT = Path("report.html")


def add_to(commands: Any) -> None:
    """The command."""
    parser = commands.add_parser(
        "report",
        help="one self-contained HTML page: tables that sort, and every figure",
        description="Writes one HTML page that loads nothing, in light and dark, for large and small screens. What it "
        "has no data for, it leaves out.",
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"(default: {DEFAULT_OUT})")
    parser.add_argument("--title", default="Efficient attention, measured and counted")
    add_data(parser)
    add_json(parser)
    parser.set_defaults(run=run, mechanisms=None, causal=False)


def add_data(parser: argparse.ArgumentParser) -> None:
    """What figures are drawn from, besides formulas."""
    add = parser.add_argument
    add("--records", type=Path, nargs="+", default=[], metavar="FILE", help="that efficient-attn bench wrote")
    add("--demo", type=Path, metavar="FILE", help="results.json of examples/long_context_lm.py")
    add(
        "--on",
        type=device,
        metavar="DEVICE",
        help=f"of estimates: by name, or a file of calibrate (default: {ELSEWHERE})",
    )


def data_of(options: argparse.Namespace) -> Data:
    """What was asked to be drawn. Raises CommandError for files that are not what they should be."""
    records, complaints = read_records(options.records, SECTION)
    data = Data(
        records=records,
        demo=None if options.demo is None else read_demo(options.demo),
        device=options.on or DEVICES[ELSEWHERE],
        mechanisms=options.mechanisms,
        complaints=complaints,
    )
    data.layer = with_causality(data.layer, options.causal)
    return data


def run(options: argparse.Namespace) -> int:
    from .page import write_page  # what the page shows of `bench` and `plot` imports them

    data = data_of(options)
    checked_out(options.out)
    for complaint in data.complaints:
        say(complaint)
    with blamed(f"cannot write {options.out}"):
        write_page(data, options.out, title=options.title)
    size = options.out.stat().st_size
    summary = {"page": str(options.out), "bytes": size, "records": len(data.records)}
    row = [str(options.out), f"{size:,}", str(len(data.records))]
    emit(options, summary, [Table("", ["page", "bytes", "records"], [row])])
    return 0
