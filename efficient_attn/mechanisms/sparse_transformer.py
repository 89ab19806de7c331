"""The two factorised patterns of the Sparse Transformer."""

from __future__ import annotations

from typing import Any

from ..complexity import Complexity
from ..inputs import check_positive
from ..masks import Fixed, Mask, Strided
from .base import Mechanism
from .families import SoftmaxMechanism

PATTERNS = ("strided", "fixed")


class SparseTransformerAttention(SoftmaxMechanism):
    """A local part and a part that jumps by `stride`; two layers connect every pair of positions.

        strided: |i - j| < stride, or (i - j) % stride == 0
        fixed:   i // stride == j // stride, or j % stride >= stride - summary

    Exact softmax attention within the pattern, the union of both parts in every head; causality, if asked for,
    on top. Time O(L (s + L / s) E), so O(L sqrt(L) E) for stride ~ sqrt(L). State O(L E).
    Child et al., "Generating Long Sequences with Sparse Transformers", 2019, arXiv:1904.10509, section 4.3.

    Args:
        pattern: "strided" (for data with a period, such as images) or "fixed" (for text).
        stride: period of the pattern, in tokens; fixed blocks count from each row's first valid key.
        summary: fixed only: last positions of each block that everything attends to.
        is_causal: whether a query sees only keys at or before its position.
        scale: of the scores; 1 / sqrt(E) if None.
        dropout_p: probability of dropping a weight, in training mode.
        backend: "auto", "triton", "blocked" or "reference".
    Raises:
        ValueError: if the pattern is unknown, or a size is out of range.
    """

    complexity = Complexity(
        time="L*(s+L/s)*E", memory="L*E", decode_time="(s+L/s)*E", state="L*E", path="2",
        exactness="exact within a pattern", knob="stride", symbols={"s": "stride"},
    )  # fmt: skip

    def __init__(
        self,
        pattern: str,
        stride: int,
        *,
        summary: int = 1,
        is_causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        backend: str = "auto",
    ) -> None:
        if pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {list(PATTERNS)}, got {pattern!r}")
        check_positive("stride", stride)
        check_positive("summary", summary)
        if summary > stride:
            raise ValueError(f"summary must be at most stride ({stride}), got {summary}")
        if pattern == "strided" and summary != 1:
            raise ValueError(f"summary belongs to the fixed pattern; the strided one has none, got {summary}")
        mask: Mask = Strided(stride) if pattern == "strided" else Fixed(stride, summary)
        super().__init__(mask, is_causal=is_causal, scale=scale, dropout_p=dropout_p, backend=backend)
        self.pattern = pattern
        self.stride = stride
        self.summary = summary

    def _describe(self) -> dict[str, Any]:
        summary = self.summary if self.pattern == "fixed" else None
        return {"pattern": self.pattern, "stride": self.stride, "summary": summary}

    def exact_limit(self, seq_len: int) -> Mechanism | None:
        stride = max(seq_len, self.stride)
        return type(self)(
            self.pattern,
            stride,
            summary=self.summary,
            is_causal=self.is_causal,
            scale=self.scale,
            backend=self.backend,
        )

    @classmethod
    def examples(cls, seq_len: int, num_heads: int, head_dim: int) -> list[Mechanism]:
        stride = max(2, round(seq_len**0.5))
        return [
            cls("strided", stride),
            cls("strided", stride, is_causal=True),
            cls("fixed", stride, summary=2),
            cls("fixed", stride, is_causal=True),
        ]
