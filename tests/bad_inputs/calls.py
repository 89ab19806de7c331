"""Calls of a mechanism that must be refused."""

from __future__ import annotations

import torch

from efficient_attn import (
    BackendError,
    FlashAttention,
    LinformerAttention,
    PerformerAttention,
)

from .subjects import (
    BIAS,
    CAUSAL,
    FULL,
    HEADS,
    KEYS,
    LINEAR,
    LINFORMER,
    MASK,
    NEW_V,
    SEGMENTS,
    WINDOW,
    Case,
    K,
    Q,
    V,
)

RANK = "must have 4 dimensions (batch, heads, length, head_dim), got"
ROWS = "must have shape (batch, keys) = (2, 6), got"
BROADCAST = "attn_bias must broadcast to (B, H, L, S) = (2, 4, 5, 6), got"
BOOL = "key_mask must be bool (True = may be attended to), got"
ADVICE = "; for a mask with 1 = keep pass mask.bool(), for torch's key_padding_mask pass ~mask"
OFFSET = "q_offset must be an int, a 0-d integer tensor or None, got"

QKV: list[Case] = [
    (lambda: FULL(Q[0], K, V), ValueError, f"q {RANK} (4, 5, 8)"),
    (lambda: FULL(Q, K[0], V), ValueError, f"k {RANK} (2, 6, 8)"),
    (lambda: FULL(Q, K, V[None]), ValueError, f"v {RANK} (1, 2, 2, 6, 8)"),
    (lambda: FULL.matrix(Q[0], K), ValueError, f"q {RANK} (4, 5, 8)"),
    (lambda: FULL.explain(Q, K, V[0]), ValueError, f"v {RANK} (2, 6, 8)"),
    (lambda: FULL([1.0], K, V), TypeError, "q must be a Tensor, got list"),
    (lambda: FULL(Q, None, V), TypeError, "k must be a Tensor, got NoneType"),
    (lambda: FULL(Q, K.double(), V.numpy()), TypeError, "v must be a Tensor, got ndarray"),
    (lambda: FULL(Q.long(), K, V), TypeError, "q must be a floating-point tensor, got torch.int64"),
    (lambda: FULL(Q, K, V > 0), TypeError, "v must be a floating-point tensor, got torch.bool"),
    (
        lambda: FULL(Q.double(), K, V),
        ValueError,
        "q, k and v must have one dtype, got torch.float64, torch.float32 and torch.float32",
    ),
    (
        lambda: LINEAR(Q, K, V.bfloat16()),
        ValueError,
        "q, k and v must have one dtype, got torch.float32, torch.float32 and torch.bfloat16",
    ),
    (lambda: FULL(Q, K.to("meta"), V), ValueError, "q, k and v must be on one device, got cpu, meta and cpu"),
    (lambda: FULL(Q, K, V.to("meta")), ValueError, "q, k and v must be on one device, got cpu, cpu and meta"),
    (lambda: FULL(Q[:1], K, V), ValueError, "q, k and v must have one batch size, got 1, 2 and 2"),
    (lambda: FULL(Q, K, V[:1]), ValueError, "q, k and v must have one batch size, got 2, 2 and 1"),
    (
        lambda: FULL(Q, K, V[:, :1]),
        ValueError,
        "k and v must agree in heads and length, got (2, 6) and (1, 6)",
    ),
    (lambda: FULL(Q, K, NEW_V), ValueError, "k and v must agree in heads and length, got (2, 6) and (2, 5)"),
    (lambda: FULL(Q[..., :4], K, V), ValueError, "q and k must have one head_dim, got 4 and 8"),
    (lambda: FULL(Q[..., :0], K[..., :0], V), ValueError, "q must have a head_dim of at least 1, got 0"),
    (
        lambda: FULL(Q[:, :3], K, V),
        ValueError,
        "the heads of q must be a multiple of those of k and v, got 3 and 2",
    ),
    (
        lambda: FULL(Q[:, :1], K, V),
        ValueError,
        "the heads of q must be a multiple of those of k and v, got 1 and 2",
    ),
    (lambda: FULL(Q[:, :0], K, V), ValueError, "q and k must have at least 1 head, got 0 and 2"),
    (lambda: WINDOW(Q, K[:, :0], V[:, :0]), ValueError, "q and k must have at least 1 head, got 4 and 0"),
    (lambda: FULL(Q, K, V, mask=MASK), TypeError, "...unexpected keyword argument 'mask'..."),
]

