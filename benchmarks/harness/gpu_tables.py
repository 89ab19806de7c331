"""Tables of a GPU's records: as those of a CPU, with memory and the roofline in place of threads."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from efficient_attn.benchmarking.cells import CAPACITY, DECODE, RACES, TABLES, TUNE, Cell, Target
from efficient_attn.benchmarking.records import OK, WRONG, Record
from efficient_attn.benchmarking.tables import Table, mebibytes, milliseconds, number, three, worst

from .tables import (
    Pairs,
    Render,
    Targets,
    because,
    decode,
    grouped,
    remarks,
    verdict,
)

GPU_LEGEND = (
    "ratio: theirs / ours, so more is better for us; the median of the rounds, in each of which both are timed.",
    "spread: half the distance of the quartiles of the rounds' ratios. ~: the target lies between the quartiles.",
    "ms: of CUDA events around each call, with an empty L2 cache. graph: the ratio of CUDA graphs of the same calls,"
    " where a call is so short that Python may be what is timed.",
    "roofline: the least time for the arithmetic that the pattern needs and for reading inputs and writing results"
    " once, by a matrix product and a copy measured in the same process, over our time.",
    "peak: the most that was allocated at once during a pass, beyond what was there before it; results included.",
    "error: the largest of the output's and the gradients', relative to the definition in fp64; WRONG: more than"
    " rounding explains, or, for ours, more than 1.5 times the peer's.",
)


def gpu_tables(records: Iterable[Record], targets: Targets) -> list[Table]:
    """One table a section, in the order in which the sections come."""
    return [
        render(section, pairs, targets) for (section, render), pairs in grouped(records, _rendering).items()
    ]


def _rendering(cell: Cell) -> Render:
    if cell.work in RACES:
        return _races if cell.peer else _alone
    return {CAPACITY: _capacity, DECODE: decode, TABLES: _tables, TUNE: _tuned}[cell.work]


def _races(section: str, pairs: Pairs, targets: Targets) -> Table:
    rows = []
    for cell, record in pairs:
        rows.append([*_start(cell), cell.peer, f"{cell.length:,}", str(cell.head_dim)])
        rows[-1] += _race_numbers(cell, record, targets.of(cell))
    headings = [
        "ours",
        "work",
        "against",
        "tokens",
        "D",
        "ours, ms",
        "theirs, ms",
        "ratio",
        "spread",
        "graph",
    ]
    headings += ["target", "", "roofline", "peak, MiB: ours", "theirs", "error: ours", "theirs"]
    return Table(section, headings, rows, remarks(pairs), texts=3)


def _race_numbers(cell: Cell, record: Record, target: Target | None) -> list[str]:
    shown = "" if target is None else str(target)
    if record["status"] not in (OK, WRONG):
        return ["", "", record["status"], "", "", shown, "", "", "", "", "", ""]
    result = record["result"]
    ours, peer, found = result["ours"], result["peer"], result["ratio"]
    graph = result.get("graph", {}).get("ratio")
    return [
        milliseconds(ours["seconds"]),
        milliseconds(peer["seconds"]),
        f"{three(found['median'])}x",
        f"±{three((found['high'] - found['low']) / 2)}",
        "" if graph is None else f"{three(graph['median'])}x",
        shown,
        verdict(found["median"], target, found["low"], found["high"]),
        f"{result['roofline']['fraction']:.0%}",
        mebibytes(ours["peak_bytes"]),
        mebibytes(peer["peak_bytes"]),
        worst(ours["errors"]) + (" WRONG" if "ours" in result["wrong"] else ""),
        worst(peer["errors"]) + (" WRONG" if cell.peer in result["wrong"] else ""),
    ]


def _alone(section: str, pairs: Pairs, targets: Targets) -> Table:
    rows = []
    for cell, record in pairs:
        row = [*_start(cell), f"{cell.length:,}", str(cell.head_dim)]
        if record["status"] in (OK, WRONG):
            ours, roof = record["result"]["ours"], record["result"]["roofline"]
            graph = record["result"].get("graph", {}).get("seconds")
            row += [
                ours["backend"],
                milliseconds(ours["seconds"]),
                "" if graph is None else milliseconds(graph["ours"]),
                three(roof["flops"] / statistics.median(ours["seconds"]) / 1e12),
                f"{roof['fraction']:.0%}",
                mebibytes(ours["peak_bytes"]),
                worst(ours["errors"]) + (" WRONG" if record["status"] == WRONG else ""),
            ]
        else:
            row += [record["status"], because(record), "", "", "", "", ""]
        rows.append(row)
    headings = [
        "ours",
        "work",
        "tokens",
        "D",
        "backend",
        "ms",
        "graph, ms",
        "TFLOP/s",
        "roofline",
        "peak, MiB",
    ]
    return Table(section, [*headings, "error"], rows, _rooflines(pairs), texts=2)


def _capacity(section: str, pairs: Pairs, targets: Targets) -> Table:
    rows = []
    for cell, record in pairs:
        target, found = targets.of(cell), record["result"]
        row = [cell.subject, f"{cell.length:,}", str(cell.head_dim)]
        if record["status"] in (OK, WRONG):
            sizes = [mebibytes(found[name]) for name in ("inputs_bytes", "peak_bytes")]
            ratio = found["peak_ratio"]
            row += [found["backend"], milliseconds([found["seconds"]]), *sizes, f"{three(ratio)}x"]
            row += ["" if target is None else str(target), verdict(ratio, target)]
            row += [number(found["error"]) + (" WRONG" if record["status"] == WRONG else "")]
        else:
            row += [
                record["status"],
                because(record),
                "",
                "",
                "",
                "" if target is None else str(target),
                "",
                "",
            ]
        rows.append(row)
    return Table(
        section,
        [
            "ours",
            "tokens",
            "D",
            "backend",
            "ms",
            "inputs, MiB",
            "peak beyond, MiB",
            "ratio",
            "target",
            "",
            "error",
        ],
        rows,
        "Forward and backward, alone in its process. ratio: the peak, inputs included, over inputs, output and all"
        " gradients. error: of eight rows of the first head's output, relative to fp64.",
    )


def _tables(section: str, pairs: Pairs, targets: Targets) -> Table:
    rows = []
    for cell, record in pairs:
        target, found = targets.of(cell), record["result"]
        row, shown = (
            [cell.subject, f"{cell.length:,}", str(cell.head_dim)],
            "" if target is None else str(target),
        )
        if record["status"] == OK:
            share = found["table_share"]
            row += [milliseconds([found["built_seconds"]]), milliseconds([found["forward_seconds"]])]
            row += [three(share), shown, verdict(share, target)]
        else:
            row += [record["status"], because(record), "", shown, ""]
        rows.append(row)
    headings = ["ours", "tokens", "D", "built in, ms", "forward, ms", "share", "target", ""]
    return Table(section, headings, rows, "Block tables, built at the first call and kept for the next ones.")


WORTH_IT = 1.02
"""Times as fast, in three of four rounds, from which a config is worth changing."""


def tuned(result: Mapping[str, Any]) -> str:
    """What the tuning of a kernel advises."""
    gain = result["gain"]
    if gain["low"] < WORTH_IT:
        return f"keep {result['shipped']}"
    return f"change to {result['best']}: {three(gain['median'])}x as fast"


def _tuned(section: str, pairs: Pairs, targets: Targets) -> Table:
    rows = []
    for cell, record in pairs:
        found = record["result"]
        row = [cell.peer, f"{cell.length:,}", str(cell.head_dim)]
        if record["status"] != OK:
            rows.append([*row, record["status"], because(record), "", "", "", ""])
            continue
        gain = found.get("gain")
        numbers = [record["reason"], "", ""]
        if gain is not None:
            spread = (gain["high"] - gain["low"]) / 2
            numbers = [tuned(found), f"{three(gain['median'])}x", f"±{three(spread)}"]
        tried = f"{len(found['configs'])} + {len(found['rejected'])}"
        rows.append([*row, found["shipped"], *numbers, tried, record["key"]])
    return Table(
        section,
        ["kernel", "tokens", "D", "shipped", "advice", "best", "spread", "tried + rejected", "record"],
        rows,
        "Each config that differs from the shipped one in one number, screened, compared with fp64, then timed in turns"
        f" with it. Changed is what is {WORTH_IT} times as fast in three of four rounds.",
    )


def _start(cell: Cell) -> list[str]:
    return [cell.subject + ("" if cell.dtype == "bfloat16" else f", {cell.dtype}"), cell.work]


def _rooflines(pairs: Pairs) -> str:
    """What the machine reached on plain work, over all cells."""
    found = [record["result"]["roofline"] for _, record in pairs if "roofline" in record["result"]]
    if not found:
        return ""
    flops = [roof["flops_per_second"] / 1e12 for roof in found]
    speed = [roof["bytes_per_second"] / 1e12 for roof in found]
    return (
        f"Matrix product: {three(min(flops))} to {three(max(flops))} TFLOP/s; "
        f"copy: {three(min(speed))} to {three(max(speed))} TB/s, read and written."
    )
