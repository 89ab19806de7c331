"""`list`, `info` and `env`: what there is, what it declares, and where it runs."""

from __future__ import annotations

import argparse
import inspect
from typing import Any, NoReturn

import torch

from ..benchmarking.environment import environment
from ..benchmarking.tables import Table, size_text
from ..mechanisms import MECHANISMS, Mechanism
from .arguments import (
    CommandError,
    add_json,
    add_sizes,
    blamed,
    built,
    layer_of,
    mechanism,
    spelled,
    whole,
)
from .output import emit

FORMULAS = ("time", "memory", "decode_time", "state", "path")
FORMULA_HEADINGS = ("time", "memory", "one more token", "decode state", "path")
LEGEND = (
    "Formulas are per head and batch row: L length, E head size, w window, g global tokens, r blocks a row, "
    "b block size, s stride, k rank, m features. path: layers between two far tokens."
)
TRIAL = 64


def add_to(commands: Any) -> None:
    """The three commands."""
    every = commands.add_parser("list", help="every mechanism, and what it declares")
    add_json(every)
    every.set_defaults(run=run_list)

    info = commands.add_parser("info", help="all about one mechanism: options, formulas, backends here")
    info.add_argument("mechanism", type=mechanism)
    info.add_argument("--length", type=whole, default=1024, metavar="N", help="tokens (default: 1024)")
    info.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add_sizes(info, dtype_default="float32")
    add_json(info)
    info.set_defaults(run=run_info)

    env = commands.add_parser(
        "env", help="this machine and these versions, as records of measurements have them"
    )
    env.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    add_json(env)
    env.set_defaults(run=run_env)


def run_list(options: argparse.Namespace) -> int:
    emit(options, {name: declared(cls) for name, cls in MECHANISMS.items()}, [declared_table()])
    return 0


def declared_table() -> Table:
    """What every mechanism declares."""
    rows = []
    for name, cls in MECHANISMS.items():
        says = declared(cls)
        formulas = [formula(says[each]) for each in FORMULAS]
        rows.append([name, says["exactness"], *formulas, "yes" if says["causal"] else "no"])
    headings = ["mechanism", "against softmax", *FORMULA_HEADINGS, "causal"]
    return Table("", headings, rows, LEGEND, texts=len(headings))


def declared(cls: type[Mechanism]) -> dict[str, Any]:
    """What a mechanism declares, and whether it can be causal."""
    says = cls.complexity
    causal = any(each.is_causal for each in cls.examples(TRIAL, 8, 64))
    formulas = {name: getattr(says, name) for name in FORMULAS}
    return {
        "class": cls.__name__,
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "exactness": says.exactness,
        **formulas,
        "knob": says.knob,
        "causal": causal,
    }


def formula(text: str) -> str:
    """A declared formula as one reads it; "0" is a decode state that does not exist."""
    spaced = (
        text.replace("**2", "²").replace("*", " ").replace("+", " + ").replace("/", " / ").replace("-", " - ")
    )
    return {"0": "none", "oo": "∞"}.get(text, spaced)


def run_info(options: argparse.Namespace) -> int:
    layer = layer_of(options)
    with blamed(spelled(options.mechanism)):
        chosen = built(options.mechanism, layer, options.length)
    cls = type(chosen)
    says = declared(cls)
    arguments = {
        name: "required" if each.default is each.empty else repr(each.default)
        for name, each in inspect.signature(cls).parameters.items()
    }
    if options.device == "cuda" and not torch.cuda.is_available():
        raise_no_cuda()
    explanation = explained(chosen, options)
    data = {
        **says,
        "spec": spelled(options.mechanism),
        "built": " ".join(str(chosen).split()),
        "documentation": inspect.getdoc(cls) or "",
        "arguments": arguments,
        "degrees": {
            name: chosen.complexity.degree(name) for name in ("time", "memory", "decode_time", "state")
        },
        "supports": {
            "segment_ids": chosen.supports_segments,
            "attn_bias": chosen.supports_bias,
            "decoding": chosen.is_causal,
        },
        "backends": explanation.splitlines()[1:],
    }
    tables = [
        Table("declared", ["", "formula"], [[name, formula(says[name])] for name in FORMULAS], texts=2),
        Table("options", ["name", "default"], [[n, d] for n, d in arguments.items()], texts=2),
    ]
    if options.json:
        emit(options, data, tables)
        return 0
    print(inspect.getdoc(cls), end="\n\n")
    emit(options, data, tables, after=[explanation])
    return 0


def explained(chosen: Mechanism, options: argparse.Namespace) -> str:
    """Which backend runs on inputs of the sizes that were asked for, and why others do not."""
    kv_heads = options.kv_heads or options.heads
    with blamed():
        q = torch.empty(
            1, options.heads, options.length, options.head_dim, dtype=options.dtype, device=options.device
        )
        k = torch.empty(
            1, kv_heads, options.length, options.head_dim, dtype=options.dtype, device=options.device
        )
        return chosen.explain(q, k, k)


def raise_no_cuda() -> NoReturn:
    """What --device cuda comes to without a GPU."""
    raise CommandError("--device cuda: torch finds no CUDA device here")


def run_env(options: argparse.Namespace) -> int:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise_no_cuda()
    found = environment(device)
    rows = [[name, _shown(name, value)] for name, value in found.items()]
    emit(options, found, [Table("", ["", ""], rows, texts=2)])
    return 0


def _shown(name: str, value: Any) -> str:
    if name == "available_bytes" and value is not None:
        return size_text(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "unknown" if value is None else str(value)
