"""`cost`: what one mechanism, or a whole model, costs, by length."""

from __future__ import annotations

import argparse
from typing import Any

from ..benchmarking.tables import Table, size_text
from ..complexity import Cost, Shape
from ..complexity.cost import BASES, PHASES
from ..planning import Model, ModelCost, estimate_time, model_cost
from .arguments import (
    CommandError,
    add_json,
    add_sizes,
    blamed,
    device,
    layer_of,
    lengths,
    mechanism,
    model,
    spelled,
    with_causality,
)
from .output import count_text, emit, seconds_text

COLUMNS = ("FLOPs forward", "backward", "recomputed", "read + written", "saved", "peak", "state")


def add_to(commands: Any) -> None:
    """The command."""
    parser = commands.add_parser(
        "cost",
        help="FLOPs, traffic, memory and state of a mechanism or a model, by length, as exact integers",
    )
    parser.add_argument("mechanism", type=mechanism)
    add_lengths(parser)
    parser.add_argument(
        "--training", action="store_true", help="with the backward pass and what is kept for it"
    )
    parser.add_argument(
        "--phase", choices=PHASES, default="prefill", help="decode: one more token (default: prefill)"
    )
    parser.add_argument("--basis", choices=BASES, default="model", help="what is counted (default: model)")
    parser.add_argument("--backend", help="of the mechanism (default: the first that runs anywhere)")
    parser.add_argument("--model", type=model, help="a whole model in place of one layer's attention")
    parser.add_argument(
        "--on", type=device, metavar="DEVICE", help="with --model: estimate the time there, too"
    )
    add_sizes(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def add_lengths(parser: argparse.ArgumentParser, default: str = "1k:64k:x4") -> None:
    parser.add_argument(
        "--length",
        "--lengths",
        dest="lengths",
        type=lengths,
        default=default,
        metavar="N",
        help=f"(default: {default})",
    )


def run(options: argparse.Namespace) -> int:
    if options.model is not None:
        return run_model(options)
    if options.on is not None:
        raise CommandError(
            "--on: estimates are for whole models, give --model; compare --on estimates one layer"
        )
    options.causal = options.causal or options.phase == "decode"
    layer = layer_of(options)
    found = {n: cost_of(options.mechanism, layer, n, options) for n in options.lengths}
    title = f"{spelled(options.mechanism)}, {described(layer, options)}"
    rows = [[f"{n:,}", *cost_row(cost)] for n, cost in found.items()]
    notes = {
        "model": "FLOPs of the mathematics: 2 for each multiply-accumulate, the pairs that the mask allows.",
        "hardware": "FLOPs that the backend multiplies: whole tiles, and what it computes twice.",
        "torch": "FLOPs as torch's FlopCounterMode reports them.",
    }
    data = {"mechanism": spelled(options.mechanism), "layer": layer, "basis": options.basis, "costs": found}
    emit(options, data, [Table(title, ["tokens", *COLUMNS], rows, notes[options.basis])])
    return 0


def cost_of(spec: Any, layer: Model, length: int, options: argparse.Namespace) -> Cost:
    """Of one layer's mechanism at `length` tokens. Raises CommandError."""
    queries = 1 if options.phase == "decode" else length
    with blamed(spelled(spec)):
        one = spec.build(layer, length)
        shape = shape_of(layer, options.batch, queries, length)
        return one.cost(
            shape,
            training=options.training,
            phase=options.phase,
            basis=options.basis,
            backend=options.backend,
        )


def shape_of(layer: Model, batch: int, queries: int, keys: int) -> Shape:
    return Shape(
        batch,
        layer.num_heads,
        queries,
        keys,
        layer.head_dim,
        num_kv_heads=layer.num_kv_heads,
        dtype=layer.dtype,
    )


def cost_row(cost: Cost) -> list[str]:
    flops = cost.flops
    return [
        *(count_text(n) if n else "-" for n in (flops.forward, flops.backward, flops.recompute)),
        *(
            size_text(n) if n else "-"
            for n in (
                cost.bytes_read + cost.bytes_written,
                cost.saved_bytes,
                cost.peak_bytes,
                cost.state_bytes,
            )
        ),
    ]


def described(layer: Model, options: argparse.Namespace) -> str:
    grouped = "" if layer.num_kv_heads == layer.num_heads else f" over {layer.num_kv_heads}"
    parts = [
        f"batch {options.batch}",
        f"{layer.num_heads} heads{grouped} of {layer.head_dim}",
        str(layer.dtype).removeprefix("torch."),
        "causal" if layer.is_causal else "bidirectional",
    ]
    if getattr(options, "training", False):
        parts.append("training")
    if getattr(options, "phase", "prefill") == "decode":
        parts.append("one more token")
    return ", ".join(parts)


def run_model(options: argparse.Namespace) -> int:
    """A whole model with the mechanism in every layer."""
    described = with_causality(options.model, options.causal or options.model.is_causal)
    whole = described.with_mechanism(options.mechanism)
    call = {"training": options.training, "phase": options.phase}
    rows, data = [], {}
    for n in options.lengths:
        with blamed(spelled(options.mechanism)):
            found = model_cost(whole, options.batch, n, basis=options.basis, **call)
            time = options.on and estimate_time(whole, options.on, batch=options.batch, seq_len=n, **call)
        rows.append([f"{n:,}", *model_row(found), *([seconds_text(time.seconds)] if time else [])])
        data[n] = {
            "parts": found.parts,
            "memory": found.memory.as_dict(),
            "total": found.total,
            "time": time or None,
        }
    headings = ["tokens", "FLOPs", "attention", "projections", "FFN", "memory", "most of it"]
    note = "attention, projections, FFN: their parts of the FLOPs."
    if options.on:
        headings.append(f"{'at least' if options.on.kind == 'datasheet' else 'about'}, {options.on.name}")
    title = (
        f"a model with {spelled(options.mechanism)}, batch {options.batch}{', training' * options.training}"
    )
    emit(options, {"model": whole, "costs": data}, [Table(title, headings, rows, note)])
    return 0


def model_row(found: ModelCost) -> list[str]:
    whole = found.total.flops.total
    shares = [
        f"{found.parts[part].flops.total / whole:.1%}" if part in found.parts and whole else "-"
        for part in ("attention", "projections", "ffn")
    ]
    return [count_text(whole), *shares, size_text(found.memory.total), found.memory.largest]
