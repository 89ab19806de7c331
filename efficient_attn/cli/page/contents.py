"""What the report says: from what mechanisms declare, from records, and from the demo's results."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from ... import __version__
from ...benchmarking.environment import environment
from ...benchmarking.records import OK, UNSTABLE
from ...benchmarking.tables import Table, size_text, three
from ...complexity import Shape
from ...mechanisms import MECHANISMS, FullAttention
from ..arguments import spelled, with_causality
from ..bench import results_table
from ..describe import declared_table
from ..figures import FIGURES, Data, NoData, draw
from ..figures.matrices import EXAMPLE
from ..figures.matrices import LEGEND as MATRIX_LEGEND
from ..figures.style import inline_svg
from ..figures.theory import specs
from ..output import count_text, times_text
from .html import definitions, document, figure_html, section, table_html, tile

COST_LENGTH = 16_384
OF_BENCH = ("times", "roofline", "predicted")
OF_DEMO = ("quality", "learning", "layer-time")
MATRICES = tuple(name for name in FIGURES if name.startswith("matrix-"))
THEORY = tuple(name for name in FIGURES if name not in (*OF_BENCH, *OF_DEMO, *MATRICES))


def page_of(data: Data, *, title: str = "Efficient attention, measured and counted") -> str:
    """The page. What it has no data for, it leaves out, and says so."""
    here = environment()
    measured, missing = _figures(OF_BENCH if data.records else (), data)
    sections: dict[str, tuple[str, str]] = {}

    def add(anchor: str, name: str, *parts: str) -> None:
        sections[anchor] = name, section(anchor, name, *parts)

    left_out = (
        () if data.records else (_note("Not measured here: no records of efficient-attn bench were given."),)
    )
    add("summary", "Summary", _tiles(data, here), *left_out)
    if data.demo is not None:
        add("demo", "Language models", *_demo(data.demo), _grid(_figures(OF_DEMO, data)[0]))
    if data.records:
        add("measured", "Measured", *_measured(data), _grid(measured), *map(_note, missing))
    add("mechanisms", "Mechanisms", table_html(declared_table()), table_html(_cost_table(data)))
    theory = THEORY if data.records else (*THEORY, "roofline")
    add("scaling", "Scaling", _grid(_figures(theory, data)[0]))
    matrices = _grid(_figures(MATRICES, data)[0], small=True)
    add("matrices", "Matrices", _note(f"{EXAMPLE} {MATRIX_LEGEND}"), matrices)
    add("environment", "Environment", *_environments(data, here))
    lead = (
        f"{here['cpu']}, {here['usable_cores']} of {here['cores']} cores. {here['date'][:10]}, "
        f"efficient_attn {__version__}."
    )
    footer = (
        "FLOPs are those of matrix products, 2 for each multiply-accumulate, of the pairs that a mask allows. KiB, MiB"
        " and GiB are powers of 1024. Made by efficient-attn report; this page loads nothing from anywhere."
    )
    return document(title, lead, sections, footer)


def write_page(data: Data, path: Path, **options: str) -> None:
    """Write the page to `path`, or to what it links to: whole or not at all, but for a device."""
    text, path = page_of(data, **options), path.resolve()
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except BaseException:
        os.unlink(partial)
        raise


def _figures(names: Iterable[str], data: Data) -> tuple[list[str], list[str]]:
    """Figures as HTML, and why others are missing."""
    made, missing = [], []
    for name in names:
        picture = FIGURES[name]
        try:
            svg = inline_svg(draw(name, data), name, escape(picture.title))
        except NoData as why:
            missing.append(f"{picture.title}: {why}.")
            continue
        made.append(figure_html(name, picture.title, svg, picture.caption))
    return made, missing


def _grid(figures: list[str], *, small: bool = False) -> str:
    return f'<div class="figures{" small" * small}">{"".join(figures)}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _tiles(data: Data, here: dict[str, Any]) -> str:
    tiles = [tile(str(len(MECHANISMS)), "mechanisms")]
    if data.records:
        statuses = Counter(record["status"] for record in data.records)
        tiles.append(tile(str(len(data.records)), "cells recorded"))
        tiles += [tile(str(count), status) for status, count in statuses.most_common()]
    if data.demo is not None:
        rows = data.demo["mechanisms"]
        best = min(rows, key=lambda name: rows[name]["bits_per_character"])
        tiles.append(tile(f"{rows[best]['bits_per_character']:.3f}", f"bits per character at best: {best}"))
        fastest = max(rows, key=lambda name: rows[name]["train_tokens_per_second"])
        tiles.append(
            tile(f"{rows[fastest]['train_tokens_per_second']:,.0f}", f"tokens per second at most: {fastest}")
        )
    tiles.append(tile(data.device.name, "device of the estimates"))
    tiles.append(tile(here["libraries"].get("torch", "unknown").partition("+")[0], "torch"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _measured(data: Data) -> list[str]:
    parts = [_note(f"Skipped: {complaint}") for complaint in data.complaints]
    parts.append(table_html(results_table(data.records)))
    return [*parts, *_unmeasured(data)]


def _unmeasured(data: Data) -> list[str]:
    """What has no number, and why: a row for each reason."""
    lengths: dict[tuple[str, str, str, str], list[int]] = {}
    for record in data.records:
        if record["status"] not in (OK, UNSTABLE):
            cell = record["cell"]
            key = cell["subject"], cell["work"], record["status"], record["reason"]
            lengths.setdefault(key, []).append(cell["length"])
    if not lengths:
        return []
    rows = [
        [subject, work, status, ", ".join(f"{n:,}" for n in sorted(found)), reason]
        for (subject, work, status, reason), found in lengths.items()
    ]
    headings = ["mechanism", "work", "status", "tokens", "why"]
    return [table_html(Table("Not measured, and why", headings, rows, texts=len(headings)))]


def _cost_table(data: Data) -> Table:
    """What `cost` counts at one length: causal where that exists."""
    rows = []
    layer = data.layer
    can_be_causal = {spelled(spec) for spec in specs(data, True)}
    for spec in specs(data, False):
        causal = spelled(spec) in can_be_causal
        model = with_causality(layer, causal)
        shape = Shape(1, layer.num_heads, COST_LENGTH, COST_LENGTH, layer.head_dim)
        cost = spec.build(model, COST_LENGTH).cost(shape, training=True)
        full = FullAttention(is_causal=causal).cost(shape).flops.forward
        rows.append(
            [
                spelled(spec),
                "causal" if causal else "bidirectional",
                count_text(cost.flops.forward),
                times_text(full / cost.flops.forward),
                size_text(cost.saved_bytes),
                size_text(cost.state_bytes) if causal else "-",
                f"{cost.params:,}",
            ]
        )
    headings = [
        "mechanism",
        "form",
        "FLOPs forward",
        "full / this",
        "kept for backward",
        "decode state",
        "parameters",
    ]
    title = f"Declared cost of {COST_LENGTH:,} tokens, {layer.num_heads} heads of {layer.head_dim}, bfloat16"
    return Table(
        title,
        headings,
        rows,
        "Exact counts of attention alone. full / this: against full attention that is causal or not alike.",
        texts=2,
    )


def _demo(results: dict[str, Any]) -> list[str]:
    """The demo's models: quality, speed and memory in one table."""
    settings, source = results["settings"], results["data"]
    rows = []
    for name, row in results["mechanisms"].items():
        delta, error = row["delta_to_full"], row["delta_standard_error"]
        rows.append(
            [
                name,
                "0 exactly" if row["audit"]["exact"] else "WRONG: sees the future",
                f"{row['bits_per_character']:.3f}",
                "-"
                if delta is None or name == "full"
                else f"{delta:+.3f}" + (f" ±{error:.3f}" if error else ""),
                f"{row['train_tokens_per_second']:,.0f}",
                size_text(row["train_step_peak_bytes"]),
                _longest(row["scaling"]),
                "-" if row["crossover_length"] is None else f"{row['crossover_length']:,}",
                size_text(list(row["state_bytes"]["declared"].values())[-1]),
            ]
        )
    longest, decoded = settings["scaling_lengths"][-1], settings["state_lengths"][-1]
    headings = [
        *("mechanism", "leak", "bits", "to full", "tokens/s", "step peak"),
        *(f"ms at {longest:,}", "beats full from", f"state at {decoded:,}"),
    ]
    title = f"{source['source']}: context {settings['context']}, {settings['steps']} steps of {settings['batch_size']}"
    note = (
        f"bits: per character of held-out text, {source['evaluated_bytes']:,} bytes; a bigram table reaches "
        f"{results['bigram_bits_per_character']:.3f}. ±: standard error over windows, one seed. leak: the "
        "largest change of a past logit when the future is blanked. ms: forward and backward of one attention layer."
    )
    samples = "".join(
        f"<details><summary>{escape(name)} continues</summary><pre>{escape(row['sample']['prompt'])}"
        f"<b>{escape(row['sample']['continuation'])}</b></pre></details>"
        for name, row in results["mechanisms"].items()
    )
    return [table_html(Table(title, headings, rows, note, texts=2)), samples]


