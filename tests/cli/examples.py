"""Records and results of a demo, as they would have been measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from efficient_attn.benchmarking.cells import DECODE, FORWARD, TRAINING, Cell
from efficient_attn.benchmarking.records import Records, key_of
from efficient_attn.planning import Device

ENVIRONMENT = {
    "cpu": "A Certain CPU",
    "cores": 2,
    "usable_cores": 2,
    "system": "Linux x86_64",
    "python": "3.11.2",
    "libraries": {"torch": "2.13.0"},
    "sources": "abc",
    "date": "2026-01-02T03:04:05+00:00",
    "load": [0.5, 0.4, 0.3],
}
DEVICE = Device("this machine", 10**11, 10**10, 2**34, dtype="float32", source="a test")


def record(
    subject: str, work: str, length: int, seconds: float, status: str = "ok", reason: str = ""
) -> dict[str, Any]:
    """One record of `bench`."""
    cell = Cell("bench", subject, work, length, positions=(length,) if work == DECODE else ())
    held = {"state_bytes": length * 8} if work == DECODE else {"peak_bytes": length * 4096}
    result = {
        "what": subject,
        "errors": {"output": 1e-7},
        "seconds": [seconds, seconds, seconds * 1.01],
        "spread": 0.01,
        "declared": {"flops": length**2 * 2048, "bytes": length * 8192, "peak_bytes": length * 4000},
        **held,
    }
    return {
        "key": key_of(cell, {}),
        "cell": cell.identity,
        "target": None,
        "environment": ENVIRONMENT,
        "status": status,
        "reason": reason,
        "result": result if status in ("ok", "unstable") else {},
    }


RECORDS = [
    *(record("full", FORWARD, n, 1e-9 * n * n) for n in (1024, 2048, 4096)),
    *(record("linear", FORWARD, n, 1e-6 * n) for n in (1024, 2048, 4096)),
    record("sliding_window:window_size=128", FORWARD, 1024, 5e-4),
    record("full", TRAINING, 1024, 4e-3),
    record("linear", TRAINING, 1024, 3e-3, "unstable", "half of 9 samples span 60% of the median"),
    record("full causal", DECODE, 4096, 2e-5),
    record("full", FORWARD, 1 << 20, 0.0, "oom", "MemoryError: <script>alert('no')</script>"),
]


def written(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    for each in records:
        Records(path).append(each)
    return path


def model(bits: float, speed: float, slope: float) -> dict[str, Any]:
    """What the demo found of one language model."""
    return {
        "bits_per_character": bits,
        "history": [[100, bits + 0.5], [400, bits]],
        "delta_to_full": bits - 2.6,
        "delta_standard_error": 0.01,
        "crossover_length": 1024 if slope < 2 else None,
        "train_tokens_per_second": speed,
        "train_step_peak_bytes": 10**8,
        "audit": {"exact": True},
        "scaling": {str(n): {"forward_backward_seconds": 1e-6 * n**slope} for n in (512, 4096)},
        "state_bytes": {"declared": {"512": 2**20, "16384": 2**24}},
        "sample": {"prompt": "The value of", "continuation": " <b>& the </b>"},
    }


DEMO = {
    "settings": {
        "context": 512,
        "steps": 400,
        "batch_size": 2,
        "scaling_lengths": [512, 4096],
        "state_lengths": [16_384],
    },
    "data": {"source": "a text", "evaluated_bytes": 16_384},
    "bigram_bits_per_character": 3.35,
    "mechanisms": {
        "full": model(2.6, 9000, 2),
        "linear": model(3.2, 12_000, 1),
        "sliding_window": model(2.5, 11_000, 1),
    },
}


def demo(path: Path) -> Path:
    path.write_text(json.dumps(DEMO))
    return path
