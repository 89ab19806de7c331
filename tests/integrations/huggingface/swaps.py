"""The swaps that most tests try: each mechanism, with options that fit tiny models."""

from __future__ import annotations

from typing import Any

CAUSAL_SWAPS: dict[str, dict[str, Any]] = {
    "full": {},
    "flash": {},
    "sliding_window": {"window_size": 5, "num_sinks": 2},
    "longformer": {"window_size": 4, "global_tokens": 2},
    "bigbird": {"block_size": 4},
    "sparse_transformer": {"pattern": "fixed", "stride": 4},
    "linear": {},
    "performer": {},
}
SWAPS: dict[str, dict[str, Any]] = {**CAUSAL_SWAPS, "linformer": {"rank": 8, "max_seq_len": 64}}
CONSTANT_STATE = ("sliding_window", "longformer", "linear", "performer")
"""Those whose decode state has one size at any length."""
