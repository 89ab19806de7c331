"""How the words of a command line become lengths, mechanisms, models and devices."""

from __future__ import annotations

import argparse
import ast
import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ..mechanisms import MECHANISMS, Mechanism, create_mechanism
from ..planning import DEVICES, MODELS, Device, MechanismSpec, Model, load_device
from ..planning.models import customary_options

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
DTYPES = ("float32", "bfloat16", "float16", "float64")
MOST_LENGTHS = 1000


class CommandError(Exception):
    """What the caller got wrong, in one sentence."""


@contextmanager
def blamed(what: str = "") -> Iterator[None]:
    """Inside, what the library refuses is what the caller got wrong."""
    try:
        yield
    except (ValueError, TypeError, OSError, OverflowError, RuntimeError) as error:
        raise CommandError(f"{what}: {error}" if what else str(error)) from error


def whole(text: str) -> int:
    """A whole number from 1: 4096, 64k or 1M."""
    found = re.fullmatch(r"(-?\d[\d_]*)([kKmMgG]?)", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"must be a whole number such as 4096, 64k or 1M, got {text!r}")
    number = int(found[1]) * UNITS[found[2].lower()]
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def lengths(text: str) -> tuple[int, ...]:
    """Lengths in ascending order: one, several with commas, or FIRST:LAST:xFACTOR or FIRST:LAST:+STEP."""
    found: set[int] = set()
    for part in text.split(","):
        first, *rest = part.split(":")
        found |= {whole(first)} if not rest else set(_range(part, first, rest))
    return tuple(sorted(found))


def _range(part: str, first: str, rest: list[str]) -> Iterator[int]:
    low, high = whole(first), whole(rest[0])
    step = rest[1] if len(rest) == 2 else "x2"
    if len(rest) > 2 or step[:1] not in ("x", "+"):
        raise argparse.ArgumentTypeError(f"must be FIRST:LAST:xFACTOR or FIRST:LAST:+STEP, got {part!r}")
    by = whole(step[1:])
    if low > high:
        raise argparse.ArgumentTypeError(f"must not end before it begins, got {part!r}")
    if step[0] == "x" and by < 2:
        raise argparse.ArgumentTypeError(f"must grow by a factor of at least 2, got {part!r}")
    if step[0] == "+" and (high - low) // by >= MOST_LENGTHS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_LENGTHS} lengths, got {part!r}")
    while low <= high:
        yield low
        low = low * by if step[0] == "x" else low + by


def mechanism(text: str) -> MechanismSpec:
    """NAME or NAME:OPTION=VALUE,..."""
    name, _, options = text.partition(":")
    known(name, MECHANISMS, "mechanism")
    return MechanismSpec(name, assignments(options))


def known(name: str, names: Iterable[str], what: str) -> str:
    """`name`, if it is one of `names`."""
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise argparse.ArgumentTypeError(f"unknown {what} {name!r}, must be one of {', '.join(names)}{hint}")
    return name


def assignments(text: str) -> dict[str, Any]:
    """OPTION=VALUE,...; a value is a number, a flag, a tuple, or else the word that it is."""
    found: dict[str, Any] = {}
    for part in re.split(r",(?![^()\[\]]*[)\]])", text) if text else ():
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise argparse.ArgumentTypeError(f"must be OPTION=VALUE, got {part!r}")
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if re.fullmatch(r"\d+[kKmMgG]", text):
        return whole(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def spelled(spec: MechanismSpec) -> str:
    """`spec` as one writes it on a command line."""
    options = ",".join(f"{name}={value}".replace(" ", "") for name, value in spec.options.items())
    return f"{spec.name}:{options}" if options else spec.name


def model(text: str) -> Model:
    """A well-known model by name, or fields of `planning.Model`, such as num_layers=2,embed_dim=512,num_heads=8."""
    if "=" not in text:
        return MODELS[known(text, MODELS, "model")]
    given = assignments(text)
    allowed = [field.name for field in fields(Model) if field.name != "mechanism"]
    for name in given:
        known(name, allowed, "field of a model")
    try:
        values: dict[str, Any] = {k: dtype(v) if k == "dtype" else v for k, v in given.items()}
        return Model(**values)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error).replace("Model.__init__()", "a model")) from error


