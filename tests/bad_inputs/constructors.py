"""Arguments that no constructor accepts."""

from __future__ import annotations

import math

import torch

from efficient_attn import (
    MECHANISMS,
    BigBirdAttention,
    Complexity,
    FlashAttention,
    FullAttention,
    LinearAttention,
    LinformerAttention,
    LongformerAttention,
    PerformerAttention,
    SlidingWindowAttention,
    SparseTransformerAttention,
    create_mechanism,
)
from efficient_attn.feature_maps import EluPlusOne

from .subjects import Case

NAMES = list(MECHANISMS)
BACKEND = "backend must be one of"
GLOBAL = "global_tokens must be an int or a sequence of positions, got"


def create(name: object, **options: object) -> object:
    return create_mechanism(name, **{"num_heads": 4, "head_dim": 8, **options})


COMMON: list[Case] = [
    (lambda: FullAttention(is_causal=1), TypeError, "is_causal must be a bool, got 1 of type int"),
    (
        lambda: FlashAttention(is_causal=None),
        TypeError,
        "is_causal must be a bool, got None of type NoneType",
    ),
    (
        lambda: SlidingWindowAttention(2, is_causal="no"),
        TypeError,
        "is_causal must be a bool, got 'no' of type str",
    ),
    (lambda: LinearAttention(is_causal=0), TypeError, "is_causal must be a bool, got 0 of type int"),
    (lambda: FullAttention(scale=0), ValueError, "scale must be positive and finite, got 0"),
    (lambda: FlashAttention(scale=-1), ValueError, "scale must be positive and finite, got -1"),
    (lambda: LinearAttention(scale=math.nan), ValueError, "scale must be positive and finite, got nan"),
    (
        lambda: LinformerAttention(4, 4, scale=math.inf),
        ValueError,
        "scale must be positive and finite, got inf",
    ),
    (lambda: FullAttention(scale="x"), TypeError, "scale must be a float or None, got 'x' of type str"),
    (
        lambda: PerformerAttention(8, scale=True),
        TypeError,
        "scale must be a float or None, got True of type bool",
    ),
    (lambda: FullAttention(dropout_p=1.0), ValueError, "dropout_p must be in [0, 1), got 1.0"),
    (lambda: BigBirdAttention(dropout_p=-0.1), ValueError, "dropout_p must be in [0, 1), got -0.1"),
    (
        lambda: LinformerAttention(4, 4, dropout_p=math.nan),
        ValueError,
        "dropout_p must be in [0, 1), got nan",
    ),
    (lambda: FullAttention(dropout_p="x"), TypeError, "dropout_p must be a float, got 'x' of type str"),
    (lambda: LinearAttention(dropout_p=0.1), TypeError, "...unexpected keyword argument 'dropout_p'..."),
    (
        lambda: PerformerAttention(8, dropout_p=0.0),
        TypeError,
        "...unexpected keyword argument 'dropout_p'...",
    ),
    (
        lambda: FullAttention(backend="flash"),
        ValueError,
        f"{BACKEND} ['auto', 'sdpa', 'reference'], got 'flash'",
    ),
    (lambda: FullAttention(backend=None), ValueError, f"{BACKEND} ['auto', 'sdpa', 'reference'], got None"),
    (
        lambda: FlashAttention(backend="sdpa"),
        ValueError,
        f"{BACKEND} ['auto', 'sdpa_cudnn', ...], got 'sdpa'",
    ),
    (
        lambda: SlidingWindowAttention(2, backend="sdpa"),
        ValueError,
        f"{BACKEND} ['auto', 'triton', 'blocked', 'reference'], got 'sdpa'",
    ),
    (
        lambda: LinformerAttention(4, 4, backend="chunked"),
        ValueError,
        f"{BACKEND} ['auto', 'sdpa', 'reference'], got 'chunked'",
    ),
    (
        lambda: PerformerAttention(8, backend="blocked"),
        ValueError,
        f"{BACKEND} ['auto', 'triton', 'chunked', 'reference'], got 'blocked'",
    ),
    (
        lambda: LinearAttention(backend="blocked"),
        ValueError,
        f"{BACKEND} ['auto', 'triton', 'chunked', 'reference'], got 'blocked'",
    ),
]

