"""`bench`: time and memory of mechanisms on this machine, checked before they are timed, recorded as they come."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ..benchmarking.cells import DECODE, Cell
from ..benchmarking.environment import environment, fingerprint, usable_cores
from ..benchmarking.records import ERROR, OK, STATUSES, UNSTABLE, WRONG, Record, Records, key_of
from ..benchmarking.run import is_done, measure_all
from ..benchmarking.tables import Table, size_text, three, worst
from ..complexity import Shape
from ..planning import MechanismSpec, Model
from .arguments import (
    CommandError,
    add_json,
    add_sizes,
    blamed,
    checked_out,
    layer_of,
    lengths,
    mechanism,
    plain_dtype,
    specs_of,
    spelled,
    whole,
    with_causality,
)
from .describe import raise_no_cuda
from .measuring import WORKS, cells_of, layer_of_cell, measure, spec_of
from .output import emit, say, seconds_text, times_text
from .progress import Progress, Remaining

DEFAULT_OUT = Path("bench.jsonl")


def add_to(commands: Any) -> None:
    """The command."""
    parser = commands.add_parser(
        "bench",
        help="measure time and memory here; stop it with Ctrl-C, and the same command continues",
        description="Measures mechanisms on this machine, each in a process of its own. Before a cell is timed, its "
        "output and gradients are held against the definition in fp64, which writes the matrix. A finished cell "
        "is appended to --out at once; one that is recorded for this machine, these versions and these sources is "
        "not measured again.",
    )
    add = parser.add_argument
    add("mechanisms", type=mechanism, nargs="*", help="(default: every one)")
    add(
        "--length",
        "--lengths",
        dest="lengths",
        type=lengths,
        default="1k:16k:x2",
        metavar="N",
        help="(default: 1k:16k:x2)",
    )
    add(
        "--work",
        nargs="+",
        choices=tuple(WORKS),
        default=["forward", "training"],
        help="(default: forward training)",
    )
    add("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    add("--threads", type=whole, help="of the CPU (default: all that this process may use)")
    add("--quick", action="store_true", help="fewer repetitions")
    add("--timeout", type=whole, default=300, metavar="S", help="seconds for one cell (default: 300)")
    add("--minutes", type=whole, metavar="N", help="begin no cell after so many minutes")
    add("--out", type=Path, default=DEFAULT_OUT, help=f"file of records (default: {DEFAULT_OUT})")
    add(
        "--again",
        nargs="*",
        choices=STATUSES,
        metavar="STATUS",
        help="measure also what is recorded, or is so with STATUS",
    )
    add("--list", action="store_true", help="say what would be measured, and stop")
    add_sizes(parser, dtype_default="float32")
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    cells = planned(options)
    records = opened(options.out)
    again = bool(options.again is not None) if not options.again else set(options.again)
    if options.list:
        return list_cells(cells, records, again, options)
    remaining = Remaining(cells, flops_of, options.timeout)
    seen: list[Record] = []
    code, started = 0, {}
    with Progress(len(cells), remaining) as progress:

        def begin(cell: Cell) -> None:
            started[cell] = time.monotonic()
            progress.begin(name_of(cell))

        def report(cell: Cell, record: Record, fresh: bool) -> None:
            seen.append(record)
            remaining.finished(cell, time.monotonic() - started[cell] if fresh else None)
            progress.end(f"{name_of(cell)}: {said_of(record)}{'' if fresh else ' (recorded)'}")

        try:
            left = measure_all(
                cells,
                records,
                measure,
                timeout=options.timeout,
                again=again,
                report=report,
                complain=say,
                seconds=None if options.minutes is None else 60.0 * options.minutes,
                shared_by=lambda cell: (cell.subject, cell.threads, cell.device),
                begin=begin,
            )
            if left:
                say(
                    f"the time is up with {len(left)} of {len(cells)} cells to go; the same command continues"
                )
        except KeyboardInterrupt:
            say(f"stopped after {len(seen)} of {len(cells)} cells; the same command continues")
            code = 130
        except OSError as error:
            raise CommandError(f"cannot write {options.out}: {error}") from error
    emit(options, {"records": seen}, [results_table(seen)], after=[f"records: {options.out}"])
    return code or int(any(record["status"] in (WRONG, ERROR) for record in seen))


def planned(options: argparse.Namespace) -> list[Cell]:
    """The cells that were asked for. Raises CommandError."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise_no_cuda()
    if options.kv_heads not in (None, options.heads):
        raise CommandError("--kv-heads: bench measures as many key and value heads as query heads")
    threads = options.threads or usable_cores()
    if threads > usable_cores():
        raise CommandError(f"--threads {threads}: this process may use {usable_cores()} cores")
    layer = layer_of(options)
    for spec in options.mechanisms:
        check_options(spec, layer, options.lengths[0])
    works = [WORKS[work] for work in dict.fromkeys(options.work)]
    cells = []
    for work in works:
        causal = options.causal or work == DECODE
        specs = specs_of(options, with_causality(layer, causal), options.lengths[0])
        cells += cells_of(
            specs,
            [work],
            options.lengths,
            causal,
            threads=threads,
            effort="quick" if options.quick else "full",
            dtype=plain_dtype(options.dtype),
            batch=options.batch,
            heads=options.heads,
            head_dim=options.head_dim,
            device=device,
        )
    order = list(dict.fromkeys(cell.subject for cell in cells))
    return sorted(cells, key=lambda cell: order.index(cell.subject))


