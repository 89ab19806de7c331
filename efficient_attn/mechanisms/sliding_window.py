"""A window around each query."""

from __future__ import annotations

from typing import Any

from ..complexity import Complexity
from ..inputs import check_positive
from ..masks import Mask, Sinks, Window
from .base import Mechanism
from .families import SoftmaxMechanism


class SlidingWindowAttention(SoftmaxMechanism):
    """Each query attends to the keys fewer than `window_size` positions away.

        out_i = sum_j softmax_j(scale q_i . k_j) v_j    over |i - j| < window_size, or j < num_sinks

    Exact softmax attention within the pattern. A causal query sees `window_size` keys, itself included.
    Time O(L w E), state O(w E). Beltagy et al., "Longformer", 2020, arXiv:2004.05150, section 3.1; sinks: Xiao et
    al., "Efficient Streaming Language Models with Attention Sinks", 2023, arXiv:2309.17453, section 3.2.

    Args:
        window_size: keys visible on each side, in tokens, self included.
        num_sinks: the first tokens, which every query sees beside its window; counted from each row's first
            valid key, so that left padding moves nothing.
        is_causal: whether a query sees only keys at or before its position.
        scale: of the scores; 1 / sqrt(E) if None.
        dropout_p: probability of dropping a weight, in training mode.
        backend: "auto", "triton", "blocked" or "reference".
    Raises:
        ValueError: if window_size < 1, num_sinks < 0, or another option is out of range.
    """

    complexity = Complexity(
        time="L*w*E", memory="L*E", decode_time="w*E", state="w*E", path="L/(w-1)",
        exactness="exact within a pattern", knob="window_size", sent="2*w*E*(P-1)/P", symbols={"w": "window_size"},
    )  # fmt: skip

    def __init__(
        self,
        window_size: int,
        *,
        num_sinks: int = 0,
        is_causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        backend: str = "auto",
    ) -> None:
        mask: Mask = Window(check_positive("window_size", window_size))
        if check_positive("num_sinks", num_sinks, least=0):
            mask = mask | Sinks(num_sinks)
        super().__init__(
            mask,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            backend=backend,
            retained=(window_size, num_sinks),
        )
        self.window_size = window_size
        self.num_sinks = num_sinks

    def _describe(self) -> dict[str, Any]:
        return {"window_size": self.window_size, "num_sinks": self.num_sinks or None}

    def exact_limit(self, seq_len: int) -> Mechanism | None:
        return type(self)(
            max(seq_len, 1),
            num_sinks=self.num_sinks,
            is_causal=self.is_causal,
            scale=self.scale,
            backend=self.backend,
        )

    @classmethod
    def examples(cls, seq_len: int, num_heads: int, head_dim: int) -> list[Mechanism]:
        some = max(1, seq_len // 6)
        return [
            cls(some),
            cls(some, is_causal=True),
            cls(some, num_sinks=3, is_causal=True),
            cls(some, num_sinks=2),
            cls(1, is_causal=True, scale=0.3),
        ]
