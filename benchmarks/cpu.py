"""Measures this library on a CPU against its peers, and says which targets are met.

    pip install -e '.[bench]'
    python benchmarks/cpu.py                        # everything: one to two hours on two cores
    python benchmarks/cpu.py --quick                # does everything work? below two minutes; judges nothing
    python benchmarks/cpu.py --only window linear --threads 1
    python benchmarks/cpu.py --list                 # what would be measured, and what is recorded already

Every number is a ratio of two things timed in turns in one process, on random inputs, after both were compared with
fp64. Each finished cell is appended to --out at once: stop it with Ctrl-C, and the same command continues. A record
counts for the same cell on the same machine with the same versions and sources; --again measures anew. A missed
target is shown, and is no error. `python benchmarks/page.py` makes benchmarks/README.md from the records.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plan
from benchmarks.harness.command import add_common, check_out, chosen, list_cells, positive, run, say
from benchmarks.harness.origin import described
from benchmarks.harness.tables import LEGEND, tables
from benchmarks.measure import measure
from efficient_attn.benchmarking.environment import usable_cores
from efficient_attn.benchmarking.records import Record, Records
from efficient_attn.benchmarking.tables import Table

RESULTS = Path(__file__).parent / "results"
THREADS = (1, 2)


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    cells = plan.cells(options.sections, options.threads, options.effort)
    records = Records(options.out)
    if options.list:
        list_cells(cells, records)
        return 0

    def render(done: list[Record]) -> list[Table]:
        return tables(done, plan.targets(options.effort))

    say(_heading(described(), options))
    return run(cells, records, measure, options, render, LEGEND)


def _heading(found: dict[str, Any], options: argparse.Namespace) -> str:
    lines = [
        f"{found['cpu']}, {found['usable_cores']} of {found['cores']} cores usable, load {found['load']}",
        f"instructions: {found['capability']}; {' '.join(found['flags'])}",
        ", ".join(f"{name} {version}" for name, version in found["libraries"].items()),
        f"commit {found['commit']}{', with uncommitted changes' if found['dirty'] else ''}",
        f"threads {' '.join(map(str, options.threads))}; every ratio is theirs / ours: above 1, ours is faster",
    ]
    return "\n".join(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_common(parser, list(plan.SECTIONS), "cpu.jsonl, or cpu-quick.jsonl")
    for section in ("memory", "capacity", "decode"):
        add(f"--{section}", action="append_const", dest="chosen", const=section, help=f"--only {section}")
    add("--threads", nargs="+", type=positive, help="counts of CPU threads (default: 1 2; 1 if --quick)")
    add(
        "--quick",
        action="store_const",
        dest="effort",
        const="quick",
        default="full",
        help="few short lengths",
    )
    options = parser.parse_args(arguments)
    options.sections = chosen(parser, [*options.only, *(options.chosen or [])], list(plan.SECTIONS))
    if options.threads is None:
        counts = THREADS[:1] if options.effort == "quick" else THREADS
        options.threads = [n for n in counts if n <= usable_cores()]
    if max(options.threads) > usable_cores():
        parser.error(f"--threads {max(options.threads)}: this process may use {usable_cores()} cores")
    if options.out is None:
        options.out = RESULTS / ("cpu.jsonl" if options.effort == "full" else "cpu-quick.jsonl")
    check_out(parser, options.out)
    return options


if __name__ == "__main__":
    sys.exit(main())
