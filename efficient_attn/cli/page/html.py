"""Tables and figures as HTML. Everything that was not written here is escaped."""

from __future__ import annotations

import re
from html import escape
from importlib.resources import files

from ...benchmarking.tables import ALARMING, Table

FACTORS = {
    "": 1.0,
    "x": 1.0,
    "%": 0.01,
    "B": 1.0,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "ns": 1e-9,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "min": 60.0,
    "h": 3600.0,
}
NUMBER = re.compile(r"[±+]?(-?[\d,]+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([a-zA-Zµ%]*)(?:\s.*)?", re.DOTALL)
LONG = 48
"""Letters from which a cell may break into lines."""


def sort_value(text: str) -> float | None:
    """The number that a cell shows, in its base unit; None if it is a word."""
    found = NUMBER.fullmatch(text.strip())
    if not found or found[2] not in FACTORS:
        return None
    return float(found[1].replace(",", "")) * FACTORS[found[2]]


def table_html(table: Table) -> str:
    """A table that sorts by any column."""
    heads = "".join(
        f'<th scope="col"{_text(column, table)}><button type="button">{escape(heading) or "&nbsp;"}</button></th>'
        for column, heading in enumerate(table.headings)
    )
    rows = "".join(
        f"<tr>{''.join(_cell(text, column, table) for column, text in enumerate(row))}</tr>"
        for row in table.rows
    )
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll"><table class="sortable">{caption}<thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _text(column: int, table: Table) -> str:
    return ' class="text"' if column < table.texts else ""


def _cell(text: str, column: int, table: Table) -> str:
    classes = ["text"] if column < table.texts else []
    if len(text) > LONG:
        classes.append("long")
    if text.startswith(ALARMING) or text.endswith("WRONG"):
        classes.append("bad")
    value = sort_value(text) if column >= table.texts else None
    data = "" if value is None else f' data-v="{value!r}"'
    if column >= table.texts and text in ("", "-"):
        data = ' data-v=""'
    return f'<td class="{" ".join(classes)}"{data}>{escape(text)}</td>'


def figure_html(name: str, title: str, svg: str, caption: str) -> str:
    """A figure under its title, over its caption."""
    return (
        f'<figure id="figure-{name}"><h3>{escape(title)}</h3>{svg}'
        f"{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"
    )


def tile(value: str, what: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>'


def definitions(pairs: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs.items()) + "</dl>"


def section(anchor: str, title: str, *parts: str) -> str:
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def document(title: str, lead: str, sections: dict[str, tuple[str, str]], footer: str) -> str:
    """The whole page: `sections` are anchors with their titles and contents. It loads nothing."""
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, (name, _) in sections.items())
    body = "".join(content for _, content in sections.values())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{_shipped("page.css")}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>
<nav aria-label="Sections"><div>{links}</div></nav>
<main>{body}</main>
<footer>{escape(footer)}</footer>
<script>
{_shipped("page.js")}</script>
</body>
</html>
"""


def _shipped(name: str) -> str:
    return (files("efficient_attn.cli.page") / name).read_text(encoding="utf-8")
