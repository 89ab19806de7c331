"""What was found, as JSON, as tables and as a picture; the last two are drawn from the first alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .train import write_atomically

Results = dict[str, Any]
COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b5a2b", "#7f7f7f")
MARKERS = "osD^vP*Xh"


def write_json(results: Results, path: Path) -> None:
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def print_report(results: Results, console: Console) -> None:
    console.print(_quality_table(results))
    console.print(_scaling_table(results))
    console.print(_state_table(results))
    for line in findings(results):
        console.print(Text(f"- {line}"))
    for name, row in results["mechanisms"].items():
        sample = row["sample"]
        console.print(Text(f"\n{name} continues, through step:", style="bold"))
        console.print(Text(_visible(sample["prompt"]), style="dim") + Text(_visible(sample["continuation"])))


def findings(results: Results) -> list[str]:
    """The sentences that a reader would take from the tables."""
    rows, control = results["mechanisms"], results["audit_control"]
    lines = []
    leaking = [name for name, row in rows.items() if not row["audit"]["exact"]]
    checked = sum(row["audit"]["comparisons"] for row in rows.values())
    if leaking:
        lines.append(
            f"LEAK: blanking the future changes the past of {', '.join(leaking)}: their scores mean nothing"
        )
    else:
        lines.append(f"no leak: blanking the future changed none of {checked:,} logits, by not one bit")
    seen = (
        "sees a leak" if control["difference"] != 0 else "DOES NOT SEE A LEAK (do not trust the line above)"
    )
    lines.append(
        f"the audit {seen}: shown the future on purpose, logits differ by {control['difference']:.3g}"
    )
    full = rows.get("full")
    lengths = results["settings"]["scaling_lengths"]
    for name, row in rows.items() if full else ():
        if name == "full":
            continue
        crossover = row["crossover_length"]
        last = str(lengths[-1])
        ratio = (
            full["scaling"][last]["forward_backward_seconds"]
            / row["scaling"][last]["forward_backward_seconds"]
        )
        when = (
            f"faster than full from about {crossover:,} tokens"
            if crossover
            else f"not faster by {lengths[-1]:,}"
        )
        lines.append(
            f"{name}: {_compared(row['delta_to_full'], row['delta_standard_error'])}; {when}"
            f" ({ratio:.2g}x its speed at {lengths[-1]:,}, training)"
        )
    return lines


def _compared(delta: float, standard_error: float | None) -> str:
    if abs(delta) < 5e-4:
        return "the bits per character of full"
    doubt = "" if standard_error is None or abs(delta) > 2 * standard_error else " (within the noise)"
    return f"{abs(delta):.3f} bits per character {'better' if delta < 0 else 'worse'} than full{doubt}"


def crossover(full: dict[int, dict[str, float]], other: dict[int, dict[str, float]]) -> int | None:
    """The length from which `other` stays faster than `full` in training; None if there is none."""
    lengths = sorted(full)
    gains = [
        math.log(full[n]["forward_backward_seconds"] / other[n]["forward_backward_seconds"]) for n in lengths
    ]
    if gains[-1] <= 0:
        return None
    first = len(gains) - 1
    while first > 0 and gains[first - 1] > 0:
        first -= 1
    if first == 0:
        return lengths[0]
    before, after = gains[first - 1], gains[first]
    step = math.log(lengths[first] / lengths[first - 1]) * -before / (after - before)
    return round(lengths[first - 1] * math.exp(step))


def plot(results: Results, path: Path) -> None:
    """Three panels: learning, decoding state, and time by length."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    learning, state, time = figure.subplots(1, 3)
    for i, (name, row) in enumerate(results["mechanisms"].items()):
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 5,
            "lw": 1.8,
        }
        learning.plot(*zip(*row["history"], strict=True), label=name, **style)
        state.plot(*_series(row["state_bytes"]["declared"]), **style)
        time.plot(*_series({n: r["forward_backward_seconds"] for n, r in row["scaling"].items()}), **style)
    learning.axhline(
        results["bigram_bits_per_character"], color="#999999", ls="--", lw=1.5, label="bigram baseline"
    )
    settings = results["settings"]
    learning.set(title="Held-out text", xlabel="training step", ylabel="bits per character")
    state.set(
        title="Decoding state of one layer",
        xlabel="tokens decoded",
        ylabel="bytes",
        xscale="log",
        yscale="log",
    )
    time.set(title="One attention layer, forward and backward", xlabel="tokens", ylabel="seconds")
    time.set(xscale="log", yscale="log")
    _length_ticks(state, settings["state_lengths"])
    _length_ticks(time, settings["scaling_lengths"])
    for axes in (learning, state, time):
        axes.grid(alpha=0.25, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = learning.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), frameon=False)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=150, format="png"))


