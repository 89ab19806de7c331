"""Steps, states, costs and packed sequences that must be refused."""

from __future__ import annotations

import torch

from efficient_attn import LinformerAttention, Shape, SlidingWindowAttention, segment_ids_from_cu_seqlens

from .subjects import (
    BATCH,
    CAUSAL,
    CAUSAL_WINDOW,
    EXP,
    FULL,
    HEAD_DIM,
    HEADS,
    KEYS,
    KV_HEADS,
    LINEAR,
    LINFORMER,
    MASK,
    NEW_K,
    NEW_V,
    SHAPE,
    Case,
    K,
    Q,
    V,
)

SIZES = (BATCH, KV_HEADS, HEAD_DIM)
STATE, WINDOW_STATE, LINEAR_STATE = (m.init_state(*SIZES) for m in (CAUSAL, CAUSAL_WINDOW, LINEAR))

CANNOT = "is not causal: decoding (init_state, step) needs is_causal=True"
TOKENS_ARE = "torch.float32 on cpu for these tokens, got"


def step(mechanism, state, **options: object) -> object:  # type: ignore[no-untyped-def]
    return mechanism.step(Q, NEW_K, NEW_V, state, **options)


STEPS: list[Case] = [
    (lambda: FULL.init_state(*SIZES), ValueError, f"FullAttention {CANNOT}"),
    (lambda: step(FULL, STATE), ValueError, f"FullAttention {CANNOT}"),
    (lambda: LINFORMER.init_state(*SIZES), ValueError, f"LinformerAttention {CANNOT}"),
    (
        lambda: CAUSAL.step(Q, K, V, STATE),
        ValueError,
        "q, k and v must have one length in step, got 5 queries, 6 keys",
    ),
    (
        lambda: CAUSAL.step(Q[0], NEW_K, NEW_V, STATE),
        ValueError,
        "q must have 4 dimensions (...), got (4, 5, 8)",
    ),
    (lambda: step(CAUSAL, None), TypeError, "state must be a KVState, got NoneType"),
    (lambda: step(CAUSAL, LINEAR_STATE), TypeError, "state must be a KVState, got LinearState"),
    (lambda: step(CAUSAL_WINDOW, STATE), TypeError, "state must be a WindowState, got KVState"),
    (lambda: step(LINEAR, WINDOW_STATE), TypeError, "state must be a LinearState, got WindowState"),
    (
        lambda: step(CAUSAL, CAUSAL.init_state(3, KV_HEADS, HEAD_DIM)),
        ValueError,
        f"state.k must be (2, 2, 0, 8), {TOKENS_ARE} (3, 2, 0, 8), torch.float32 on cpu",
    ),
    (
        lambda: step(CAUSAL, CAUSAL.init_state(BATCH, HEADS, HEAD_DIM)),
        ValueError,
        f"state.k must be (2, 2, 0, 8), {TOKENS_ARE} (2, 4, 0, 8), torch.float32 on cpu",
    ),
    (
        lambda: step(CAUSAL, CAUSAL.init_state(*SIZES, v_head_dim=3)),
        ValueError,
        f"state.v must be (2, 2, 0, 8), {TOKENS_ARE} (2, 2, 0, 3), torch.float32 on cpu",
    ),
    (
        lambda: step(CAUSAL, CAUSAL.init_state(*SIZES, dtype=torch.float64)),
        ValueError,
        f"state.k must be (2, 2, 0, 8), {TOKENS_ARE} (2, 2, 0, 8), torch.float64 on cpu",
    ),
    (
        lambda: step(CAUSAL_WINDOW, CAUSAL_WINDOW.init_state(*SIZES, device="meta")),
        ValueError,
        f"state.k must be (2, 2, 1, 8), {TOKENS_ARE} (2, 2, 1, 8), torch.float32 on meta",
    ),
    (
        lambda: step(CAUSAL_WINDOW, SlidingWindowAttention(4, is_causal=True).init_state(*SIZES)),
        ValueError,
        f"state.k must be (2, 2, 1, 8), {TOKENS_ARE} (2, 2, 3, 8), torch.float32 on cpu",
    ),
    (
        lambda: step(LINEAR, LINEAR.init_state(BATCH, KV_HEADS, 4)),
        ValueError,
        f"state.kv must be (2, 2, 8, 9), {TOKENS_ARE} (2, 2, 4, 5), torch.float32 on cpu",
    ),
    (
        lambda: step(LINEAR, EXP.init_state(*SIZES)),
        ValueError,
        "state.exponent must be NoneType, got Tensor: it is the state of another mechanism",
    ),
    (
        lambda: step(EXP, LINEAR_STATE),
        ValueError,
        "state.exponent must be Tensor, got NoneType: it is the state of another mechanism",
    ),
    (
        lambda: step(CAUSAL, STATE, key_mask=MASK),
        ValueError,
        "key_mask must have shape (batch, keys) = (2, 5), got (2, 6)",
    ),
    (
        lambda: step(LINEAR, LINEAR_STATE, key_mask=MASK[:, 1:].int()),
        TypeError,
        "key_mask must be bool (True = may be attended to), got torch.int32; ...mask.bool()...",
    ),
]

