"""The README's short table of speed, from the records of `benchmarks/cpu.py`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers import OWN_FORWARD
from efficient_attn.benchmarking.cells import FORWARD, RACES, Cell
from efficient_attn.benchmarking.records import Record
from efficient_attn.benchmarking.tables import three

BEGIN, END = "<!-- speed:begin -->\n", "<!-- speed:end -->"
LENGTHS = (4096, 16_384)


def summary(records: Sequence[Record]) -> str:
    """Ours against each peer: how many times as fast, by length, on one thread."""
    rows: dict[tuple[str, str, str], dict[int, str]] = {}
    for record in records:
        cell = Cell.from_identity(record["cell"])
        found = record["result"].get("ratio")
        shown = (
            cell.work in RACES and cell.threads == 1 and cell.dtype == "float32" and cell.peer != OWN_FORWARD
        )
        if shown and found and cell.length in LENGTHS and cell.section not in ("full", "every"):
            rows.setdefault((cell.subject, cell.work, cell.peer), {})[cell.length] = (
                f"{three(found['median'])}x"
            )
    lines = [
        f"| mechanism | pass | against | {' | '.join(f'{n:,} tokens' for n in LENGTHS)} |",
        f"| --- | --- | --- |{' ---: |' * len(LENGTHS)}",
    ]
    for (subject, work, peer), ratios in sorted(rows.items(), key=lambda row: row[0][1] != FORWARD):
        lines.append(f"| {subject} | {work} | {peer} | {' | '.join(ratios.get(n, '') for n in LENGTHS)} |")
    return "\n".join(lines) + "\n"


def filled_in(readme: str, table: str) -> str:
    """`readme` with `table` between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise LookupError(f"the README has no {BEGIN.strip()} ... {END}")
    return f"{before}{begin}{table}{end}{after}"
