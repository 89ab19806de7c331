"""Keys and values compressed along the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import inputs
from ..complexity import Complexity, Cost, Shape
from ..masks import Everything
from ..ops.compress import COMPRESSED_BACKENDS, CompressedProblem, compressed_cost, compressed_matrix
from .base import Mechanism

SHARING = ("headwise", "key-value", "none")


class LinformerAttention(Mechanism):
    """Full attention to `rank` learnt mixtures of the keys and values.

        out = softmax(scale q (E^T k)^T) (F^T v),   E and F of shape (max_seq_len, rank)

    Approximate: a low-rank operator with learnt parameters, so a swapped model needs finetuning. The rows of its
    matrix do not sum to 1. Never causal: every compressed key mixes the whole sequence, the future included.
    Time O(L k E). Wang et al., "Linformer", 2020, arXiv:2006.04768, equation 7 and section 4 (sharing).

    Args:
        max_seq_len: the longest sequence, in tokens; shorter ones use the first rows of E and F, counted from
            each row's first valid key.
        num_heads: heads of q.
        rank: compressed length; may exceed max_seq_len.
        sharing: "headwise" (one E and one F for all heads), "key-value" (moreover F is E) or "none" (an E and an
            F for each key-value head).
        num_kv_heads: heads of k and v; num_heads if None.
        is_causal: False; True is refused.
        scale: of the scores; 1 / sqrt(E) if None.
        dropout_p: probability of dropping a weight, in training mode.
        backend: "auto", "sdpa" or "reference".
    Raises:
        ValueError: if is_causal, if an option is out of range, or, in forward, if S > max_seq_len.
    """

    backends = COMPRESSED_BACKENDS
    supports_segments = False
    rows_sum_to_one = False
    anchored = True
    largest_input = 1000.0  # as in FullAttention, by the same fused kernels
    complexity = Complexity(
        time="L*k*E",
        memory="L*E+k*E",
        decode_time="0",
        state="0",
        path="1",
        exactness="approximate",
        knob="rank",
        sent="4*k*E*(P-1)/P",
        symbols={"k": "rank"},
    )
    key_projection: nn.Parameter
    value_projection: nn.Parameter | None

    def __init__(
        self,
        max_seq_len: int,
        num_heads: int,
        *,
        rank: int = 256,
        sharing: str = "headwise",
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(is_causal=is_causal, scale=scale, backend=backend)
        if is_causal:
            raise ValueError(
                "is_causal must be False: each compressed key of Linformer mixes the whole sequence, so every output "
                "would see the future"
            )
        self.max_seq_len = inputs.check_positive("max_seq_len", max_seq_len)
        self.num_heads = inputs.check_positive("num_heads", num_heads)
        self.rank = inputs.check_positive("rank", rank)
        kv_heads = num_heads if num_kv_heads is None else inputs.check_positive("num_kv_heads", num_kv_heads)
        if num_heads % kv_heads:
            raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
        if sharing not in SHARING:
            raise ValueError(f"sharing must be one of {list(SHARING)}, got {sharing!r}")
        self.sharing = sharing
        self.num_kv_heads = kv_heads if sharing == "none" else None
        self.dropout_p = inputs.check_probability("dropout_p", dropout_p)
        shape = (max_seq_len, rank) if sharing != "none" else (kv_heads, max_seq_len, rank)
        self.key_projection = nn.Parameter(torch.empty(shape))
        # One parameter, not two names of one: tied names come apart on to_empty and load_state_dict(assign=True).
        self.value_projection = None if sharing == "key-value" else nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Entries of variance 1 / rank, for which compression keeps inner products in expectation (theorem 2)."""
        for projection in self.parameters():
            nn.init.normal_(projection, std=self.rank**-0.5)

    def _problem(self, q, k, v, key_mask, segment_ids, q_offset, attn_bias) -> CompressedProblem:  # type: ignore[no-untyped-def]
        common = self._common(q, k, v, key_mask, segment_ids, q_offset, attn_bias)
        self._check_sizes("k", k.shape[2], k.shape[1])
        return CompressedProblem(
            **common,
            mask=Everything(),
            key_projection=self.key_projection,
            value_projection=self.key_projection if self.value_projection is None else self.value_projection,
            dropout_p=self.dropout_p or 0.0 if self.training else 0.0,
        )

    def _check_sizes(self, name: str, num_keys: int, num_kv_heads: int) -> None:
        if self.max_seq_len is not None and num_keys > self.max_seq_len:
            raise ValueError(
                f"{name} must have at most max_seq_len = {self.max_seq_len} positions, got {num_keys}"
            )
        if self.num_kv_heads is not None and self.num_kv_heads != num_kv_heads:
            raise ValueError(
                f"{name} must have num_kv_heads = {self.num_kv_heads} heads, each with its own projections "
                f"(sharing='none'), got {num_kv_heads}"
            )

    def matrix(self, q, k, *, key_mask=None, segment_ids=None, q_offset=None, attn_bias=None) -> Tensor:  # type: ignore[no-untyped-def]
        return compressed_matrix(self._problem(q, k, k, key_mask, segment_ids, q_offset, attn_bias))

    def _cost(self, shape: Shape, training: bool, phase: str, basis: str, backend: str) -> Cost:
        self._check_sizes("shape", shape.kv_len, shape.num_kv_heads)
        num_params = sum(p.numel() for p in self.parameters())
        return compressed_cost(self.rank, self.num_kv_heads or 1, num_params, shape, training, basis, backend)

    def exact_limit(self, seq_len: int) -> Mechanism | None:
        """E = F = identity: nothing is compressed. Only on exactly `seq_len` tokens, all of them valid."""
        size = max(seq_len, 1)
        limit = type(self)(
            size,
            self.num_heads,
            rank=size,
            sharing=self.sharing,
            num_kv_heads=self.num_kv_heads,
            scale=self.scale,
            backend=self.backend,
        )
        with torch.no_grad():
            for projection in limit.parameters():
                projection.copy_(torch.eye(size).expand_as(projection))
        return limit

    @classmethod
    def examples(cls, seq_len: int, num_heads: int, head_dim: int) -> list[Mechanism]:
        rank = max(1, seq_len // 4)
        return [
            cls(seq_len, num_heads, rank=rank),
            cls(seq_len, num_heads, rank=rank, sharing="key-value", scale=0.3),
            cls(2 * seq_len, num_heads, rank=rank, sharing="none"),
        ]

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {
            "max_seq_len": self.max_seq_len,
            "num_heads": self.num_heads,
            "rank": self.rank,
        }
        return ", ".join(f"{name}={value!r}" for name, value in {**shown, "sharing": self.sharing}.items())
