"""Where a number was measured: the machine, the versions, the sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
"""The folder that holds the package."""


@dataclass(frozen=True)
class Origin:
    """What decides the numbers of one kind of measurement, besides the machine.

    Args:
        sources: files and folders under ROOT: a change in them makes old records those of another version.
        without: folders among them that decide none.
        libraries: those whose versions count.
    """

    sources: tuple[str, ...] = ("efficient_attn",)
    without: tuple[str, ...] = ("efficient_attn/cli", "efficient_attn/planning")
    libraries: tuple[str, ...] = ("torch", "numpy")


PACKAGE = Origin()
GPU_LIBRARIES = ("triton", "xformers", "fla-core")
FLAGS = (
    *("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx_vnni", "avx512_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "sve", "sve2", "bf16", "i8mm"),
)
VOLATILE = ("date", "load", "commit", "dirty", "available_bytes", "gpu_now")
"""What may change without making it another environment; of the sources, the digest counts."""


def environment(device: str = "cpu", origin: Origin = PACKAGE) -> dict[str, Any]:
    """What a reader of a number measured on `device` wants to know, as JSON."""
    import torch  # here, so that a worker starts without it until a cell needs it

    on_gpu = device != "cpu"
    libraries = origin.libraries + (GPU_LIBRARIES if on_gpu else ())
    return {
        **({"gpu": gpu(), "gpu_now": gpu_now()} if on_gpu else {}),
        **machine(),
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "libraries": {name: version for name in libraries if (version := installed(name))},
        "sources": sources_digest(origin),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None
        if (changed := _git("status", "--porcelain", "--", *origin.sources)) is None
        else changed != "",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load": _load_average(),
        "available_bytes": available_bytes(),
    }


def fingerprint(described: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an environment that makes a number incomparable with others."""
    return {name: value for name, value in described.items() if name not in VOLATILE}


def machine() -> dict[str, Any]:
    """The CPU, its cores and the instructions that matter here."""
    model, flags = _cpu_info()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }


def gpu() -> dict[str, Any]:
    """The first CUDA device, and the versions that decide what runs on it."""
    import torch

    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "processors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


GPU_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")


def gpu_now() -> dict[str, str] | None:
    """Clocks, heat, power and the driver of the first device, if nvidia-smi says."""
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader", "--id=0"]
    found = _output(query)
    return None if found is None else dict(zip(GPU_STATE, found.split(", "), strict=False))


def usable_cores() -> int:
    """Cores that this process may run on: `taskset` and containers give fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_bytes() -> int | None:
    """Memory that can be had without swapping, if the system says."""
    meminfo = _read("/proc/meminfo")
    found = [int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:")]
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        used = _read("/sys/fs/cgroup/memory.current").strip()
        found.append(int(limit) - int(used or 0))
    return min(found, default=None)


def installed(library: str) -> str | None:
    """The version of a library, None if it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def sources_digest(origin: Origin = PACKAGE, root: Path = ROOT) -> str:
    """A digest of every Python file that decides a number."""
    digest = hashlib.sha256()
    without = [root / part for part in origin.without]
    for part in origin.sources:
        path = root / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            if not any(file.is_relative_to(folder) for folder in without):
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _cpu_info() -> tuple[str, set[str]]:
    model, flags = platform.processor() or platform.machine(), set()
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "model name":
            model = value
        if name in ("flags", "Features"):
            flags = set(value.split())
    return model, flags


def _load_average() -> list[float] | None:
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _git(*arguments: str) -> str | None:
    # Installed, the package may lie within somebody else's repository.
    return _output(["git", *arguments]) if (ROOT / ".git").exists() else None


def _output(command: list[str]) -> str | None:
    """What `command` prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
