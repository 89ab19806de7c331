"""`compare`: every mechanism side by side, at one length or at several."""

from __future__ import annotations

import argparse
from typing import Any

from ..benchmarking.tables import Table, size_text
from ..complexity import Cost
from ..complexity.cost import BASES, PHASES
from ..planning import MechanismSpec, Model, estimate_time
from .arguments import (
    CommandError,
    add_json,
    add_sizes,
    blamed,
    device,
    layer_of,
    mechanism,
    specs_of,
    spelled,
)
from .cost import add_lengths, cost_of, described
from .output import count_text, emit, seconds_text, times_text


def add_to(commands: Any) -> None:
    """The command."""
    parser = commands.add_parser(
        "compare", help="mechanisms side by side: cost, memory and state, and against full"
    )
    parser.add_argument("mechanisms", type=mechanism, nargs="*", help="(default: every one)")
    add_lengths(parser, "16k")
    parser.add_argument("--training", action="store_true", help="with the backward pass")
    parser.add_argument(
        "--phase", choices=PHASES, default="prefill", help="decode: one more token (default: prefill)"
    )
    parser.add_argument("--basis", choices=BASES, default="model", help="what is counted (default: model)")
    parser.add_argument(
        "--on", type=device, metavar="DEVICE", help="estimate the time of a layer with projections, too"
    )
    add_sizes(parser)
    add_json(parser)
    parser.set_defaults(run=run, backend=None)


def run(options: argparse.Namespace) -> int:
    options.causal = options.causal or options.phase == "decode"
    layer = layer_of(options)
    tables, data = [], {}
    for n in options.lengths:
        specs = specs_of(options, layer, n)
        found = {spelled(spec): cost_of(spec, layer, n, options) for spec in specs}
        full = cost_of(MechanismSpec("full"), layer, n, options).flops.total
        times = {spelled(spec): seconds_on(spec, layer, n, options) for spec in specs} if options.on else {}
        tables.append(_table(n, found, full, times, layer, options))
        data[n] = {
            name: {
                "exactness": exactness(name),
                "cost": cost,
                "full_over_this": full / max(1, cost.flops.total),
            }
            | ({"seconds": times[name]} if times else {})
            for name, cost in found.items()
        }
    if not any(data.values()):
        raise CommandError("no mechanism can be built for these sizes")
    emit(options, {"layer": layer, "batch": options.batch, "basis": options.basis, "lengths": data}, tables)
    return 0


def exactness(name: str) -> str:
    from ..mechanisms import MECHANISMS

    return MECHANISMS[name.partition(":")[0]].complexity.exactness


def seconds_on(spec: MechanismSpec, layer: Model, length: int, options: argparse.Namespace) -> float:
    with blamed(spelled(spec)):
        return estimate_time(
            layer.with_mechanism(spec),
            options.on,
            batch=options.batch,
            seq_len=length,
            training=options.training,
            phase=options.phase,
        ).seconds


def _table(
    length: int,
    found: dict[str, Cost],
    full: int,
    times: dict[str, float],
    layer: Model,
    options: argparse.Namespace,
) -> Table:
    rows = []
    for name, cost in found.items():
        sizes = (cost.saved_bytes, cost.peak_bytes, cost.state_bytes)
        rows.append(
            [
                name,
                exactness(name),
                count_text(cost.flops.total),
                times_text(full / max(1, cost.flops.total)),
                *(size_text(n) if n else "-" for n in sizes),
                *([seconds_text(times[name])] if times else []),
            ]
        )
    headings = ["mechanism", "against softmax", "FLOPs", "full / this", "saved", "peak", "state"]
    if options.on:
        headings.append(f"{'at least' if options.on.kind == 'datasheet' else 'about'}, {options.on.name}")
    title = f"{length:,} tokens, {described(layer, options)}"
    note = "FLOPs of attention alone. A whole layer gains less: efficient-attn cost --model counts it."
    if options.on:
        note += " Time: of a layer, its four projections included."
    return Table(title, headings, rows, note, texts=2)
