"""Linear attention: a kernel in place of the softmax."""

from __future__ import annotations

from ..complexity import Complexity
from ..feature_maps import FEATURE_MAPS, FeatureMap
from .base import Mechanism
from .families import LinearMechanism


class LinearAttention(LinearMechanism):
    """Weights are inner products of non-negative features, so the sum over keys is a matrix of fixed size.

        out_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j)    over all j, or j <= i if causal

    A different operator from softmax attention: a swapped model needs finetuning. Time O(L E^2), state O(E^2).
    No epsilon: a row is 0 only where its weights have underflowed (below 2^-100 in fp32).
    Features and sums are kept in fp32 (fp64 for fp64 inputs).
    Katharopoulos et al., "Transformers are RNNs", 2020, arXiv:2006.16236, equations 5 to 12.

    Args:
        feature_map: "elu" (elu + 1), "relu", "squared_relu", "exp", or a FeatureMap.
        is_causal: whether a query sees only keys at or before its position.
        scale: q is multiplied by scale * sqrt(E); None leaves it alone.
        backend: "auto", "triton", "chunked" or "reference".
    Raises:
        ValueError: if the feature map is unknown, or another option is out of range.
    """

    complexity = Complexity(
        time="L*E**2",
        memory="L*E",
        decode_time="E**2",
        state="E**2",
        path="1",
        exactness="different operator",
        sent="2*E**2*(P-1)/P",
    )

    def __init__(
        self,
        *,
        feature_map: str | FeatureMap = "elu",
        is_causal: bool = False,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        if isinstance(feature_map, str):
            if feature_map not in FEATURE_MAPS:
                raise ValueError(
                    f"feature_map must be one of {sorted(FEATURE_MAPS)} or a FeatureMap, got {feature_map!r}"
                )
            feature_map = FEATURE_MAPS[feature_map]()
        elif not isinstance(feature_map, FeatureMap):
            raise TypeError(f"feature_map must be a name or a FeatureMap, got {type(feature_map).__name__}")
        super().__init__(feature_map, is_causal=is_causal, scale=scale, backend=backend)

    def extra_repr(self) -> str:
        return f"feature_map={self.feature_map.name!r}, {super().extra_repr()}"

    @classmethod
    def examples(cls, seq_len: int, num_heads: int, head_dim: int) -> list[Mechanism]:
        return [
            cls(),
            cls(is_causal=True),
            cls(feature_map="relu", is_causal=True),
            cls(feature_map="squared_relu", is_causal=True),
            cls(feature_map="exp", is_causal=True, scale=0.3),
            cls(feature_map="exp"),
        ]