def _longest(scaling: dict[str, dict[str, float]]) -> str:
    return three(1e3 * list(scaling.values())[-1]["forward_backward_seconds"])


def _environments(data: Data, here: dict[str, Any]) -> list[str]:
    """Where the page was made, and where else records come from."""
    parts = ["<h3>This page</h3>", definitions(_plain(here))]
    seen: dict[str, int] = Counter(str(_lasting(r["environment"])) for r in data.records)
    for record in data.records:
        key = str(_lasting(record["environment"]))
        if key in seen:
            parts += [f"<h3>{seen.pop(key)} records</h3>", definitions(_plain(record["environment"]))]
    device = data.device
    about = {
        "name": device.name,
        "FLOP/s": count_text(device.flops_per_second),
        "bytes/s": count_text(device.bytes_per_second),
        "kind": device.kind,
        "source": device.source,
    }
    return [*parts, "<h3>Device of the estimates</h3>", definitions(about)]


def _lasting(found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in found.items()
        if name not in ("date", "load", "available_bytes", "gpu_now")
    }


def _plain(found: dict[str, Any]) -> dict[str, str]:
    """An environment as words."""

    def words(name: str, value: Any) -> str:
        if name == "available_bytes" and value:
            return size_text(value)
        if isinstance(value, dict):
            return ", ".join(f"{key} {item}" for key, item in value.items())
        return (
            " ".join(map(str, value))
            if isinstance(value, list)
            else "unknown"
            if value is None
            else str(value)
        )

    return {name: words(name, value) for name, value in found.items()}