STATES: list[Case] = [
    (lambda: CAUSAL.init_state(-1, KV_HEADS, HEAD_DIM), ValueError, "batch_size must be >= 0, got -1"),
    (lambda: LINEAR.init_state(BATCH, 0, HEAD_DIM), ValueError, "num_kv_heads must be >= 1, got 0"),
    (lambda: CAUSAL.init_state(BATCH, KV_HEADS, 0), ValueError, "head_dim must be >= 1, got 0"),
    (
        lambda: CAUSAL.init_state(BATCH, KV_HEADS, 2.0),
        TypeError,
        "head_dim must be an int, got 2.0 of type float",
    ),
    (lambda: CAUSAL.init_state(*SIZES, v_head_dim=0), ValueError, "v_head_dim must be >= 1, got 0"),
    (
        lambda: CAUSAL.init_state(*SIZES, dtype=torch.int64),
        TypeError,
        "dtype must be a floating-point torch.dtype, got torch.int64",
    ),
    (
        lambda: STATE.reorder(torch.tensor([0.0, 1.0])),
        TypeError,
        "indices must be an int32 or int64 tensor, got torch.float32",
    ),
    (lambda: STATE.reorder([0, 1]), TypeError, "indices must be an int32 or int64 tensor, got list"),
    (
        lambda: WINDOW_STATE.reorder(torch.tensor([[0, 1]])),
        ValueError,
        "indices must have one dimension, got shape (1, 2)",
    ),
    (
        lambda: LINEAR_STATE.reorder(torch.tensor([0], device="meta")),
        ValueError,
        "indices must be on the device of the state, cpu, got meta",
    ),
]

COST = CAUSAL.cost(SHAPE)
COSTS: list[Case] = [
    (lambda: CAUSAL.cost((2, 4, 5, 6, 8)), TypeError, "shape must be a Shape, got tuple"),
    (lambda: CAUSAL.cost(SHAPE, training=1), TypeError, "training must be a bool, got 1 of type int"),
    (
        lambda: CAUSAL.cost(SHAPE, phase="train"),
        ValueError,
        "phase must be one of ['prefill', 'decode'], got 'train'",
    ),
    (
        lambda: LINEAR.cost(SHAPE, basis="exact"),
        ValueError,
        "basis must be one of ['model', 'hardware', 'torch'], got 'exact'",
    ),
    (
        lambda: CAUSAL.cost(SHAPE, backend="blocked"),
        ValueError,
        "backend must be one of ['auto', 'sdpa', 'reference'], got 'blocked'",
    ),
    (lambda: FULL.cost(SHAPE, phase="decode"), ValueError, f"FullAttention {CANNOT}"),
    (
        lambda: LinformerAttention(KEYS - 1, HEADS).cost(SHAPE),
        ValueError,
        "shape must have at most max_seq_len = 5 positions, got 6",
    ),
    (
        lambda: LinformerAttention(KEYS, HEADS, sharing="none", num_kv_heads=2).cost(SHAPE),
        ValueError,
        "shape must have num_kv_heads = 2 heads, each with its own projections (sharing='none'), got 4",
    ),
    (lambda: COST * -1, ValueError, "times must be >= 0, got -1"),
    (lambda: 1.5 * COST, TypeError, "times must be an int, got 1.5 of type float"),
    (lambda: COST + 1, TypeError, "unsupported operand type(s) for +: 'Cost' and 'int'"),
    (lambda: Shape(-1, 4, 5, 6, 8), ValueError, "batch must be >= 0, got -1"),
    (lambda: Shape(2, 4, -5, 6, 8), ValueError, "q_len must be >= 0, got -5"),
    (lambda: Shape(2, 4, 5, 6.0, 8), TypeError, "kv_len must be an int, got 6.0 of type float"),
    (lambda: Shape(2, 4, 5, 6, 0), ValueError, "head_dim must be >= 1, got 0"),
    (
        lambda: Shape(2, 4, 5, 6, 8, num_kv_heads=3),
        ValueError,
        "num_heads (4) must be a multiple of num_kv_heads (3)",
    ),
    (
        lambda: Shape(2, 4, 5, 6, 8, dtype=torch.int64),
        TypeError,
        "dtype must be a floating-point torch.dtype, got torch.int64",
    ),
]

ENDS = torch.tensor([0, 3])
PACKING: list[Case] = [
    (
        lambda: segment_ids_from_cu_seqlens([0, 3], 3),
        TypeError,
        "cu_seqlens must be an integer tensor, got list",
    ),
    (
        lambda: segment_ids_from_cu_seqlens(ENDS.float(), 3),
        TypeError,
        "cu_seqlens must be an integer tensor, got torch.float32",
    ),
    (
        lambda: segment_ids_from_cu_seqlens(ENDS > 0, 3),
        TypeError,
        "cu_seqlens must be an integer tensor, got torch.bool",
    ),
    (
        lambda: segment_ids_from_cu_seqlens(ENDS[None], 3),
        ValueError,
        "cu_seqlens must have shape (documents + 1,), got (1, 2)",
    ),
    (
        lambda: segment_ids_from_cu_seqlens(ENDS[:0], 3),
        ValueError,
        "cu_seqlens must have shape (documents + 1,), got (0,)",
    ),
    (lambda: segment_ids_from_cu_seqlens(ENDS, -1), ValueError, "total must be >= 0, got -1"),
    (
        lambda: segment_ids_from_cu_seqlens(ENDS, 3.0),
        TypeError,
        "total must be an int, got 3.0 of type float",
    ),
    (lambda: segment_ids_from_cu_seqlens(ENDS, None), TypeError, "total must be an int, got None of ..."),
]

CASES = STEPS + STATES + COSTS + PACKING