WINDOWS: list[Case] = [
    (lambda: SlidingWindowAttention(0), ValueError, "window_size must be >= 1, got 0"),
    (lambda: SlidingWindowAttention(-1), ValueError, "window_size must be >= 1, got -1"),
    (lambda: SlidingWindowAttention(2.5), TypeError, "window_size must be an int, got 2.5 of type float"),
    (lambda: SlidingWindowAttention(True), TypeError, "window_size must be an int, got True of type bool"),
    (lambda: SlidingWindowAttention(2, num_sinks=-1), ValueError, "num_sinks must be >= 0, got -1"),
    (
        lambda: SlidingWindowAttention(2, num_sinks=None),
        TypeError,
        "num_sinks must be an int, got None of ...",
    ),
    (lambda: LongformerAttention(0, global_tokens=1), ValueError, "window_size must be >= 1, got 0"),
    (lambda: LongformerAttention(2, global_tokens=-1), ValueError, "global_tokens must be >= 0, got -1"),
    (
        lambda: LongformerAttention(2, global_tokens=(0, -3)),
        ValueError,
        "global_tokens[1] must be >= 0, got -3",
    ),
    (
        lambda: LongformerAttention(2, global_tokens=[0.5]),
        TypeError,
        "global_tokens[0] must be an int, got 0.5 of type float",
    ),
    (
        lambda: LongformerAttention(2, global_tokens=True),
        TypeError,
        "global_tokens must be an int, got True of type bool",
    ),
    (lambda: LongformerAttention(2, global_tokens="12"), TypeError, f"{GLOBAL} '12'"),
    (lambda: LongformerAttention(2, global_tokens=1.5), TypeError, f"{GLOBAL} 1.5"),
    (lambda: LongformerAttention(2, global_tokens=None), TypeError, f"{GLOBAL} None"),
    (lambda: LongformerAttention(2, global_tokens={0, 1}), TypeError, f"{GLOBAL} {{0, 1}}"),
]

BLOCKS: list[Case] = [
    (lambda: BigBirdAttention(block_size=0), ValueError, "block_size must be >= 1, got 0"),
    (
        lambda: BigBirdAttention(block_size=16.0),
        TypeError,
        "block_size must be an int, got 16.0 of type float",
    ),
    (lambda: BigBirdAttention(num_window_blocks=2), ValueError, "num_window_blocks must be odd (...), got 2"),
    (lambda: BigBirdAttention(num_window_blocks=-1), ValueError, "num_window_blocks must be >= 1, got -1"),
    (lambda: BigBirdAttention(num_global_blocks=-1), ValueError, "num_global_blocks must be >= 0, got -1"),
    (lambda: BigBirdAttention(num_random_blocks=-1), ValueError, "num_random_blocks must be >= 0, got -1"),
    (lambda: BigBirdAttention(seed=-1), ValueError, "seed must be >= 0, got -1"),
    (
        lambda: SparseTransformerAttention("diagonal", 4),
        ValueError,
        "pattern must be one of ['strided', 'fixed'], got 'diagonal'",
    ),
    (
        lambda: SparseTransformerAttention(4, "fixed"),
        ValueError,
        "pattern must be one of ['strided', 'fixed'], got 4",
    ),
    (lambda: SparseTransformerAttention("fixed", 0), ValueError, "stride must be >= 1, got 0"),
    (lambda: SparseTransformerAttention("fixed", 4, summary=0), ValueError, "summary must be >= 1, got 0"),
    (
        lambda: SparseTransformerAttention("fixed", 4, summary=5),
        ValueError,
        "summary must be at most stride (4), got 5",
    ),
    (
        lambda: SparseTransformerAttention("strided", 4, summary=2),
        ValueError,
        "summary belongs to the fixed pattern; the strided one has none, got 2",
    ),
]