MASKS: list[Case] = [
    (lambda: FULL(Q, K, V, key_mask=[[True]]), TypeError, "key_mask must be a Tensor or None, got list"),
    (lambda: FULL(Q, K, V, key_mask=MASK.long()), TypeError, f"{BOOL} torch.int64{ADVICE}"),
    (lambda: LINEAR(Q, K, V, key_mask=MASK.float()), TypeError, f"{BOOL} torch.float32{ADVICE}"),
    (lambda: LINFORMER.matrix(Q, K, key_mask=MASK.int()), TypeError, f"{BOOL} torch.int32{ADVICE}"),
    (lambda: FULL(Q, K, V, key_mask=MASK[:, 1:]), ValueError, f"key_mask {ROWS} (2, 5)"),
    (lambda: FULL(Q, K, V, key_mask=MASK[:1]), ValueError, f"key_mask {ROWS} (1, 6)"),
    (lambda: WINDOW(Q, K, V, key_mask=MASK[0]), ValueError, f"key_mask {ROWS} (6,)"),
    (lambda: WINDOW(Q, K, V, key_mask=MASK[:, None, None]), ValueError, f"key_mask {ROWS} (2, 1, 1, 6)"),
    (
        lambda: FULL(Q, K, V, key_mask=MASK.to("meta")),
        ValueError,
        "key_mask must be on the device of q, cpu, got meta",
    ),
    (lambda: FULL(Q, K, V, segment_ids=[[0]]), TypeError, "segment_ids must be a Tensor or None, got list"),
    (
        lambda: FULL(Q, K, V, segment_ids=SEGMENTS.float()),
        TypeError,
        "segment_ids must be an integer tensor, got torch.float32",
    ),
    (
        lambda: WINDOW(Q, K, V, segment_ids=MASK),
        TypeError,
        "segment_ids must be an integer tensor, got torch.bool",
    ),
    (
        lambda: FULL(Q, K, V, segment_ids=SEGMENTS.to(torch.complex128)),
        TypeError,
        "segment_ids must be an integer tensor, got torch.complex128",
    ),
    (lambda: FULL(Q, K, V, segment_ids=SEGMENTS[:, 1:]), ValueError, f"segment_ids {ROWS} (2, 5)"),
    (lambda: LINEAR(Q, K, V, segment_ids=SEGMENTS[0]), ValueError, f"segment_ids {ROWS} (6,)"),
    (
        lambda: FULL(Q, K, V, segment_ids=SEGMENTS.to("meta")),
        ValueError,
        "segment_ids must be on the device of q, cpu, got meta",
    ),
    (lambda: FULL(Q, K, V, attn_bias=0.0), TypeError, "attn_bias must be a Tensor or None, got float"),
    (
        lambda: FULL(Q, K, V, attn_bias=BIAS.long()),
        TypeError,
        "attn_bias must be floating-point (added) or bool (True = may attend), got torch.int64",
    ),
    (lambda: FULL(Q, K, V, attn_bias=BIAS.T), ValueError, f"{BROADCAST} (6, 5)"),
    (lambda: FULL(Q, K, V, attn_bias=BIAS.expand(2, -1, -1)), ValueError, f"{BROADCAST} (2, 5, 6)"),
    (lambda: FULL.matrix(Q, K, attn_bias=BIAS[None, None, None]), ValueError, f"{BROADCAST} (1, 1, 1, 5, 6)"),
    (
        lambda: FULL(Q, K, V, attn_bias=BIAS.to("meta")),
        ValueError,
        "attn_bias must be on the device of q, cpu, got meta",
    ),
]

