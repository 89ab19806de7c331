"""Tables: the same rows on a terminal, as plain lines and in Markdown."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from .records import ERROR, OOM, TIMEOUT, UNSTABLE, WRONG

ALARMING = ("MISSED", "WRONG", WRONG, OOM, TIMEOUT, ERROR, UNSTABLE)
"""How a text begins that a reader must not overlook."""


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first `texts` columns are words, the others numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    note: str = ""
    texts: int = 1


def rich_on(stream: TextIO) -> bool:
    """Whether rich can be of use: it is installed, and somebody is looking."""
    return stream.isatty() and importlib.util.find_spec("rich") is not None


def show(made: Sequence[Table], print_line: Callable[[str], None] = print) -> None:
    """Print tables: with rich on a terminal, as plain lines elsewhere."""
    if not rich_on(sys.stdout):
        for table in made:
            for line in plain(table):
                print_line(line)
            print_line("")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    for table in made:
        drawn = RichTable(title=table.title, caption=table.note, box=box.SIMPLE_HEAD)
        drawn.title_justify = drawn.caption_justify = "left"
        for column, heading in enumerate(table.headings):
            drawn.add_column(heading, justify="left" if column < table.texts else "right")
        for row in table.rows:
            drawn.add_row(*(Text(text, style=_style(text)) for text in row))
        console.print(drawn)


def plain(table: Table) -> list[str]:
    """The table as lines of equal columns."""
    columns = list(zip(table.headings, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(row: Sequence[str]) -> str:
        texts = [
            text.ljust(width) if column < table.texts else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(texts).rstrip()

    title = [table.title] if table.title else []
    note = [table.note] if table.note else []
    return [*title, line(table.headings), *map(line, table.rows), *note]


def markdown(table: Table) -> str:
    """The table in Markdown, its note below."""

    def line(row: Sequence[str]) -> str:
        return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |"

    rule = ["---"] * table.texts + ["---:"] * (len(table.headings) - table.texts)
    rows = [[f"**{text}**" if _style(text) else text for text in row] for row in table.rows]
    return "\n".join([line(table.headings), line(rule), *map(line, rows), "", table.note])


def milliseconds(seconds: Sequence[float]) -> str:
    return three(statistics.median(seconds) * 1e3)


def mebibytes(count: int) -> str:
    return three(count / 2**20)


def size_text(count: float) -> str:
    """Bytes by powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{three(count)} {unit}"
        count /= 1024
    return f"{three(count)} GiB"


def three(number: float) -> str:
    """Three digits, and every digit before the point."""
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:,.0f}"


def _style(text: str) -> str:
    return "bold red" if text.startswith(ALARMING) or text.endswith("WRONG") else ""


def worst(errors: dict[str, Any]) -> str:
    """The largest of several errors."""
    if not errors:
        return ""
    return number(None if None in errors.values() else max(errors.values()))


def number(error: float | None) -> str:
    """An error, or that there is none to speak of."""
    return "not finite" if error is None else f"{error:.0e}"