LINFORMERS: list[Case] = [
    (lambda: LinformerAttention(0, 4), ValueError, "max_seq_len must be >= 1, got 0"),
    (lambda: LinformerAttention(None, 4), TypeError, "max_seq_len must be an int, got None of type NoneType"),
    (lambda: LinformerAttention(4, 0), ValueError, "num_heads must be >= 1, got 0"),
    (lambda: LinformerAttention(4, 4, rank=0), ValueError, "rank must be >= 1, got 0"),
    (lambda: LinformerAttention(4, 4, num_kv_heads=0), ValueError, "num_kv_heads must be >= 1, got 0"),
    (
        lambda: LinformerAttention(4, 4, num_kv_heads=3),
        ValueError,
        "num_heads (4) must be a multiple of num_kv_heads (3)",
    ),
    (
        lambda: LinformerAttention(4, 4, sharing="layerwise"),
        ValueError,
        "sharing must be one of ['headwise', 'key-value', 'none'], got 'layerwise'",
    ),
    (
        lambda: LinformerAttention(4, 4, is_causal=True),
        ValueError,
        "is_causal must be False: each compressed key of Linformer mixes the whole sequence...the future",
    ),
]

FEATURES: list[Case] = [
    (lambda: PerformerAttention(0), ValueError, "head_dim must be >= 1, got 0"),
    (lambda: PerformerAttention(8.0), TypeError, "head_dim must be an int, got 8.0 of type float"),
    (lambda: PerformerAttention(8, num_features=0), ValueError, "num_features must be >= 1, got 0"),
    (
        lambda: PerformerAttention(8, num_features=2.0),
        TypeError,
        "num_features must be an int, got 2.0 of ...",
    ),
    (lambda: PerformerAttention(8, seed=-1), ValueError, "seed must be >= 0, got -1"),
    (
        lambda: PerformerAttention(8, kernel="cosine"),
        ValueError,
        "kernel must be 'softmax' or 'relu', got 'cosine'",
    ),
    (
        lambda: LinearAttention(feature_map="gelu"),
        ValueError,
        "feature_map must be one of ['elu', 'exp', 'relu', 'squared_relu'] or a FeatureMap, got 'gelu'",
    ),
    (
        lambda: LinearAttention(feature_map=torch.relu),
        TypeError,
        "feature_map must be a name or a FeatureMap, got builtin_function_or_method",
    ),
    (
        lambda: LinearAttention(feature_map=EluPlusOne),
        TypeError,
        "feature_map must be a name or a FeatureMap, got ...",
    ),
]

FACTORY: list[Case] = [
    (
        lambda: create("slidingwindow", window_size=2),
        ValueError,
        f"name must be one of {NAMES}, got 'slidingwindow'; did you mean 'sliding_window'?",
    ),
    (lambda: create("softmax"), ValueError, f"name must be one of {NAMES}, got 'softmax'"),
    (lambda: create(FullAttention), TypeError, f"name must be a str, one of {NAMES}, got <class ..."),
    (lambda: create(["full"]), TypeError, f"name must be a str, one of {NAMES}, got ['full']"),
    (
        lambda: create("sliding_window", window=2),
        TypeError,
        "sliding_window has no option 'window'; it has window_size, num_sinks, is_causal, ..., backend",
    ),
    (
        lambda: create("linear", dropout_p=0.1),
        TypeError,
        "linear has no option 'dropout_p'; it has feature_map, is_causal, scale, backend",
    ),
    (
        lambda: create("performer", dropout_p=0.1),
        TypeError,
        "performer has no option 'dropout_p'; it has head_dim, ...",
    ),
    (lambda: create("longformer"), ValueError, "longformer needs window_size, global_tokens: pass it to ..."),
    (lambda: create("linformer"), ValueError, "linformer needs max_seq_len: pass it to create_mechanism..."),
    (lambda: create("linformer", max_seq_len=8, is_causal=True), ValueError, "is_causal must be False: ..."),
    (lambda: create("full", is_causal=1), TypeError, "is_causal must be a bool, got 1 of type int"),
    (lambda: create("full", num_heads=0), ValueError, "num_heads must be >= 1, got 0"),
    (lambda: create("full", head_dim=8.0), TypeError, "head_dim must be an int, got 8.0 of type float"),
    (lambda: create("full", max_seq_len=-3), ValueError, "max_seq_len must be >= 1, got -3"),
    (
        lambda: create("full", num_kv_heads=3),
        ValueError,
        "num_heads (4) must be a multiple of num_kv_heads (3)",
    ),
    (
        lambda: Complexity("L", "L", "L", "L", "1", "roughly"),
        ValueError,
        "exactness must be one of ('exact', 'exact within a pattern', ...), got 'roughly'",
    ),
]

CASES = COMMON + WINDOWS + BLOCKS + LINFORMERS + FEATURES + FACTORY
