"""`calibrate`: what this machine can do, as a device that the other commands take."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from ..benchmarking.tables import Table, size_text
from ..mechanisms import MECHANISMS
from ..planning import calibrate, save_device
from .arguments import add_json, blamed, checked_out, dtype, known
from .describe import raise_no_cuda
from .output import count_text, emit, say

DEFAULT_OUT = Path("device.json")


def add_to(commands: Any) -> None:
    """The command."""
    parser = commands.add_parser("calibrate", help="measure products and copies here, for --on")
    parser.add_argument("mechanisms", nargs="*", type=mechanism_name, help="measure their own rates, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--dtype", type=dtype, default=torch.float32, help="(default: float32)")
    parser.add_argument(
        "--seconds", type=seconds, default=1.0, help="for each measurement, about (default: 1)"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"(default: {DEFAULT_OUT})")
    add_json(parser)
    parser.set_defaults(run=run)


def mechanism_name(text: str) -> str:
    return known(text, MECHANISMS, "mechanism")


def seconds(text: str) -> float:
    """A positive number."""
    from argparse import ArgumentTypeError

    try:
        number = float(text)
    except ValueError:
        raise ArgumentTypeError(f"must be a number of seconds, got {text!r}") from None
    if not 0 < number < 3600:
        raise ArgumentTypeError(f"must be above 0 and below 3600, got {text}")
    return number


def run(options: Namespace) -> int:
    checked_out(options.out)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise_no_cuda()
    with blamed():
        found = calibrate(
            options.device, dtype=options.dtype, mechanisms=options.mechanisms, seconds=options.seconds
        )
        save_device(found, options.out)
    rows = [
        ["matrix products", f"{count_text(found.flops_per_second)}FLOP/s"],
        ["copies", f"{count_text(found.bytes_per_second)}B/s"],
        ["memory", size_text(found.memory_bytes)],
        ["FLOPs per byte at the ridge", f"{found.balance:.3g}"],
        *([name, f"{count_text(rate)}FLOP/s"] for name, rate in found.mechanism_flops_per_second.items()),
    ]
    emit(options, found, [Table(found.name, ["", found.dtype], rows, found.source, texts=1)])
    say(f"wrote {options.out}; use it with --on {options.out}")
    return 0
