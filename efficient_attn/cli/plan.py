"""`plan`: which mechanism for which work, how long it takes, and the longest sequence that fits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..benchmarking.tables import Table, size_text
from ..planning import Candidate, LengthLimit, Rejection, Workload, max_seq_len, recommend
from .arguments import add_json, blamed, device, model, spelled, whole
from .output import emit, seconds_text

MOST = 2**20
"""Where the search for the longest sequence ends."""
MASKS = ("key_mask", "segment_ids", "attn_bias")


def add_to(commands: Any) -> None:
    """The command."""
    parser = commands.add_parser(
        "plan", help="which mechanism fits a model, a length and a device, and why others do not"
    )
    add = parser.add_argument
    add("--model", type=model, required=True, help="by name, or num_layers=2,embed_dim=512,num_heads=8,...")
    add("--length", type=whole, required=True, metavar="N", help="tokens of a sequence")
    add("--on", type=device, required=True, metavar="DEVICE", help="by name, or a file that calibrate wrote")
    add("--batch", type=whole, default=1, metavar="N", help="sequences at once (default: 1)")
    add("--training", action="store_true", help="a forward and a backward pass")
    add("--decode", action="store_true", help="one token after another")
    add(
        "--approximate",
        action="store_true",
        help="mechanisms that estimate, or replace, softmax attention may be taken",
    )
    add(
        "--no-patterns",
        action="store_true",
        help="mechanisms that are exact within a pattern may not be taken",
    )
    add("--needs", nargs="+", choices=MASKS, default=[], help="masks that will be passed")
    add("--usable", type=share, default=0.9, metavar="PART", help="of the device's memory (default: 0.9)")
    add("--longest", action="store_true", help=f"say up to which length each fits, at most {MOST:,}")
    add_json(parser)
    parser.set_defaults(run=run)


def share(text: str) -> float:
    """A number above 0, at most 1."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0, at most 1, got {text}")
    return number


def run(options: argparse.Namespace) -> int:
    with blamed():
        found = recommend(
            Workload(
                options.model,
                options.length,
                options.on,
                batch=options.batch,
                training=options.training,
                decode=options.decode,
                allow_approximate=options.approximate,
                allow_patterns=not options.no_patterns,
                needs=tuple(options.needs),
                usable=options.usable,
            )
        )
        limits = [limit_of(each, options) if options.longest else None for each in found.ranked]
    pairs = list(zip(found.ranked, limits, strict=True))
    best = found.best
    data = {
        "best": best and {"mechanism": best.mechanism.name, "options": best.mechanism.options},
        "ranked": [{"candidate": each, "longest": limit} for each, limit in pairs],
        "rejected": found.rejected,
    }
    verdict = "nothing fits: fewer tokens, a smaller batch, or more memory"
    if best:
        verdict = f"take {spelled(best.mechanism)}"
    emit(options, data, _tables(pairs, found.rejected, options), after=[verdict])
    return 0


def _tables(
    pairs: Sequence[tuple[Candidate, LengthLimit | None]],
    rejected: Sequence[Rejection],
    options: argparse.Namespace,
) -> list[Table]:
    """What can do it, and what cannot."""
    rows = [
        [
            spelled(each.mechanism),
            each.exactness,
            seconds_text(each.time.seconds),
            size_text(each.memory.total),
            each.memory.largest,
            "yes" if each.checkpointing else "no",
            *([f"{limit.length:,}"] if limit else []),
        ]
        for each, limit in pairs
    ]
    kind = "at least" if options.on.kind == "datasheet" else "about"
    headings = ["mechanism", "against softmax", f"time, {kind}", "memory", "most of it", "checkpointing"]
    if options.longest:
        headings.append("longest")
    what = ", training" if options.training else ", one more token" if options.decode else ""
    title = f"{options.length:,} tokens, batch {options.batch}{what}, on {options.on.name}"
    made = [Table(title, headings, rows, f"Rates: {options.on.source}.", texts=2)]
    if rejected:
        reasons = [[spelled(each.mechanism), _in_words_of_the_command(each.reason)] for each in rejected]
        made.append(Table("not these", ["mechanism", "why"], reasons, texts=2))
    return made


def _in_words_of_the_command(reason: str) -> str:
    """What admits a mechanism, as one asks for it here."""
    return reason.replace("allow_approximate=True admits", "--approximate admits").replace(
        "allow_patterns=True admits", "leaving out --no-patterns admits"
    )


def limit_of(candidate: Candidate, options: argparse.Namespace) -> LengthLimit:
    """The longest sequence that would fit in the same way."""
    return max_seq_len(
        options.model.with_mechanism(candidate.mechanism),
        options.on,
        batch=options.batch,
        training=options.training,
        checkpointing=candidate.checkpointing,
        phase="decode" if options.decode else "prefill",
        usable=options.usable,
        at_most=MOST,
    )
