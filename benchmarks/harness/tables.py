"""Tables of records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from efficient_attn.benchmarking.cells import DECODE, MEMORY, RACES, Cell, Target
from efficient_attn.benchmarking.records import OK, WRONG, Record
from efficient_attn.benchmarking.tables import Table, mebibytes, milliseconds, number, three, worst

MET, MISSED = "met", "MISSED"
LEGEND = (
    "ratio: theirs / ours, so more is better for us; the median of the rounds, in each of which both are timed.",
    "spread: half the distance of the quartiles of the rounds' ratios. ~: the target lies between the quartiles.",
    "error: the largest of the output's and the gradients', relative to the definition in fp64, on sampled rows; "
    "WRONG: more than rounding explains.",
)

DECODING = (
    "One more token, by the tokens already in the state, all positions interleaved; ±: half the distance of the"
    " quartiles"
)


def verdict(value: float, target: Target | None, low: float | None = None, high: float | None = None) -> str:
    """Whether the target is met; with ~ where the spread holds the target, so that it might as well not be."""
    if target is None:
        return ""
    unsure = low is not None and high is not None and low <= target.bound <= high
    return (MET if target.met(value) else MISSED) + (" ~" if unsure else "")


def judged(record: Record) -> tuple[float, float, float] | None:
    """The number that a target is about, and the quartiles around it; None if it was not measured."""
    result = record["result"]
    if "ratio" in result:
        return result["ratio"]["median"], result["ratio"]["low"], result["ratio"]["high"]
    single = result.get("peak_ratio", result.get("table_share"))
    return None if single is None else (single, single, single)


@dataclass(frozen=True)
class Targets:
    """What the numbers of a table are held against: `of` a cell, and the growth of peak memory."""

    of: Callable[[Cell], Target | None]
    exponent: Target | None = None


Pairs = list[tuple[Cell, Record]]
Render = Callable[[str, Pairs, Targets], Table]


def tables(records: Iterable[Record], targets: Targets) -> list[Table]:
    """One table a section, in the order in which the sections come."""
    found = grouped(records, lambda cell: _rendering(cell.work))
    return [render(section, pairs, targets) for (section, render), pairs in found.items()]


def grouped(
    records: Iterable[Record], rendering: Callable[[Cell], Render]
) -> dict[tuple[str, Render], Pairs]:
    """Cells and records by their section and how they are shown, in the order in which they come."""
    found: dict[tuple[str, Render], Pairs] = {}
    for record in records:
        cell = Cell.from_identity(record["cell"])
        found.setdefault((cell.section, rendering(cell)), []).append((cell, record))
    return found


def _rendering(work: str) -> Render:
    if work in RACES:
        return _races
    return {MEMORY: _memory, DECODE: decode}.get(work, _capacity)


def _races(section: str, pairs: Pairs, targets: Targets) -> Table:
    headings = ["ours", "work", "against", "tokens", "threads", "ours, ms", "theirs, ms", "ratio", "spread"]
    rows = []
    for cell, record in pairs:
        dtype = "" if cell.dtype == "float32" else f", {cell.dtype}"
        start = [cell.subject + dtype, cell.work, cell.peer, f"{cell.length:,}", str(cell.threads)]
        rows.append(start + _race_numbers(record, targets.of(cell)))
    return Table(section, [*headings, "target", "", "error: ours", "theirs"], rows, remarks(pairs), texts=3)


def remarks(pairs: Pairs) -> str:
    """Each peer's remark, and each reason why a number is missing, once."""
    said: dict[str, None] = {}
    for cell, record in pairs:
        failed = record["status"] not in (OK, WRONG)
        remark = record["reason"] if failed else record["result"]["peer"]["remark"]
        if remark:
            said[remark if remark.startswith(cell.peer) else f"{cell.peer}: {remark}"] = None
    return ". ".join(said)


