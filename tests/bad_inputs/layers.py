"""Bad arguments of the two layers."""

from __future__ import annotations

import torch

from efficient_attn import Attention, FullAttention, MultiheadAttention, PerformerAttention
from efficient_attn.layers import LayerState

from .subjects import CAUSAL, CAUSAL_WINDOW, FULL, WINDOW, Case

EMBED, HEADS, BATCH, LENGTH = 16, 4, 2, 5

X = torch.randn(BATCH, LENGTH, EMBED)
MASK = torch.ones(BATCH, LENGTH, dtype=torch.bool)
LAYER, CAUSAL_LAYER = Attention(EMBED, HEADS, FULL), Attention(EMBED, HEADS, CAUSAL)
INNER_STATE = CAUSAL.init_state(BATCH, HEADS, EMBED // HEADS)

MHA = MultiheadAttention(EMBED, HEADS, batch_first=True)
WINDOW_MHA, CAUSAL_WINDOW_MHA = (
    MultiheadAttention(EMBED, HEADS, batch_first=True, mechanism=mechanism)
    for mechanism in (WINDOW, CAUSAL_WINDOW)
)
PAIRS = torch.zeros(LENGTH, LENGTH)

ATTENTION: list[Case] = [
    (lambda: Attention(0, 4, FULL), ValueError, "embed_dim must be >= 1, got 0"),
    (lambda: Attention(16.0, 4, FULL), TypeError, "embed_dim must be an int, got 16.0 of type float"),
    (lambda: Attention(16, 3, FULL), ValueError, "num_heads must divide embed_dim = 16 unless ..., got 3"),
    (
        lambda: Attention(16, 4, FULL, num_kv_heads=3),
        ValueError,
        "num_kv_heads must divide num_heads = 4, got 3",
    ),
    (lambda: Attention(16, 4, FULL, head_dim=0), ValueError, "head_dim must be >= 1, got 0"),
    (lambda: Attention(16, 4, "full"), TypeError, "mechanism must be a Mechanism instance, got str"),
    (lambda: Attention(16, 4, FullAttention), TypeError, "mechanism must be a Mechanism instance, got ..."),
    (lambda: Attention(16, 4, FULL, rotary=1), TypeError, "rotary must be callable, ..., or None, got int"),
    (lambda: LAYER(X[0]), ValueError, "x must have shape (batch, length, 16), got (5, 16)"),
    (lambda: LAYER(X[..., :8]), ValueError, "x must have shape (batch, length, 16), got (2, 5, 8)"),
    (lambda: LAYER(X, X[:1]), ValueError, "context must have the batch size of x, 2, got 1"),
    (lambda: LAYER(X, X, segment_ids=MASK.long()), ValueError, "context cannot be used with segment_ids..."),
    (
        lambda: CAUSAL_LAYER(X, X),
        ValueError,
        "context cannot be used with a causal mechanism (FullAttention)...",
    ),
    (lambda: LAYER(X, key_mask=MASK.long()), TypeError, "key_mask must be bool (...), got torch.int64; ..."),
    (lambda: LAYER(X, key_mask=MASK[:, 1:]), ValueError, "key_mask must have shape ... = (2, 5), got (2, 4)"),
    (lambda: LAYER(X, segment_ids=MASK), TypeError, "segment_ids must be an integer tensor, got torch.bool"),
    (lambda: LAYER.init_state(2), ValueError, "FullAttention is not causal...needs is_causal=True"),
    (lambda: CAUSAL_LAYER.init_state(-1), ValueError, "batch_size must be >= 0, got -1"),
    (lambda: CAUSAL_LAYER.step(X, INNER_STATE), TypeError, "state must be a LayerState..., got KVState"),
    (lambda: CAUSAL_LAYER.step(X, LayerState(None)), TypeError, "state must be a KVState, got NoneType"),
    (
        lambda: CAUSAL_LAYER.step(X[:1], CAUSAL_LAYER.init_state(2)),
        ValueError,
        "state.k must be (1, ..., got (2, ...",
    ),
    (lambda: LAYER.cost(2, -1), ValueError, "q_len must be >= 0, got -1"),
    (lambda: CAUSAL_LAYER.cost(2, 5, context_len=3), ValueError, "context_len must be None when ..., got 3"),
    (
        lambda: Attention(16, 4, PerformerAttention(8))(X),
        ValueError,
        "head_dim of the mechanism is 8, q and k have 4",
    ),
]

MULTIHEAD: list[Case] = [
    (
        lambda: MultiheadAttention(16, 3),
        ValueError,
        "...num_heads divide embed_dim; got embed_dim=16, num_heads=3",
    ),
    (lambda: MultiheadAttention(16, 4, dropout=1.5), ValueError, "dropout_p must be in [0, 1), got 1.5"),
    (
        lambda: MultiheadAttention(16, 4, mechanism="full"),
        TypeError,
        "mechanism must be a Mechanism...got str",
    ),
    (
        lambda: MultiheadAttention(16, 4, dropout=0.1, mechanism=WINDOW),
        ValueError,
        "dropout=0.1 must be 0 beside a mechanism: ...",
    ),
    (
        lambda: MultiheadAttention(16, 4, add_bias_kv=True, mechanism=WINDOW),
        ValueError,
        "add_bias_kv=True needs full attention, got SlidingWindowAttention",
    ),
    (
        lambda: MHA(X[0, 0], X, X),
        ValueError,
        "query must have 2 (unbatched) or 3 dimensions, got shape (16,)",
    ),
    (lambda: MHA(X, X[0], X), ValueError, "key must have 3 dimensions, ...; got shape (5, 16)"),
    (lambda: MHA(X, X, X[:, 1:]), ValueError, "value must have as many tokens as key...got shape (2, 4, 16)"),
    (lambda: MHA(X, X[:1], X[:1]), ValueError, "key must have the batch size of query, 2, got 1"),
    (
        lambda: MHA(X, X, X, key_padding_mask=MASK.int()),
        TypeError,
        "key_padding_mask must be bool (True = may not attend) or floating point, got torch.int32",
    ),
    (
        lambda: MHA(X, X, X, key_padding_mask=MASK[0]),
        ValueError,
        "key_padding_mask must have shape (2, 5), got (5,)",
    ),
    (
        lambda: MHA(X, X, X, attn_mask=PAIRS[1:]),
        ValueError,
        "attn_mask must have shape (5, 5) or (8, 5, 5), got (4, 5)",
    ),
    (
        lambda: MHA(X, X, X, is_causal=True),
        RuntimeError,
        "is_causal=True is a hint about attn_mask and needs one...",
    ),
    (
        lambda: WINDOW_MHA(X, X, X),
        ValueError,
        "need_weights=True makes SlidingWindowAttention build its matrix...",
    ),
    (
        lambda: CAUSAL_WINDOW_MHA(X, X, X, need_weights=False, attn_mask=PAIRS),
        ValueError,
        "attn_mask cannot be honoured by SlidingWindowAttention, which takes no bias...",
    ),
]

CASES = ATTENTION + MULTIHEAD
