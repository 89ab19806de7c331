"""What the bad calls are made on: small good tensors and mechanisms, to be spoilt one argument at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from efficient_attn import FullAttention, LinearAttention, LinformerAttention, Shape, SlidingWindowAttention

Case = tuple[Callable[[], object], type[Exception], str]
"""A call, the type that it must raise, and the message, in which `...` stands for any text."""

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, HEAD_DIM = 2, 4, 2, 5, 6, 8

Q = torch.randn(BATCH, HEADS, QUERIES, HEAD_DIM)
K, V = torch.randn(2, BATCH, KV_HEADS, KEYS, HEAD_DIM)
NEW_K, NEW_V = K[:, :, 1:], V[:, :, 1:]
MASK = torch.ones(BATCH, KEYS, dtype=torch.bool)
SEGMENTS = torch.zeros(BATCH, KEYS, dtype=torch.int64)
BIAS = torch.zeros(QUERIES, KEYS)
SHAPE = Shape(BATCH, HEADS, QUERIES, KEYS, HEAD_DIM)

FULL, CAUSAL = FullAttention(), FullAttention(is_causal=True)
WINDOW, CAUSAL_WINDOW = SlidingWindowAttention(2), SlidingWindowAttention(2, is_causal=True)
LINEAR, EXP = (LinearAttention(feature_map=name, is_causal=True) for name in ("elu", "exp"))
LINFORMER = LinformerAttention(KEYS, HEADS, rank=3)