OFFSETS: list[Case] = [
    (lambda: FULL(Q, K, V, q_offset=1.0), TypeError, f"{OFFSET} float"),
    (lambda: FULL(Q, K, V, q_offset=True), TypeError, f"{OFFSET} bool"),
    (lambda: WINDOW(Q, K, V, q_offset="0"), TypeError, f"{OFFSET} str"),
    (
        lambda: FULL(Q, K, V, q_offset=torch.tensor([0, 1])),
        ValueError,
        "q_offset must be an int or a 0-d integer tensor, got shape (2,)",
    ),
    (
        lambda: FULL(Q, K, V, q_offset=torch.tensor(0.0)),
        TypeError,
        "q_offset must be an int or a 0-d integer tensor, got torch.float32",
    ),
    (
        lambda: LINEAR(Q, K, V, q_offset=torch.tensor(True)),
        TypeError,
        "q_offset must be an int or a 0-d integer tensor, got torch.bool",
    ),
    (
        lambda: WINDOW(Q, K, V, q_offset=torch.tensor(0, device="meta")),
        ValueError,
        "q_offset must be on the CPU or the device of q, cpu, got meta",
    ),
    (
        lambda: CAUSAL(Q, K[:, :, :3], V[:, :, :3]),
        ValueError,
        "q_offset must be given for a causal mechanism with more queries (5) than keys (3)...",
    ),
    (
        lambda: LINEAR.matrix(Q, K[:, :, :0]),
        ValueError,
        "q_offset must be given for a causal mechanism with more queries (5) than keys (0)...",
    ),
]

SIZES: list[Case] = [
    (
        lambda: LinformerAttention(KEYS - 1, HEADS, rank=3)(Q, K, V),
        ValueError,
        "k must have at most max_seq_len = 5 positions, got 6",
    ),
    (
        lambda: LinformerAttention(KEYS, HEADS, rank=3, sharing="none").matrix(Q, K),
        ValueError,
        "k must have num_kv_heads = 4 heads, each with its own projections (sharing='none'), got 2",
    ),
    (lambda: PerformerAttention(4)(Q, K, V), ValueError, "head_dim of the mechanism is 4, q and k have 8"),
    (
        lambda: PerformerAttention(4).matrix(Q, K),
        ValueError,
        "head_dim of the mechanism is 4, q and k have 8",
    ),
]


def refusal(backend: str, reasons: str) -> str:
    return f"no backend can run this problem (backend={backend!r}):\n  {backend}: {reasons}"


BACKENDS: list[Case] = [
    (lambda: FlashAttention(backend="xformers")(Q, K, V), BackendError, refusal("xformers", "...")),
    (lambda: FlashAttention(backend="flash_attn")(Q, K, V), BackendError, refusal("flash_attn", "...")),
    (
        lambda: FlashAttention(backend="sdpa_cudnn")(Q, K, V),
        BackendError,
        refusal("sdpa_cudnn", "...runs on cuda, not cpu..."),
    ),
    (
        lambda: FlashAttention(backend="sdpa_efficient")(Q, K, V, segment_ids=SEGMENTS),
        BackendError,
        refusal(
            "sdpa_efficient", "these masks together would need a dense (L, S) mask; runs on cuda, not cpu..."
        ),
    ),
    (
        lambda: FlashAttention(backend="sdpa_flash", dropout_p=0.5)(Q, K, V[..., :3], segment_ids=SEGMENTS),
        BackendError,
        refusal(
            "sdpa_flash",
            "these masks together would need a dense (L, S) mask; head sizes of k and v differ (8 and 3); "
            "no dropout on CPU",
        ),
    ),
]

CASES = QKV + MASKS + OFFSETS + SIZES + BACKENDS
