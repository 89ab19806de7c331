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
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plan
from benchmarks.harness.cells import RACES, Cell
from benchmarks.harness.environment import environment, fingerprint, usable_cores
from benchmarks.harness.records import OK, WRONG, Record, Records, key_of
from benchmarks.harness.run import is_done, measure_all
from benchmarks.harness.tables import LEGEND, show, tables, three, verdict
from benchmarks.measure import measure

RESULTS = Path(__file__).parent / "results"
THREADS = (1, 2)
TIMEOUT = 900.0


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    cells = plan.cells(options.sections, options.threads, options.effort)
    records = Records(options.out)
    if options.list:
        _list(cells, records)
        return 0
    _say(_heading(environment(), options))
    done: list[Record] = []
    began = time.perf_counter()

    def report(cell: Cell, record: Record, fresh: bool) -> None:
        done.append(record)
        elapsed = time.perf_counter() - began
        _say(f"[{len(done)}/{len(cells)}, {elapsed:.0f} s] {cell.label}: {_line(cell, record, fresh)}")

    code = 0
    try:
        measure_all(
            cells,
            records,
            measure,
            timeout=options.timeout,
            again=options.again,
            report=report,
            complain=_complain,
        )
    except KeyboardInterrupt:
        _complain(f"stopped after {len(done)} of {len(cells)} cells; the same command continues")
        code = 130
    _say("")
    show(tables(done, plan.targets(options.effort)))
    _say("\n".join([*LEGEND, f"records: {options.out}"]))
    return code


def _line(cell: Cell, record: Record, fresh: bool) -> str:
    old = "" if fresh else f" (recorded {record['environment']['date']})"
    if record["status"] not in (OK, WRONG):
        return f"{record['status']}: {record['reason']}{old}"
    result, text = record["result"], record["status"]
    if cell.work in RACES:
        found = result["ratio"]
        said = verdict(found["median"], cell.target, found["low"], found["high"])
        text = f"{three(found['median'])}x, quartiles {three(found['low'])} to {three(found['high'])}"
        text += "" if cell.target is None else f", target {cell.target}: {said}"
    elif "resident_bytes" in result:
        text = f"peak {result['resident_bytes'] / 2**20:,.0f} MiB beyond the inputs"
    return text + (f"; {record['reason']}" if record["reason"] else "") + old


def _heading(described: dict[str, Any], options: argparse.Namespace) -> str:
    lines = [
        f"{described['cpu']}, {described['usable_cores']} of {described['cores']} cores usable, "
        f"load {described['load']}",
        f"instructions: {described['capability']}; {' '.join(described['flags'])}",
        ", ".join(f"{name} {version}" for name, version in described["libraries"].items()),
        f"commit {described['commit']}{', with uncommitted changes' if described['dirty'] else ''}",
        f"threads {' '.join(map(str, options.threads))}; every ratio is theirs / ours: above 1, ours is faster",
    ]
    return "\n".join(lines)


def _list(cells: list[Cell], records: Records) -> None:
    known, complaints = records.by_key()
    for complaint in complaints:
        _complain(complaint)
    described = fingerprint(environment())
    for cell in cells:
        state = "recorded  " if is_done(known.get(key_of(cell, described))) else "to measure"
        _say(f"{state}  {cell.label}{'' if cell.target is None else f', target {cell.target}'}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", metavar="SECTION", default=[], help=f"of {', '.join(plan.SECTIONS)}")
    for section in ("memory", "capacity", "decode"):
        add(f"--{section}", action="append_const", dest="chosen", const=section, help=f"--only {section}")
    add("--threads", nargs="+", type=_positive, help="counts of CPU threads (default: 1 2; 1 if --quick)")
    add(
        "--out", type=Path, help="file of records (default: benchmarks/results/cpu.jsonl, or cpu-quick.jsonl)"
    )
    add(
        "--quick",
        action="store_const",
        dest="effort",
        const="quick",
        default="full",
        help="few short lengths",
    )
    add("--again", action="store_true", help="measure also what is recorded already")
    add("--timeout", type=_positive, default=TIMEOUT, help="seconds for one cell (default: %(default)g)")
    add("--list", action="store_true", help="print the cells and stop")
    options = parser.parse_args(arguments)
    wanted = [*options.only, *(options.chosen or [])]
    unknown = [section for section in wanted if section not in plan.SECTIONS]
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: the sections are {', '.join(plan.SECTIONS)}")
    options.sections = [section for section in plan.SECTIONS if section in wanted or not wanted]
    if options.threads is None:
        counts = THREADS[:1] if options.effort == "quick" else THREADS
        options.threads = [n for n in counts if n <= usable_cores()]
    if max(options.threads) > usable_cores():
        parser.error(f"--threads {max(options.threads)}: this process may use {usable_cores()} cores")
    if options.out is None:
        options.out = RESULTS / ("cpu.jsonl" if options.effort == "full" else "cpu-quick.jsonl")
    if options.out.is_dir():
        parser.error(f"--out {options.out}: is a directory")
    return options


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _say(text: str) -> None:
    print(text, flush=True)


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