def device(text: str) -> Device:
    """An accelerator by name, in any case and spacing, or a file that `calibrate` wrote."""
    by_name = {squeezed(name): found for name, found in DEVICES.items()}
    if squeezed(text) in by_name:
        return by_name[squeezed(text)]
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(DEVICES)}, or a file that efficient-attn calibrate wrote, got {text!r}"
        )
    try:
        return load_device(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def squeezed(name: str) -> str:
    """Without case, spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]", "", name).lower()


def dtype(text: str) -> torch.dtype:
    """A dtype by its name in torch."""
    return getattr(torch, known(text, DTYPES, "dtype"))


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def add_sizes(parser: argparse.ArgumentParser, *, dtype_default: str = "bfloat16") -> None:
    """The sizes of a call, but for its length."""
    add = parser.add_argument
    add("--batch", type=whole, default=1, metavar="N", help="sequences at once (default: 1)")
    add("--heads", type=whole, default=8, metavar="N", help="query heads (default: 8)")
    add("--kv-heads", type=whole, metavar="N", help="key and value heads (default: as many)")
    add("--head-dim", type=whole, default=64, metavar="N", help="features of a head (default: 64)")
    add("--dtype", type=dtype, default=getattr(torch, dtype_default), help=f"(default: {dtype_default})")
    add("--causal", action="store_true", help="causal mechanisms; without it, bidirectional ones")


def layer_of(options: argparse.Namespace) -> Model:
    """One attention layer of the sizes that were asked for, and nothing around it."""
    with blamed():
        return Model(
            1,
            options.heads * options.head_dim,
            options.heads,
            num_kv_heads=options.kv_heads,
            head_dim=options.head_dim,
            ffn_dim=0,
            norm="none",
            is_causal=options.causal,
            dtype=options.dtype,
        )


def built(spec: MechanismSpec, layer: Model, length: int) -> Mechanism:
    """The mechanism for `length` tokens, ready to run; `spec.build` gives one that can only be counted.

    Raises:
        ValueError, TypeError: if it cannot be built.
    """
    return create_mechanism(
        spec.name,
        num_heads=layer.num_heads,
        head_dim=layer.head_dim,
        num_kv_heads=layer.num_kv_heads,
        max_seq_len=length,
        is_causal=layer.is_causal,
        **{**customary_options(spec.name, length), **spec.options},
    )


def specs_of(options: argparse.Namespace, layer: Model, length: int) -> list[MechanismSpec]:
    """The mechanisms that were named, or every one that exists with the layer's causality."""
    if options.mechanisms:
        return list(options.mechanisms)
    found = []
    for name in MECHANISMS:
        spec = MechanismSpec(name)
        try:
            spec.build(layer, length)
        except ValueError:
            continue
        found.append(spec)
    return found


def checked_out(path: Path, *, folder: bool = False) -> Path:
    """`path`, if it can be written. Raises CommandError before anything is computed in vain."""
    with blamed(f"cannot write {path}"):
        if folder:
            path.mkdir(parents=True, exist_ok=True)
            (path / ".probe").touch()
            (path / ".probe").unlink()
            return path
        if path.is_dir():
            raise CommandError(f"cannot write {path}: is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with open(path, "ab"):
            pass
        if not existed:
            path.unlink()
    return path


def with_causality(layer: Model, causal: bool) -> Model:
    """`layer`, causal or not."""
    return replace(layer, is_causal=causal)


def plain_dtype(found: torch.dtype) -> str:
    """Its name in torch."""
    return str(found).removeprefix("torch.")
