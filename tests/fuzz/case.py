"""What a random case is: one call of one mechanism, and what is checked about it, as one line that can be rerun."""

from __future__ import annotations

import ast
from dataclasses import MISSING, dataclass, fields
from typing import Any


@dataclass(frozen=True, repr=False)
class Case:
    """A call described by plain values; equal cases have equal contents, bit for bit."""

    mechanism: str
    """Its name in MECHANISMS."""
    options: dict[str, Any]
    """Of its constructor."""
    checks: tuple[str, ...] = ("output",)
    """Names in `fuzz.checks.CHECKS`."""
    backend: str = "auto"
    dtype: str = "float64"
    cast: bool = False
    """Whether the parameters are cast to `dtype`."""
    training: bool = False
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 1
    kv_len: int = 1
    head_dim: int = 1
    v_head_dim: int = 1
    q_offset: int | None = None
    tensor_offset: bool = False
    key_mask: str = ""
    segments: str = ""
    bias: str = ""
    masked: str = ""
    """What stands at keys that are masked; ordinary contents if empty."""
    magnitudes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of q, k and v: normal at 1, else uniform up to there with many at the limit."""
    shift: float = 0.0
    """Added to q and k."""
    layout: str = ""
    """How q, k, v and the incoming gradient lie in memory; contiguous if empty."""
    chunks: tuple[int, ...] = ()
    """Into which `step` divides the sequence."""
    cut: int = 0
    """The first position of what is replaced as the future."""
    seed: int = 0
    """Of all contents and parameters."""
    planted: str = ""
    """A defect of tests/planted to break the mechanism with: what the battery itself is tested on."""

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.default is MISSING or getattr(self, field.name) != field.default
        ]
        return f"Case({', '.join(shown)})"

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case whose repr is `text`; only literals are evaluated."""
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError(f"expected Case(name=value, ...), got {text!r}")
        return cls(**{str(pair.arg): ast.literal_eval(pair.value) for pair in call.keywords})

    @property
    def command(self) -> str:
        """What runs this case again, from the root of the repository."""
        return f'PYTHONPATH=tests .venv/bin/python -m fuzz "{self!r}"'
