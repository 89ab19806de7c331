"""Measuring what this machine can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .devices import Device


def calibrate(
    device: str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    mechanisms: Sequence[str] = (),
    seconds: float = 1.0,
    path: str | Path | None = None,
) -> Device:
    """Measure matrix products and copies on this machine, and return them as a Device of kind "measured".

    The rate of a product is the best of square sizes from 256 to 4096, the bandwidth that of copying 256 MiB (read
    once and written once). Provenance (processor, threads, torch, date, sizes, spread) goes into `source`.

    Args:
        device: "cpu" or "cuda".
        dtype: of the products.
        mechanisms: names from MECHANISMS whose own rates to measure, too.
        seconds: for each measurement, about.
        path: where to store it as JSON, to be read again by `load_device`.
    Raises:
        ValueError: for an unknown device or mechanism.
    """
    raise NotImplementedError


def save_device(device: Device, path: str | Path) -> None:
    """Store a Device as JSON."""
    raise NotImplementedError


def load_device(path: str | Path) -> Device:
    """The Device stored at `path`.

    Raises:
        ValueError: if the file holds no Device, with what is wrong.
    """
    raise NotImplementedError
