"""A window around each query, and a few tokens that see and are seen by all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..complexity import Complexity
from ..inputs import check_positive
from ..masks import GlobalTokens, Mask, Window
from .base import Mechanism
from .families import SoftmaxMechanism


class LongformerAttention(SoftmaxMechanism):
    """A sliding window, joined by global tokens that attend to everything and that everything attends to.

        out_i = sum_j softmax_j(scale q_i . k_j) v_j    over |i - j| < window_size, or i global, or j global

    Exact softmax attention within the pattern; causality, if asked for, on top. One projection serves local and
    global scores (the paper has a second one for the global ones). Time O(L (w + g) E). State O((w + g) E) if the
    global tokens are the first ones, else O(L E), because a later global query looks back at everything.
    Beltagy et al., "Longformer", 2020, arXiv:2004.05150, section 3.1.

    Args:
        window_size: keys visible on each side, in tokens, self included.
        global_tokens: the first `global_tokens` positions, or the positions themselves; counted from each row's
            first valid key, so that left padding moves nothing.
        is_causal: whether a query sees only keys at or before its position.
        scale: of the scores; 1 / sqrt(E) if None.
        dropout_p: probability of dropping a weight, in training mode.
        backend: "auto", "triton", "blocked" or "reference".
    Raises:
        ValueError: if window_size < 1, a global position is negative, or another option is out of range.
        TypeError: if global_tokens is neither an int nor a sequence of ints.
    """

    complexity = Complexity(
        time="L*(w+g)*E", memory="L*E", decode_time="(w+g)*E", state="(w+g)*E", path="2",
        exactness="exact within a pattern", knob="window_size", sent="2*(w+g)*E*(P-1)/P",
        symbols={"w": "window_size", "g": "global_tokens"},
    )  # fmt: skip

    def __init__(
        self,
        window_size: int,
        *,
        global_tokens: int | Sequence[int],
        is_causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        backend: str = "auto",
    ) -> None:
        mask: Mask = Window(check_positive("window_size", window_size)) | _global_mask(global_tokens)
        prefix = isinstance(global_tokens, int)
        super().__init__(
            mask,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            backend=backend,
            retained=(window_size, global_tokens) if prefix else None,
        )
        self.window_size = window_size
        if not prefix:
            self.complexity = replace(self.complexity, state="L*E")
        if not global_tokens:
            self.complexity = replace(self.complexity, path="L/(w-1)")
        self.global_tokens = global_tokens if prefix else tuple(global_tokens)

    def _describe(self) -> dict[str, Any]:
        return {"window_size": self.window_size, "global_tokens": self.global_tokens}

    def exact_limit(self, seq_len: int) -> Mechanism | None:
        return type(self)(
            max(seq_len, 1),
            global_tokens=self.global_tokens,
            is_causal=self.is_causal,
            scale=self.scale,
            backend=self.backend,
        )

    @classmethod
    def examples(cls, seq_len: int, num_heads: int, head_dim: int) -> list[Mechanism]:
        some = max(1, seq_len // 6)
        middle = (seq_len // 2, 0, seq_len // 2 + 1)
        return [
            cls(some, global_tokens=2),
            cls(some, global_tokens=3, is_causal=True),
            cls(some, global_tokens=middle),
            cls(some, global_tokens=middle, is_causal=True),
        ]


def _global_mask(global_tokens: int | Sequence[int]) -> GlobalTokens:
    if isinstance(global_tokens, int):
        return GlobalTokens.first(check_positive("global_tokens", global_tokens, least=0))
    if isinstance(global_tokens, (str, bytes)) or not isinstance(global_tokens, Sequence):
        raise TypeError(f"global_tokens must be an int or a sequence of positions, got {global_tokens!r}")
    return GlobalTokens.at(
        tuple(
            check_positive(f"global_tokens[{i}]", position, least=0)
            for i, position in enumerate(global_tokens)
        )
    )
