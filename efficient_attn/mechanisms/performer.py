"""Random features that estimate the softmax kernel."""

from __future__ import annotations

from ..complexity import Complexity
from ..feature_maps import Favor
from ..inputs import check_positive
from .base import Mechanism
from .families import LinearMechanism


class PerformerAttention(LinearMechanism):
    """Linear attention with positive orthogonal random features (FAVOR+).

        out_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j),   E[phi(q) . phi(k)] = exp(q . k / sqrt(E))

    Approximate: the kernel's error falls like 1 / sqrt(num_features), but its variance grows like
    exp(|q + k|^2 / sqrt(E)), so at large norms it is worse than the mean of v; measure before you trust it.
    The causal form sees no future in any bit and stays finite at any input scale: each key carries its own power
    of two; a row whose weights have all underflowed, which norms far beyond sqrt(E) do, is 0.
    Time O(L m E), state O(m E). The projection is a function of `seed`, and never redrawn by itself.
    Choromanski et al., "Rethinking Attention with Performers", 2020, arXiv:2009.14794, section 2.

    Args:
        head_dim: E.
        num_features: m; 4 * head_dim if None.
        seed: selects the projection.
        kernel: "softmax" or "relu" (another operator, which estimates nothing).
        is_causal: whether a query sees only keys at or before its position.
        scale: q is multiplied by scale * sqrt(E); None leaves it alone, which estimates softmax attention.
        backend: "auto", "triton", "chunked" or "reference".
    Raises:
        ValueError: if a size is out of range, the kernel is unknown, or, in forward, E differs from head_dim.
    """

    complexity = Complexity(
        time="L*m*E", memory="L*E+m*E", decode_time="m*E", state="m*E", path="1",
        exactness="approximate", knob="num_features", sent="2*m*E*(P-1)/P",
        symbols={"m": "num_features"},
    )  # fmt: skip
    feature_map: Favor

    def __init__(
        self,
        head_dim: int,
        *,
        num_features: int | None = None,
        seed: int = 0,
        kernel: str = "softmax",
        is_causal: bool = False,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        features = 4 * check_positive("head_dim", head_dim) if num_features is None else num_features
        feature_map = Favor(head_dim, features, seed=seed, kernel=kernel)
        super().__init__(feature_map, is_causal=is_causal, scale=scale, backend=backend)
        self.kernel = kernel
        self.head_dim = head_dim
        self.num_features = features

    def reset_parameters(self) -> None:
        """Draw the projection of the seed again: after `to_empty`, or instead of a loaded one."""
        self.feature_map.reset_parameters()

    @classmethod
    def examples(cls, seq_len: int, num_heads: int, head_dim: int) -> list[Mechanism]:
        return [
            cls(head_dim, num_features=2 * head_dim),
            cls(head_dim, num_features=2 * head_dim + 3, seed=1, is_causal=True),
            cls(head_dim, num_features=head_dim, kernel="relu", is_causal=True),
            cls(head_dim, kernel="relu", scale=0.3),
        ]
