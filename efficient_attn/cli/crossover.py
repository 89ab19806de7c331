"""`crossover`: the length from which one is cheaper than the other."""

from __future__ import annotations

import argparse
from typing import Any

from ..benchmarking.tables import Table
from ..planning import METRICS, Recurrent, crossover
from ..planning.models import RECURRENT_GATES
from .arguments import CommandError, add_json, add_sizes, blamed, device, layer_of, mechanism, spelled, whole
from .output import count_text, emit


def contestant(text: str) -> Any:
    """A mechanism, or a recurrent layer: rnn, gru or lstm."""
    return Recurrent(text) if text in RECURRENT_GATES else mechanism(text)


def add_to(commands: Any) -> None:
    """The command."""
    parser = commands.add_parser(
        "crossover", help="the length from which the second is cheaper than the first"
    )
    parser.add_argument("first", type=contestant, help="a mechanism, or rnn, gru, lstm")
    parser.add_argument("second", type=contestant)
    parser.add_argument("--metric", choices=METRICS, default="flops", help="(default: flops)")
    parser.add_argument(
        "--projections", action="store_true", help="count the four projections of attention, too"
    )
    parser.add_argument("--on", type=device, metavar="DEVICE", help="for the metric seconds")
    parser.add_argument(
        "--at-most", type=whole, default=2**20, metavar="N", help="the last length tried (default: 1M)"
    )
    add_sizes(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def named(each: Any) -> str:
    return each.kind if isinstance(each, Recurrent) else spelled(each)


def run(options: argparse.Namespace) -> int:
    if options.metric == "seconds" and options.on is None:
        raise CommandError("--metric seconds: say where with --on DEVICE")
    names = named(options.first), named(options.second)
    with blamed(" and ".join(names)):
        found = crossover(
            options.first,
            options.second,
            options.metric,
            model=layer_of(options),
            projections=options.projections,
            device=options.on,
            at_most=options.at_most,
        )
    where = found.length or options.at_most
    verdict = (
        f"{names[1]} costs no more than {names[0]} from {found.length:,} tokens on"
        if found.length
        else f"{names[0]} is cheaper up to {options.at_most:,} tokens, the last length tried"
    )
    rows = [[f"{where:,}", *map(count_text, found.at_length)]]
    table = Table(f"{options.metric} of one layer", ["tokens", *names], rows)
    emit(options, {"first": names[0], "second": names[1], "crossover": found}, [table], after=[verdict])
    return 0
