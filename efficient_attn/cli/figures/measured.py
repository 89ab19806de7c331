"""The figures that need a measurement: of `bench`, of `calibrate`, or of the demo."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...benchmarking.cells import DECODE, FORWARD
from ...benchmarking.records import Record
from ...benchmarking.tables import size_text
from ...complexity import Shape
from ...mechanisms import MECHANISMS
from ...planning import Device
from ..arguments import mechanism as spec_of
from ..arguments import spelled, with_causality
from ..measuring import CAUSAL
from ..output import count_text, seconds_text
from .data import Data, NoData
from .style import FAINT, INK, canvas, legend_below, look, tokens_axis
from .theory import powers, specs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_RECORDS = "no records of efficient-attn bench were given"


def seconds_of(record: Record) -> float:
    return statistics.median(record["result"]["seconds"])


def times(data: Data) -> Figure:
    """Measured seconds of a forward pass by length."""
    found = _by_subject(data, FORWARD)
    figure, axes = canvas()
    for subject, records in found.items():
        lengths = [record["cell"]["length"] for record in records]
        axes.plot(lengths, [seconds_of(record) for record in records], label=subject, **look(subject))
    tokens_axis(axes, sorted({record["cell"]["length"] for each in found.values() for record in each}))
    _seconds_axis(axes, "forward pass")
    legend_below(figure, axes)
    return figure


def _by_subject(data: Data, work: str) -> dict[str, list[Record]]:
    """Records of one work by mechanism, short lengths first. Raises NoData."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in data.timed:
        if record["cell"]["work"] == work:
            found[record["cell"]["subject"]].append(record)
    if not found:
        raise NoData(NO_RECORDS if not data.records else f"the records hold no {work} pass")
    return {name: sorted(each, key=lambda record: record["cell"]["length"]) for name, each in found.items()}


def roofline(data: Data) -> Figure:
    """FLOP/s over FLOPs per byte: what a device allows, and what was reached of it."""
    device = data.device
    figure, axes = canvas()
    ridge = device.balance
    intensities = [ridge / 2**6, ridge, ridge * 2**9]
    roof = [min(device.flops_per_second, x * device.bytes_per_second) for x in intensities]
    axes.plot(intensities, roof, color=INK, lw=2, label=device.name)
    points = _reached(data) if device.kind == "measured" else []
    for subject, intensity, rate in points:
        style = look(subject)
        axes.plot(intensity, rate, label=subject, **style | {"ls": "none"})
    if not points:
        for name, intensity in _expected(data):
            rate = min(device.flops_per_second, intensity * device.bytes_per_second)
            axes.plot([intensity], [rate], label=name, **look(name) | {"markersize": 7, "ls": "none"})
    legend_below(figure, axes)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must be moved", ylabel="FLOP/s")
    axes.set_title("reached" if points else "allowed, forward at 16k tokens")
    axes.yaxis.set_major_formatter(lambda value, _: count_text(value))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure


def _reached(data: Data) -> list[tuple[str, float, float]]:
    """Subject, FLOPs per byte and FLOP/s of each record of a forward pass."""
    found = []
    for record in data.timed:
        declared = record["result"].get("declared")
        if declared and record["cell"]["work"] == FORWARD:
            intensity = declared["flops"] / declared["bytes"]
            found.append((record["cell"]["subject"], intensity, declared["flops"] / seconds_of(record)))
    return found


def _expected(data: Data, length: int = 16_384) -> list[tuple[str, float]]:
    layer = data.layer
    found = []
    for spec in specs(data, layer.is_causal):
        cost = spec.build(layer, length).cost(Shape(1, layer.num_heads, length, length, layer.head_dim))
        found.append((spelled(spec), cost.flops.forward / (cost.bytes_read + cost.bytes_written)))
    return found


def predicted(data: Data) -> Figure:
    """What was predicted against what was measured: seconds by the roofline, and peak bytes."""
    if not data.timed:
        raise NoData(NO_RECORDS)
    figure, (seconds, peaks) = canvas(rows=2, height=6.2)
    for record in data.timed:
        style: dict[str, Any] = look(record["cell"]["subject"]) | {"ls": "none"}
        expected = predicted_seconds(record, data.device) if data.device.kind == "measured" else None
        if expected:
            seconds.plot(expected, seconds_of(record), label=record["cell"]["subject"], **style)
        declared = record["result"].get("declared", {}).get("peak_bytes")
        if declared and record["result"].get("peak_bytes"):
            peaks.plot(declared, record["result"]["peak_bytes"], label=record["cell"]["subject"], **style)
    if data.device.kind != "measured":
        said = "needs the rates of this machine:\nefficient-attn calibrate, then --on FILE"
        seconds.text(
            0.5, 0.5, said, ha="center", va="center", transform=seconds.transAxes, color=FAINT, fontsize=9
        )
    for axes, what, text, base in (
        (seconds, "seconds", seconds_text, 10),
        (peaks, "peak bytes", size_text, 4),
    ):
        if axes.lines:
            _diagonal(axes, text, base)
        else:
            axes.set(xticks=[], yticks=[])
        axes.set(xlabel=f"{what}, predicted", ylabel=f"{what}, measured")
    legend_below(figure, peaks)
    return figure


