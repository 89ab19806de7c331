"""Measuring what this machine can do."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median

import torch

from ..complexity import Shape
from ..complexity.cost import check_choice
from ..inputs import check_float_dtype
from ..mechanisms import MECHANISMS
from .devices import Device
from .models import MechanismSpec, Model

PRODUCT_SIZES = (256, 512, 1024, 2048, 4096)
COPIED_BYTES = 256 * 2**20
MECHANISM_SHAPE = (8, 2048, 64)
"""Heads, tokens and head size at which mechanisms are measured."""
FORMAT = 1


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
    once and written once), each the median of repeated runs. Provenance (processor, threads, torch, date, sizes) goes
    into `source`.

    Args:
        device: "cpu" or "cuda".
        dtype: of the products.
        mechanisms: names from MECHANISMS whose own rates to measure, too: their forward pass, causal where it can be;
            `estimate_time` takes the backward pass to reach the same rate.
        seconds: for each measurement, about.
        path: where to store it as JSON, to be read again by `load_device`.
    Raises:
        ValueError: for an unknown device or mechanism, or seconds that are not positive.
        RuntimeError: if there is no such device here.
    """
    check_choice("device", device, ("cpu", "cuda"))
    check_float_dtype(dtype)
    for name in mechanisms:
        check_choice("mechanisms", name, tuple(MECHANISMS))
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not seconds > 0:
        raise ValueError(f"seconds must be a positive number, got {seconds!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device='cuda' cannot be measured: torch finds no CUDA device")
    products = {
        size: _product_rate(size, device, dtype, seconds / len(PRODUCT_SIZES)) for size in PRODUCT_SIZES
    }
    size = max(products, key=lambda each: products[each])
    measured = Device(
        _name(device),
        products[size],
        _bandwidth(device, seconds),
        _memory(device),
        dtype=str(dtype).removeprefix("torch."),
        source=_provenance(device, size),
        type="rocm" if device == "cuda" and torch.version.hip else device,
        kind="measured",
        mechanism_flops_per_second={
            MECHANISMS[name].__name__: _mechanism_rate(name, device, dtype, seconds) for name in mechanisms
        },
    )
    if path is not None:
        save_device(measured, path)
    return measured


def save_device(device: Device, path: str | Path) -> None:
    """Store a Device as JSON.

    Raises:
        TypeError: if device is no Device.
    """
    if not isinstance(device, Device):
        raise TypeError(f"device must be a planning.Device, got {type(device).__name__}")
    Path(path).write_text(json.dumps({"format": FORMAT, **asdict(device)}, indent=2) + "\n")


def load_device(path: str | Path) -> Device:
    """The Device stored at `path`.

    Raises:
        ValueError: if the file holds no Device, with what is wrong.
    """
    try:
        stored = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"path must hold a device as JSON, got {path}: {error}") from error
    if not isinstance(stored, dict) or stored.pop("format", None) != FORMAT:
        raise ValueError(f"path must hold a device of format {FORMAT}, got {path}")
    try:
        return Device(**stored)
    except TypeError as error:
        raise ValueError(f"path must hold the fields of a device, got {path}: {error}") from error


def _seconds_of(run: Callable[[], object], device: str, seconds: float) -> float:
    """The median time of a run: one to warm up, then at least three, until `seconds` have passed."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(timed())
    return median(times)


def _product_rate(size: int, device: str, dtype: torch.dtype, seconds: float) -> int:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return int(2 * size**3 / _seconds_of(lambda: torch.mm(a, b), device, seconds))


def _bandwidth(device: str, seconds: float) -> int:
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return int(2 * COPIED_BYTES / _seconds_of(lambda: target.copy_(source), device, seconds))


def _mechanism_rate(name: str, device: str, dtype: torch.dtype, seconds: float) -> int:
    """FLOP/s of a forward pass, of the FLOPs in the basis "model"."""
    heads, tokens, size = MECHANISM_SHAPE
    model = Model(1, heads * size, heads, is_causal=True, dtype=dtype)
    try:
        mechanism = MechanismSpec(name).build(model, tokens)
    except ValueError:  # no causal form
        mechanism = MechanismSpec(name).build(
            Model(1, heads * size, heads, is_causal=False, dtype=dtype), tokens
        )
    if any(x.is_meta for x in (*mechanism.parameters(), *mechanism.buffers())):
        mechanism.to_empty(device=device).reset_parameters()  # type: ignore[operator]
    mechanism = mechanism.to(device=device, dtype=dtype).eval()
    q, k, v = (torch.randn(1, heads, tokens, size, device=device).to(dtype) for _ in range(3))
    flops = mechanism.cost(Shape(1, heads, tokens, tokens, size, dtype=dtype)).flops.forward
    with torch.no_grad():
        return int(flops / _seconds_of(lambda: mechanism(q, k, v), device, seconds))


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else _processor()


def _processor() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal")]
    if not sizes:
        raise RuntimeError("this system does not say how much memory it has; write a planning.Device by hand")
    return sizes[0]


def _provenance(device: str, size: int) -> str:
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return (
        f"measured on {date.today().isoformat()} with torch {torch.__version__} on {platform.system()}{threads}: "
        f"products of {size} x {size}, copies of {COPIED_BYTES // 2**20} MiB"
    )
