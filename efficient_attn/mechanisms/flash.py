"""Full softmax attention that never writes the matrix."""

from __future__ import annotations

from ..complexity import Complexity
from ..masks import Everything
from ..ops.softmax import FLASH_BACKENDS
from .base import Mechanism
from .families import SoftmaxMechanism


class FlashAttention(SoftmaxMechanism):
    """Full attention computed tile by tile with a running softmax, on whichever kernel can run the case.

        out_i = sum_j softmax_j(scale q_i . k_j) v_j

    Exact. Time O(L^2 E), memory O(L E) for every dtype, head size and mask: where no fused kernel fits, the
    blocked backend does. State O(L E). `explain` says which kernel runs and what each other one objected to.
    Dao et al., "FlashAttention", 2022, arXiv:2205.14135, algorithm 1; Rabe and Staats, "Self-attention Does Not
    Need O(n^2) Memory", 2021, arXiv:2112.05682.

    Args:
        is_causal: whether a query sees only keys at or before its position.
        scale: of the scores; 1 / sqrt(E) if None.
        dropout_p: probability of dropping a weight, in training mode.
        backend: "auto" or one of "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "xformers", "flash_attn",
            "triton", "blocked", "reference".
    Raises:
        ValueError: if an option is out of range.
    """

    backends = FLASH_BACKENDS
    # torch's fused CPU kernel gives infinite gradients for logits of 1e9.
    largest_input = 1000.0
    complexity = Complexity(
        time="L**2*E", memory="L*E", decode_time="L*E", state="L*E", path="1", exactness="exact"
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
        return [
            cls(),
            cls(is_causal=True),
            cls(is_causal=True, scale=0.3, backend="blocked"),
            cls(backend="blocked"),
        ]