def _diagonal(axes: Any, text: Callable[[float], str], base: int) -> None:
    """Equality as a line, on axes of one scale."""
    from matplotlib.ticker import LogLocator, NullLocator

    values = [float(v) for line in axes.lines for v in (*line.get_xdata(), *line.get_ydata())]
    ends = min(values) / 2, max(values) * 2
    axes.plot(ends, ends, color=INK, lw=1, ls="--")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=base, numticks=5))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: text(value))


def predicted_seconds(record: Record, device: Device) -> float | None:
    """By the roofline, at the rate that the mechanism reached when the device was calibrated, if it was."""
    declared = record["result"].get("declared")
    if declared is None or record["cell"]["dtype"] != device.dtype:
        return None
    cls = MECHANISMS[spec_of(record["cell"]["subject"].removesuffix(CAUSAL)).name]
    rate = device.mechanism_flops_per_second.get(cls.__name__, device.flops_per_second)
    return max(declared["flops"] / rate, declared["bytes"] / device.bytes_per_second)


def quality(data: Data) -> Figure:
    """Bits per character over training speed, of the demo's models."""
    results = _demo(data)
    figure, axes = canvas()
    for name, row in results["mechanisms"].items():
        speed, bits = row["train_tokens_per_second"], row["bits_per_character"]
        error = row.get("delta_standard_error") or 0.0
        axes.errorbar(
            speed, bits, yerr=error, label=name, capsize=3, **look(name) | {"markersize": 8, "ls": "none"}
        )
    bigram = results["bigram_bits_per_character"]
    axes.axhline(bigram, color=FAINT, ls="--", lw=1.2)
    axes.annotate("bigram", (0.02, bigram), (0, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=9, color=FAINT)  # fmt: skip
    axes.margins(0.2)
    axes.set(xlabel="tokens per second in training", ylabel="bits per character, held out")
    axes.set_title("up is worse, right is faster")
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    legend_below(figure, axes)
    return figure


def learning(data: Data) -> Figure:
    """Bits per character by step."""
    figure, axes = canvas()
    results = _demo(data)
    for name, row in results["mechanisms"].items():
        axes.plot(*zip(*row["history"], strict=True), label=name, **look(name))
    axes.axhline(results["bigram_bits_per_character"], color=FAINT, ls="--", lw=1.2, label="bigram")
    axes.set(xlabel="training step", ylabel="bits per character, held out")
    legend_below(figure, axes)
    return figure


def layer_time(data: Data) -> Figure:
    """Seconds of one layer, forward and backward, by length."""
    figure, axes = canvas()
    results = _demo(data)
    for name, row in results["mechanisms"].items():
        took = {int(n): found["forward_backward_seconds"] for n, found in row["scaling"].items()}
        axes.plot(list(took), list(took.values()), label=name, **look(name))
    tokens_axis(axes, results["settings"]["scaling_lengths"])
    _seconds_axis(axes)
    legend_below(figure, axes)
    return figure


def _demo(data: Data) -> dict[str, Any]:
    if data.demo is None:
        raise NoData("no results of the demo were given")
    return data.demo


def _seconds_axis(axes: Any, label: str = "forward and backward") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(yscale="log", ylabel=label)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(lambda value, _: seconds_text(value))
    axes.yaxis.set_minor_formatter(NullFormatter())


def state(data: Data) -> Figure:
    """Bytes of decode state by length, as declared; filled points were measured."""
    lengths = powers(128, 1 << 20)
    layer = with_causality(data.layer, True)
    figure, axes = canvas()
    for spec in specs(data, True):
        held = [
            spec.build(layer, n)
            .cost(Shape(1, layer.num_heads, 1, n, layer.head_dim), phase="decode")
            .state_bytes
            for n in lengths
        ]
        axes.plot(lengths, held, label=spelled(spec), **look(spec.name) | {"marker": ""})
    for record in data.timed:
        cell = record["cell"]
        if cell["work"] == DECODE and "state_bytes" in record["result"]:
            name = spec_of(cell["subject"].removesuffix(CAUSAL)).name
            axes.plot(cell["length"], record["result"]["state_bytes"], **look(name) | {"ls": "none"})
    tokens_axis(axes, lengths)
    axes.set_yscale("log", base=2)
    axes.set(ylabel="decode state of a layer")
    axes.set_title(f"{layer.num_heads} heads of {layer.head_dim}, bfloat16")
    axes.yaxis.set_major_formatter(lambda value, _: size_text(value))
    legend_below(figure, axes)
    return figure