def check_options(spec: MechanismSpec, layer: Model, length: int) -> None:
    """Raise CommandError if the mechanism exists neither causal nor otherwise: not a cell of it could be measured."""
    try:
        spec.build(with_causality(layer, True), length)
    except (ValueError, TypeError):
        with blamed(spelled(spec)):
            spec.build(with_causality(layer, False), length)


def opened(path: Path) -> Records:
    """The records at `path`. Raises CommandError if nothing can be appended, or the file is something else."""
    checked_out(path)
    records = Records(path)
    found, complaints = records.read()
    # An interruption leaves half a record: what begins an object, and ends neither that nor its line.
    content = path.read_bytes() if complaints else b""
    torn = (
        len(complaints) == 1 and "not JSON" in complaints[0] and content[:1] == b"{" and content[-1:] != b"\n"
    )
    if complaints and not found and not torn:
        raise CommandError(f"{path} holds no records, and is left as it is: {complaints[0]}")
    return records


def list_cells(
    cells: list[Cell], records: Records, again: bool | set[str], options: argparse.Namespace
) -> int:
    known, complaints = records.by_key()
    for complaint in complaints:
        say(complaint)
    prints = {device: fingerprint(environment(device)) for device in {cell.device for cell in cells}}
    states = {cell: is_done(known.get(key_of(cell, prints[cell.device])), again) for cell in cells}
    rows = [["recorded" if done else "to measure", name_of(cell)] for cell, done in states.items()]
    data = [{"cell": cell.identity, "recorded": done} for cell, done in states.items()]
    emit(options, {"cells": data}, [Table("", ["state", "cell"], rows, texts=2)])
    return 0


def flops_of(cell: Cell) -> int:
    """What a cell's time is guessed by."""
    sizes = cell.batch, cell.heads, cell.length, cell.length, cell.head_dim
    try:
        sketch = spec_of(cell).build(layer_of_cell(cell), cell.length)
        return sketch.cost(Shape(*sizes, dtype=getattr(torch, cell.dtype))).flops.forward
    except ValueError:
        return 1


def name_of(cell: Cell) -> str:
    return f"{cell.subject} {cell.work} at {cell.length:,}"


def said_of(record: Record) -> str:
    """What came of a cell, in one line."""
    result, status = record["result"], record["status"]
    if status not in (OK, UNSTABLE):
        return f"{status}: {record['reason']}"
    text = seconds_text(statistics.median(result["seconds"]))
    if "peak_bytes" in result:
        text += f", peak {size_text(result['peak_bytes'])} beyond the inputs"
    if "state_bytes" in result:
        text += f" a token, state {size_text(result['state_bytes'])}"
    return text + (f", unstable: {record['reason']}" if status == UNSTABLE else "")


def results_table(records: list[Record]) -> Table:
    """One row a record; times are also held against those of full attention, where it was measured alike."""
    full = {_but_subject(r["cell"]): r for r in records if r["cell"]["subject"].split()[0] == "full"}
    rows = []
    for record in records:
        cell = Cell.from_identity(record["cell"])
        numbers = _numbers(record, full.get(_but_subject(record["cell"])))
        rows.append([cell.subject, cell.work, record["status"], f"{cell.length:,}", *numbers])
    note = (
        "ms: the median. ±: half the distance of the quartiles. peak: the most that was allocated at once beyond the "
        "inputs. error: relative to the definition in fp64, the largest of output and gradients."
    )
    headings = ["mechanism", "work", "status", "tokens", "ms", "±", "full / this", "peak", "error"]
    return Table("", headings, rows, note, texts=3)


def _but_subject(cell: dict[str, Any]) -> str:
    causal = cell["subject"].endswith("causal")
    return str(sorted((k, v) for k, v in cell.items() if k != "subject")) + str(causal)


def _numbers(record: Record, full: Record | None) -> list[str]:
    result = record["result"]
    if "seconds" not in result:
        return ["", "", "", "", worst(result.get("errors", {}))]
    median = statistics.median(result["seconds"])
    against = ""
    if full is not None and "seconds" in full["result"]:
        against = times_text(statistics.median(full["result"]["seconds"]) / median)
    held = result.get("peak_bytes", result.get("state_bytes"))
    return [
        three(median * 1e3),
        three(result.get("spread", 0.0) * median * 1e3 / 2),
        against,
        size_text(held) if held is not None else "",
        worst(result["errors"]),
    ]
