"""What the benchmark commands share: one option in one way, and a run that says what it does."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from efficient_attn.benchmarking.cells import RACES, Cell
from efficient_attn.benchmarking.environment import fingerprint
from efficient_attn.benchmarking.records import OK, WRONG, Record, Records, key_of
from efficient_attn.benchmarking.run import is_done, measure_all
from efficient_attn.benchmarking.tables import Table, show, three
from efficient_attn.benchmarking.worker import Measure

from .gpu_tables import tuned
from .origin import described
from .tables import judged, verdict

TIMEOUT = 900.0


def add_common(parser: argparse.ArgumentParser, sections: Sequence[str], out: str) -> None:
    """The options that every command has; `out` says where records go by default."""
    add = parser.add_argument
    add("--only", nargs="+", metavar="SECTION", default=[], help=f"of {', '.join(sections)}")
    add("--out", type=Path, help=f"file of records (default: benchmarks/results/{out})")
    add("--again", action="store_true", help="measure also what is recorded already")
    add("--timeout", type=positive, default=TIMEOUT, help="seconds for one cell (default: %(default)g)")
    add("--list", action="store_true", help="print the cells and stop")


def chosen(parser: argparse.ArgumentParser, wanted: Sequence[str], sections: Sequence[str]) -> list[str]:
    """The sections that were asked for, all if none was, in their order."""
    unknown = [section for section in wanted if section not in sections]
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: the sections are {', '.join(sections)}")
    return [section for section in sections if section in wanted or not wanted]


def check_out(parser: argparse.ArgumentParser, out: Path) -> None:
    """Refuse a file of records that cannot be one."""
    if out.is_dir():
        parser.error(f"--out {out}: is a directory")


def run(
    cells: Sequence[Cell],
    records: Records,
    measure: Measure,
    options: argparse.Namespace,
    render: Callable[[list[Record]], list[Table]],
    legend: Sequence[str],
    seconds: float | None = None,
) -> int:
    """Measure, saying what comes out, and print the tables. Ctrl-C ends it with code 130 and loses no record."""
    done: list[Record] = []
    began, code = time.perf_counter(), 0

    def report(cell: Cell, record: Record, fresh: bool) -> None:
        done.append(record)
        elapsed = time.perf_counter() - began
        say(f"[{len(done)}/{len(cells)}, {elapsed:.0f} s] {cell.label}: {line(cell, record, fresh)}")

    try:
        left = measure_all(
            cells,
            records,
            measure,
            timeout=options.timeout,
            again=options.again,
            report=report,
            complain=complain,
            seconds=seconds,
            describe=described,
        )
        if left:
            complain(
                f"the time is up with {len(left)} of {len(cells)} cells to go; the same command continues"
            )
    except KeyboardInterrupt:
        complain(f"stopped after {len(done)} of {len(cells)} cells; the same command continues")
        code = 130
    say("")
    show(render(done))
    say("\n".join([*legend, f"records: {records.path}"]))
    return code


def line(cell: Cell, record: Record, fresh: bool) -> str:
    """What was found, in one line."""
    old = "" if fresh else f" (recorded {record['environment']['date']})"
    if record["status"] not in (OK, WRONG):
        return f"{record['status']}: {record['reason']}{old}"
    result, text, found = record["result"], record["status"], judged(record)
    if cell.work in RACES and found is not None:
        text = f"{three(found[0])}x, quartiles {three(found[1])} to {three(found[2])}"
    elif cell.work in RACES:
        text = f"{result['roofline']['fraction']:.0%} of the roofline"
    elif "gain" in result:
        text = tuned(result)
    elif "peak_ratio" in result:
        text = f"peak {three(result['peak_ratio'])}x the least"
    elif "table_share" in result:
        text = f"built once in {three(result['table_share'])} forward passes"
    elif "resident_bytes" in result:
        text = f"peak {result['resident_bytes'] / 2**20:,.0f} MiB beyond the inputs"
    if found is not None and cell.target is not None:
        text += f", target {cell.target}: {verdict(found[0], cell.target, *found[1:])}"
    return text + (f"; {record['reason']}" if record["reason"] else "") + old


def list_cells(cells: Sequence[Cell], records: Records) -> None:
    """Print the cells, and whether each one's record is there."""
    known, complaints = records.by_key()
    for complaint in complaints:
        complain(complaint)
    prints = {device: fingerprint(described(device)) for device in {cell.device for cell in cells}}
    for cell in cells:
        done = is_done(known.get(key_of(cell, prints[cell.device])))
        target = "" if cell.target is None else f", target {cell.target}"
        say(f"{'recorded  ' if done else 'to measure'}  {cell.label}{target}")


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def say(text: str) -> None:
    print(text, flush=True)


def complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
