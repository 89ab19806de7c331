"""Full softmax attention."""

from __future__ import annotations

from ..complexity import Complexity
from ..masks import Everything
from ..ops.softmax import FULL_BACKENDS
from .base import Mechanism
from .families import SoftmaxMechanism


class FullAttention(SoftmaxMechanism):
    """Every query attends to every key, or to every key up to itself.

        out_i = sum_j softmax_j(scale q_i . k_j + attn_bias_ij) v_j

    Exact. Time O(L^2 E); memory O(L E) where torch has a fused kernel for the case, else O(L^2). State O(L E).
    Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.2.1.

    Args:
        is_causal: whether a query sees only keys at or before its position.
        scale: of the scores; 1 / sqrt(E) if None.
        dropout_p: probability of dropping a weight, in training mode.
        backend: "auto", "sdpa" or "reference".
    Raises:
        ValueError: if an option is out of range.
    """

    backends = FULL_BACKENDS
    supports_bias = True
    # torch's fused CPU kernel gives infinite gradients for logits of 1e9.
    largest_input = 1000.0
    complexity = Complexity(
        time="L**2*E", memory="L**2", decode_time="L*E", state="L*E", path="1", exactness="exact"
    )

    def __init__(
        self,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(Everything(), is_causal=is_causal, scale=scale, dropout_p=dropout_p, backend=backend)

    def exact_limit(self, seq_len: int) -> Mechanism | None:
        return type(self)(is_causal=self.is_causal, scale=self.scale, backend=self.backend)

    @classmethod
    def examples(cls, seq_len: int, num_heads: int, head_dim: int) -> list[Mechanism]:
        return [cls(), cls(is_causal=True), cls(is_causal=True, scale=0.3)]
