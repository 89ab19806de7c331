"""What a command prints: tables for people, or one JSON object for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..benchmarking.tables import Table, show, three

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def emit(
    options: argparse.Namespace, data: Any, tables: Sequence[Table], *, after: Sequence[str] = ()
) -> None:
    """Print `data` as JSON if that was asked for, else the tables and what is to be said after them."""
    if options.json:
        print(json.dumps(as_json(data), indent=2, allow_nan=False))
        return
    show(tables)
    for line in after:
        print(line)


def say(text: str) -> None:
    """To whoever waits: not part of the result."""
    print(text, file=sys.stderr, flush=True)


def as_json(value: Any) -> Any:
    """What JSON has instead: string keys, lists, and null for what is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return as_json(named)
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_json(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def count_text(number: float) -> str:
    """A large number by powers of a thousand: 3.22 G."""
    for size, prefix in PREFIXES:
        if abs(number) >= size:
            return f"{three(number / size)} {prefix}"
    return f"{number:,.0f}" if float(number).is_integer() else three(number)


def seconds_text(seconds: float) -> str:
    """3.2 s, 4.1 ms, 12 µs; above two minutes in minutes."""
    if seconds >= 7200:
        return f"{three(seconds / 3600)} h"
    if seconds >= 120:
        return f"{three(seconds / 60)} min"
    for size, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{three(seconds / size)} {unit}"
    return f"{three(seconds / 1e-9)} ns" if seconds else "0"


def times_text(ratio: float) -> str:
    """How many times as much."""
    return f"{three(ratio)}x"
