"""`verify`: the laws, and every claim beside what is counted and measured on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from ..benchmarking.environment import environment
from ..benchmarking.tables import Table, size_text, three
from ..mechanisms import MECHANISMS, Mechanism
from ..planning import MechanismSpec, Model
from ..testing import LAWS, LawReport, check_mechanism
from ..testing.sampling import HEAD_DIM, HEADS, KV_HEADS
from .arguments import CommandError, add_json, blamed, built, known, mechanism, spelled, whole
from .output import emit, say
from .truths import ADVISORY, Truth, truths

LENGTH = 128
SHORTEST = 64


def add_to(commands: Any) -> None:
    """The command."""
    parser = commands.add_parser(
        "verify",
        help="run the laws, and show what is claimed beside what is counted and measured here",
        description="Runs the laws and the truth tests on this machine, on small sizes. Exit status 1 if a law is "
        "broken or a claim is not true; what is advisory, such as seconds, is shown and never fails.",
    )
    parser.add_argument("mechanisms", type=mechanism, nargs="*", help="(default: examples of every one)")
    parser.add_argument(
        "--length", type=whole, default=LENGTH, metavar="N", help=f"of the truths (default: {LENGTH})"
    )
    parser.add_argument(
        "--laws", nargs="*", type=law, metavar="LAW", help="only these; none if none is named"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def law(text: str) -> str:
    return known(text, LAWS, "law")


def run(options: argparse.Namespace) -> int:
    if options.length < SHORTEST:
        raise CommandError(f"--length {options.length}: at least {SHORTEST}, so that patterns show")
    found: dict[str, tuple[LawReport, list[Truth]]] = {}
    subjects = list(_subjects(options))
    for number, (name, each) in enumerate(subjects, start=1):
        say(f"[{number}/{len(subjects)}] {name}")
        laws = check_mechanism(each, laws=options.laws, raise_on_failure=False)
        found[name] = laws, truths(each, options.length)
    failures = [*broken(found), *untrue(found)]
    data = {
        "environment": environment(),
        "mechanisms": {
            name: {"laws": laws, "truths": [_plain(truth) for truth in claims]}
            for name, (laws, claims) in found.items()
        },
        "ok": not failures,
    }
    cases = sum(laws.cases for laws, _ in found.values())
    claims = sum(truth.how != ADVISORY for _, each in found.values() for truth in each)
    verdict = f"{claims} claims and {cases:,} cases of laws: " + (
        f"{len(failures)} FAIL" if failures else "all hold"
    )
    emit(options, data, [*_truth_tables(found), _laws_table(found)], after=[*failures, verdict])
    return int(bool(failures))


def _subjects(options: argparse.Namespace) -> list[tuple[str, Mechanism]]:
    """The mechanisms, causal and not, for the sizes of the laws."""
    subjects = []
    for spec in options.mechanisms or map(MechanismSpec, MECHANISMS):
        examples = MECHANISMS[spec.name].examples(options.length, HEADS, HEAD_DIM)
        for causal in sorted({each.is_causal for each in examples}):
            named = f"{spelled(spec)}{', causal' * causal}"
            if options.mechanisms:
                layer = Model(
                    1,
                    HEADS * HEAD_DIM,
                    HEADS,
                    num_kv_heads=KV_HEADS,
                    head_dim=HEAD_DIM,
                    ffn_dim=0,
                    is_causal=causal,
                )
                with blamed(named):
                    subjects.append((named, built(spec, layer, options.length)))
                continue
            subjects.append((named, next(each for each in examples if each.is_causal == causal)))
    return subjects


def broken(found: dict[str, tuple[LawReport, list[Truth]]]) -> list[str]:
    """A line for each law that is broken."""
    return [
        f"BROKEN {name}: {broken_law}: {message}"
        for name, (laws, _) in found.items()
        for broken_law, message in laws.broken.items()
    ]


def untrue(found: dict[str, tuple[LawReport, list[Truth]]]) -> list[str]:
    """A line for each claim that is not true."""
    return [
        f"UNTRUE {name}: {truth.what}: claimed {_shown(truth, truth.claimed)}, {truth.how} {_shown(truth, truth.found)}"
        for name, (_, claims) in found.items()
        for truth in claims
        if not truth.holds
    ]


def _truth_tables(found: dict[str, tuple[LawReport, list[Truth]]]) -> list[Table]:
    headings = ["claim", "how it was found", "", "claimed", "found"]
    return [
        Table(name, headings, [_row(truth) for truth in claims], texts=3)
        for name, (_, claims) in found.items()
    ]


def _row(truth: Truth) -> list[str]:
    verdict = "" if truth.how == ADVISORY else "holds" if truth.holds else "MISSED"
    return [truth.what, truth.how, verdict, _shown(truth, truth.claimed), _shown(truth, truth.found)]


def _shown(truth: Truth, number: float) -> str:
    if truth.how == ADVISORY and truth.unit == "B":
        return size_text(number)
    return f"{number:,}" if float(number).is_integer() and isinstance(number, int) else three(number)


def _laws_table(found: dict[str, tuple[LawReport, list[Truth]]]) -> Table:
    rows = [
        [
            name,
            "MISSED" if laws.broken else "hold",
            *map(str, (len(laws.held), laws.cases, len(laws.broken), len(laws.inapplicable))),
        ]
        for name, (laws, _) in found.items()
    ]
    return Table("laws", ["mechanism", "", "held", "cases", "broken", "do not apply"], rows, texts=2)


def _plain(truth: Truth) -> dict[str, Any]:
    return {
        "what": truth.what,
        "claimed": truth.claimed,
        "found": truth.found,
        "how": truth.how,
        "holds": None if truth.how == ADVISORY else truth.holds,
    }
