"""`plot`: the figures, one by one or all of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..benchmarking.tables import Table
from .arguments import CommandError, add_json, blamed, checked_out, known, mechanism
from .figures import FIGURES, NoData, draw
from .figures.style import save
from .output import emit, say
from .report import add_data, data_of

ALL = "all"
FORMATS = (".svg", ".png", ".pdf")


def add_to(commands: Any) -> None:
    """The command."""
    parser = commands.add_parser(
        "plot",
        help="draw figures, from formulas, from records, or from the demo's results",
        description="Figures: "
        + "; ".join(f"{name}: {each.title.lower()}" for name, each in FIGURES.items())
        + ".",
    )
    parser.add_argument("figure", type=figure, help=f"one of {', '.join(FIGURES)}; or {ALL}")
    parser.add_argument(
        "--mechanisms", type=mechanism, nargs="+", metavar="NAME", help="only these (default: every one)"
    )
    parser.add_argument("--causal", action="store_true", help="the causal forms")
    parser.add_argument(
        "--out", type=Path, help=f"a file ({', '.join(FORMATS)}), or a folder for {ALL} (default: .)"
    )
    add_data(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def figure(text: str) -> str:
    return known(text, [*FIGURES, ALL], "figure")


def run(options: argparse.Namespace) -> int:
    data = data_of(options)
    for complaint in data.complaints:
        say(complaint)
    every = options.figure == ALL
    out = options.out or (Path() if every else Path(f"{options.figure}.svg"))
    if not every and out.suffix not in FORMATS:
        raise CommandError(f"--out {out}: must end in {', '.join(FORMATS)}")
    checked_out(out, folder=every)
    drawn: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name in FIGURES if every else (options.figure,):
        path = out / f"{name}.svg" if every else out
        try:
            made = draw(name, data)
        except NoData as why:
            missing[name] = str(why)
            continue
        with blamed(f"cannot write {path}"):
            save(made, path, name)
        drawn[name] = str(path)
    for name, why in missing.items():
        say(f"{name}: not drawn: {why}")
    if not drawn:
        raise CommandError("; ".join(missing.values()))
    rows = [[name, FIGURES[name].title, path] for name, path in drawn.items()]
    emit(options, {"drawn": drawn, "missing": missing}, [Table("", ["figure", "", "file"], rows, texts=3)])
    return 0
