"""What decides the numbers of these benchmarks."""

from __future__ import annotations

from typing import Any

from efficient_attn.benchmarking.environment import Origin, environment

BENCHMARKS = Origin(
    sources=("efficient_attn", "benchmarks/measure", "benchmarks/peers", "benchmarks/subjects.py"),
    libraries=(
        "torch",
        "numpy",
        "performer-pytorch",
        "linformer",
        "local-attention",
        "pytorch-fast-transformers",
    ),
)


def described(device: str = "cpu") -> dict[str, Any]:
    """The environment of a benchmark on `device`."""
    return environment(device, BENCHMARKS)
