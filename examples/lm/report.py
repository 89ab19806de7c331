"""What was found, as JSON, as tables and as a picture; the last two are drawn from the first alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from efficient_attn.benchmarking.tables import size_text, three

from .train import write_atomically

Results = dict[str, Any]
COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b5a2b", "#7f7f7f")
MARKERS = "osD^vP*Xh"


def write_json(results: Results, path: Path) -> None:
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def print_report(results: Results, console: Console) -> None:
    for table in (_quality_table, _cost_table, _scaling_table, _state_table):
        console.print(table(results))
        console.print()
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
    return lines + [_against_full(name, results) for name in rows if "full" in rows and name != "full"]


def _against_full(name: str, results: Results) -> str:
    full, row = results["mechanisms"]["full"], results["mechanisms"][name]
    longest, decoded = (str(results["settings"][f"{kind}_lengths"][-1]) for kind in ("scaling", "state"))
    when = row["crossover_length"]
    from_when = f"faster from about {when:,}" if when else f"no faster by {int(longest):,}"
    times = [r["scaling"][longest]["forward_backward_seconds"] for r in (full, row)]
    states = [size_text(r["state_bytes"]["declared"][decoded]) for r in (row, full)]
    return (
        f"{name}: {_compared(row['delta_to_full'], row['delta_standard_error'])}; trains"
        f" {from_when} tokens ({times[0] / times[1]:.2g}x the speed at {int(longest):,});"
        f" state after {int(decoded):,} tokens: {states[0]}, full's {states[1]}"
    )


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
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        style = {"color": colour, "marker": marker, "markersize": 5, "lw": 1.8}
        learning.plot(*zip(*row["history"], strict=True), label=name, **style)
        state.plot(*_series(row["state_bytes"]["declared"]), **style)
        time.plot(*_series({n: r["forward_backward_seconds"] for n, r in row["scaling"].items()}), **style)
    bigram = results["bigram_bits_per_character"]
    learning.axhline(bigram, color="#999999", ls="--", lw=1.5, label="bigram baseline")
    settings = results["settings"]
    learning.set(title="Held-out text", xlabel="training step", ylabel="bits per character")
    state.set(title="Decoding state of one layer", xlabel="tokens decoded", xscale="log")
    time.set(title="One attention layer, forward and backward", xlabel="tokens", ylabel="seconds")
    time.set(xscale="log", yscale="log")
    state.set_yscale("log", base=4)
    state.yaxis.set_major_formatter(lambda count, _: size_text(count))
    _length_ticks(state, settings["state_lengths"])
    _length_ticks(time, settings["scaling_lengths"])
    for axes in (learning, state, time):
        axes.grid(alpha=0.25, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = learning.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), frameon=False)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=150, format="png"))


def _quality_table(results: Results) -> Table:
    settings, source = results["settings"], results["data"]
    table = _table(
        f"Bits per character on {source['source']}: context {settings['context']},"
        f" {settings['steps']} steps of {settings['batch_size']}",
        "bits",
        "to full",
        "last 1/4",
        "leak",
        "decode",
        caption=f"Held-out text, {source['evaluated_bytes']:,} bytes"
        f" ({source['held_out_lines_also_in_training']:.0%} of its lines also stand in the training text)."
        " ±: standard error over windows; one seed. last 1/4: of the context. leak: the largest change of a past"
        " logit when the future is blanked. decode: the largest difference between logits by step and teacher-forced.",
    )
    for name, row in results["mechanisms"].items():
        delta, error, audit = row["delta_to_full"], row["delta_standard_error"], row["audit"]
        table.add_row(
            name,
            f"{row['bits_per_character']:.3f}",
            "-" if delta is None or name == "full" else f"{delta:+.3f} ±{_number(error, '.3f')}",
            f"{row['bits_per_character_last_quarter']:.3f}",
            "0 exactly" if audit["exact"] else f"[bold red]{_number(audit['difference'], '.1e')}[/]",
            _number(row["decode_difference"], ".0e"),
        )
    table.add_row("bigram", f"{results['bigram_bits_per_character']:.3f}", *["-"] * 4)
    return table


def _cost_table(results: Results) -> Table:
    table = _table(
        "Cost of training at that size",
        "tokens/s",
        "step peak",
        "saved: declared",
        "measured",
        caption="step peak: the most that one forward and backward of the model allocates (CPU allocator records)."
        " saved: what one layer's mechanism keeps for its backward.",
    )
    for name, row in results["mechanisms"].items():
        sizes = (row["train_step_peak_bytes"], row["saved_bytes"]["declared"], row["saved_bytes"]["measured"])
        table.add_row(name, f"{row['train_tokens_per_second']:,.0f}", *map(size_text, sizes))
    return table


def _scaling_table(results: Results) -> Table:
    lengths = [f"{n:,}" for n in results["settings"]["scaling_lengths"]]
    table = _table("One attention layer, one sequence, by length", "", *lengths)
    for name, row in results["mechanisms"].items():
        cells = list(row["scaling"].values())
        table.add_row(name, "forward ms", *(three(cell["forward_seconds"] * 1e3) for cell in cells))
        table.add_row("", "+ backward", *(three(cell["forward_backward_seconds"] * 1e3) for cell in cells))
        table.add_row("", "peak MiB", *(three(cell["peak_bytes"] / 2**20) for cell in cells))
    return table


def _state_table(results: Results) -> Table:
    lengths = results["settings"]["state_lengths"]
    caption = "Declared by cost; = where a state was stepped to that length, measured, and found equal."
    table = _table("Decoding state of one layer, one sequence", *(f"{n:,}" for n in lengths), caption=caption)
    for name, row in results["mechanisms"].items():
        cells = []
        for length in map(str, lengths):
            declared, measured = (row["state_bytes"][kind].get(length) for kind in ("declared", "measured"))
            agrees = {None: "  ", declared: " ="}.get(measured, f" [bold red]measured {measured}[/]")
            cells.append(size_text(declared) + agrees)
        table.add_row(name, *cells)
    return table


def _table(title: str, *headings: str, caption: str | None = None) -> Table:
    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left"
    )
    table.add_column("mechanism", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


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