def _quality_table(results: Results) -> Table:
    settings = results["settings"]
    size = f"context {settings['context']}, {settings['steps']} steps of {settings['batch_size']} sequences"
    table = Table(title=f"Language model on {results['data']['source']}: {size}", title_justify="left")
    for heading in (
        "mechanism",
        "bits/char",
        "to full (s.e.)",
        "last quarter",
        "train tok/s",
        "step peak",
        "saved: declared",
        "measured",
        "leak",
        "decode diff",
    ):
        table.add_column(heading, justify="left" if heading == "mechanism" else "right")
    for name, row in results["mechanisms"].items():
        delta = row["delta_to_full"]
        leak = row["audit"]["difference"]
        table.add_row(
            name,
            f"{row['bits_per_character']:.3f}",
            "-" if delta is None or name == "full" else f"{delta:+.3f} ({row['delta_standard_error']:.3f})",
            f"{row['bits_per_character_last_quarter']:.3f}",
            f"{row['train_tokens_per_second']:,.0f}",
            size_text(row["train_step_peak_bytes"]),
            size_text(row["saved_bytes"]["declared"]),
            size_text(row["saved_bytes"]["measured"]),
            "0 exactly" if row["audit"]["exact"] else f"[bold red]{leak:.2e}[/]",
            f"{row['decode_difference']:.1e}",
        )
    table.add_section()
    table.add_row("bigram", f"{results['bigram_bits_per_character']:.3f}", *["-"] * 8)
    return table


def _scaling_table(results: Results) -> Table:
    lengths = results["settings"]["scaling_lengths"]
    title = "One attention layer, one sequence: forward ms / forward+backward ms / peak"
    table = Table("mechanism", title=title, title_justify="left")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    table.add_column("beats full from", justify="right")
    for name, row in results["mechanisms"].items():
        cells = []
        for length in lengths:
            cell = row["scaling"][str(length)]
            times = (cell["forward_seconds"] * 1e3, cell["forward_backward_seconds"] * 1e3)
            cells.append(f"{_three(times[0])} / {_three(times[1])} / {size_text(cell['peak_bytes'])}")
        crossing = row["crossover_length"]
        table.add_row(
            name, *cells, "-" if name == "full" else f"{crossing:,}" if crossing else f"> {lengths[-1]:,}"
        )
    return table


def _state_table(results: Results) -> Table:
    lengths = results["settings"]["state_lengths"]
    title = "Decoding state of one layer, one sequence: declared (= measured where stepped)"
    table = Table("mechanism", title=title, title_justify="left")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for name, row in results["mechanisms"].items():
        cells = []
        for length in map(str, lengths):
            declared, measured = (row["state_bytes"][kind].get(length) for kind in ("declared", "measured"))
            agrees = {None: "", declared: " ="}.get(measured, f" [bold red]{size_text(measured or 0)}[/]")
            cells.append(size_text(declared) + agrees)
        table.add_row(name, *cells)
    return table


def size_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{_three(count)} {unit}"
        count /= 1024
    return f"{_three(count)} GiB"


def _three(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _series(values: dict[str, float]) -> tuple[list[int], list[float]]:
    return [int(n) for n in values], list(values.values())


def _length_ticks(axes: Any, lengths: list[int]) -> None:
    axes.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    axes.minorticks_off()


def as_json(value: Any) -> Any:
    """What a reader of the file gets back: JSON has string keys, and null for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