def _race_numbers(record: Record, target: Target | None) -> list[str]:
    shown = "" if target is None else str(target)
    result = record["result"]
    if record["status"] not in (OK, WRONG):
        return ["", "", record["status"], "", shown, "", "", ""]
    ours, peer, found = result["ours"], result["peer"], result["ratio"]
    return [
        milliseconds(ours["seconds"]),
        milliseconds(peer["seconds"]),
        f"{three(found['median'])}x",
        f"±{three((found['high'] - found['low']) / 2)}",
        shown,
        verdict(found["median"], target, found["low"], found["high"]),
        worst(ours["errors"]) + (" WRONG" if "ours" in result["wrong"] else ""),
        worst(peer["errors"]) + (" WRONG" if peer["what"] in result["wrong"] else ""),
    ]


def _memory(section: str, pairs: Pairs, targets: Targets) -> Table:
    lengths = sorted({cell.length for cell, _ in pairs})
    by_subject: dict[str, dict[int, Record]] = {}
    for cell, record in pairs:
        by_subject.setdefault(cell.subject, {})[cell.length] = record
    rows = []
    for subject, found in by_subject.items():
        for kind in ("allocated", "resident"):
            peaks = {n: r["result"][f"{kind}_bytes"] for n, r in found.items() if r["status"] == OK}
            sizes = [
                mebibytes(peaks[n]) if n in peaks else found[n]["status"] if n in found else ""
                for n in lengths
            ]
            grows = growth(peaks)
            row = [subject if kind == "allocated" else "", kind, *sizes]
            if grows is None:
                rows.append([*row, "", "", ""])
                continue
            judged = targets.exponent if kind == "allocated" else None
            rows.append([*row, f"{grows:.2f}", "" if judged is None else str(judged), verdict(grows, judged)])
    head = pairs[0][0]
    return Table(
        section,
        ["ours", "", *(f"{n:,}" for n in lengths), "exponent", "target", ""],
        rows,
        f"Peak MiB of one forward and backward pass beyond the inputs, by tokens, B{head.batch} H{head.heads} "
        f"D{head.head_dim}, each in a process of its own. allocated: by torch's allocator. resident: of the process,"
        " with what malloc keeps. exponent: of the peak in the length; 1 is linear.",
        texts=2,
    )


def _capacity(section: str, pairs: Pairs, targets: Targets) -> Table:
    rows = []
    for cell, record in pairs:
        row = [cell.subject, cell.work.replace("capacity, ", "").replace("capacity", "forward+backward")]
        if record["status"] in (OK, WRONG):
            found = record["result"]
            sizes = [mebibytes(found[name]) for name in ("inputs_bytes", "resident_bytes")]
            numbers = [three(found["seconds"]), *sizes, number(found["error"])]
        else:
            numbers = [because(record), "", "", ""]
        rows.append([*row, f"{cell.length:,}", record["status"], *numbers])
    return Table(
        section,
        ["ours", "work", "tokens", "", "seconds", "inputs, MiB", "peak resident beyond, MiB", "error"],
        rows,
        "One pass, cold, in a process of its own. error: of eight rows of the first head, relative to fp64.",
        texts=2,
    )


def decode(section: str, pairs: Pairs, targets: Targets) -> Table:
    """One more token at each position."""
    positions = sorted({p for cell, _ in pairs for p in cell.positions})
    rows = []
    for cell, record in pairs:
        found = record["result"].get("positions", {})
        row = [cell.subject, record["status"], str(cell.threads)]
        for position in positions:
            at = found.get(str(position))
            if at is None:
                row += ["", ""]
            else:
                micro = three(statistics.median(at["seconds"]) * 1e6)
                row += [
                    f"{micro} ±{three(_half_range(at['seconds']) * 1e6)}",
                    f"{at['ratio']['median']:.2f}x",
                ]
        rows.append(row)
    headings = [text for p in positions for text in (f"µs at {p:,}", f"to {positions[0]:,}")]
    return Table(
        section,
        ["ours", "", "threads", *headings],
        rows,
        ". ".join([DECODING, *{record["reason"]: None for _, record in pairs if record["reason"]}]),
        texts=2,
    )


def growth(peaks: dict[int, int]) -> float | None:
    """The exponent of bytes in tokens: the slope of a straight line through the logarithms."""
    points = [(math.log(n), math.log(size)) for n, size in peaks.items() if size > 0]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def _half_range(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def because(record: Record) -> str:
    """Why a number is missing."""
    return record["reason"] or record["status"]
