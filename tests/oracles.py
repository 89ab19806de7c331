"""What each mechanism's matrix should be: loops over batch, head, query and key, written from the papers.

Shares no code with `efficient_attn`, which builds masks from a predicate on pairs of positions. Here every
pattern instead lists, query by query, the positions the paper lets it see, so that one mistake is unlikely to
be made twice. Everything is a Python float (fp64), and a key that a row may not see never enters that row.

An oracle computes; it does not police. Refusing a mask is the mechanism's duty, except where no answer is
defined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Vector = list[float]
Row = list[float]


def oracle_matrix(
    mechanism: Any,
    q: Tensor,
    k: Tensor,
    *,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    attn_bias: Tensor | None = None,
) -> Tensor:
    """The (B, H, L, S) attention matrix in float64 of `mechanism`, whose oracle is chosen by its class name.

    Args:
        mechanism: any object with the class name and the public attributes of a mechanism.
        q: queries (B, H, L, E).
        k: keys (B, Hkv, S, E); query head h uses key head h // (H // Hkv).
        key_mask: bool (B, S), True = may be attended.
        segment_ids: integers (B, S); a negative one is padding.
        q_offset: position of the first query; S - L unless given.
        attn_bias: broadcasts to (B, H, L, S); float is added to the scaled scores, bool says who may attend.
    """
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    if q_offset is None and mechanism.is_causal and q_len > kv_len:
        raise ValueError(f"q_offset: needed by a causal mechanism with {q_len} queries and {kv_len} keys")
    first_query = kv_len - q_len if q_offset is None else int(q_offset)
    bias = None if attn_bias is None else attn_bias.expand(batch, heads, q_len, kv_len).tolist()
    queries, keys = q.tolist(), k.tolist()
    oracle = ORACLES[type(mechanism).__name__]

    entries: list[float] = []
    for b in range(batch):
        tokens = Tokens(
            present=[True] * kv_len if key_mask is None else key_mask[b].tolist(),
            segments=None if segment_ids is None else segment_ids[b].tolist(),
            first_query=first_query,
        )
        for h in range(heads):
            kv_head = h // (heads // k.shape[1])
            head_bias = None if bias is None else bias[b][h]
            head = Head(tokens, kv_head, queries[b][h], keys[b][kv_head], head_bias)
            for row in oracle(mechanism, head):
                entries.extend(row)
    return torch.tensor(entries, dtype=torch.float64).reshape(batch, heads, q_len, kv_len)


@dataclass(frozen=True)
class Tokens:
    """One sequence of the batch: which keys are there, and where its queries sit."""

    present: list[bool]
    segments: list[int] | None
    first_query: int

    @property
    def length(self) -> int:
        return len(self.present)

    @property
    def anchor(self) -> int:
        """The first key that is present; anchored patterns count from it."""
        return self.present.index(True) if True in self.present else 0

    @property
    def end(self) -> int:
        """One past the last key that is present."""
        return max((j + 1 for j in range(self.length) if self.present[j]), default=0)

    def may_meet(self, position: int, j: int) -> bool:
        """Whether padding and packing let the query at `position` see key j."""
        if not self.present[j]:
            return False
        if self.segments is None:
            return True
        if not 0 <= position < self.length:
            return False
        return self.segments[j] >= 0 and self.segments[j] == self.segments[position]


@dataclass(frozen=True)
class Head:
    """One head of one sequence, as lists."""

    tokens: Tokens
    kv_head: int
    queries: list[Vector]
    keys: list[Vector]
    bias: list[Row] | None


Pattern = Callable[[Any, Tokens, int], Iterable[int]]


def dot(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def softmax_scale(mechanism: Any, width: int) -> float:
    return 1 / math.sqrt(width) if mechanism.scale is None else float(mechanism.scale)


def visible_keys(mechanism: Any, tokens: Tokens, position: int, pattern: Pattern) -> list[int]:
    """The keys of the pattern that exist, in order, after causality, padding and packing."""
    listed = set(pattern(mechanism, tokens, position))
    keys = []
    for j in range(tokens.length):
        if mechanism.is_causal and j > position:
            continue
        if j in listed and tokens.may_meet(position, j):
            keys.append(j)
    return keys


def softmax(scores: dict[int, float], length: int) -> Row:
    """Softmax over the listed entries of a row; the others, and a row with none, are zero."""
    row = [0.0] * length
    top = max(scores.values(), default=-math.inf)
    if top == -math.inf:
        return row
    total = sum(math.exp(score - top) for score in scores.values())
    for j, score in scores.items():
        row[j] = math.exp(score - top) / total
    return row


# Softmax over a pattern: softmax_j(scale q_i . k_j + bias_ij) over the keys that i sees.


def softmax_over(pattern: Pattern, mechanism: Any, head: Head) -> list[Row]:
    rows = []
    for i, query in enumerate(head.queries):
        scores: dict[int, float] = {}
        for j in visible_keys(mechanism, head.tokens, head.tokens.first_query + i, pattern):
            bias = 0.0 if head.bias is None else head.bias[i][j]
            if isinstance(bias, bool):
                bias = 0.0 if bias else -math.inf
            if bias != -math.inf:
                scores[j] = softmax_scale(mechanism, len(query)) * dot(query, head.keys[j]) + bias
        rows.append(softmax(scores, head.tokens.length))
    return rows


def everything(mechanism: Any, tokens: Tokens, position: int) -> Iterable[int]:
    return range(tokens.length)


def full(mechanism: Any, head: Head) -> list[Row]:
    """Vaswani et al. 2017, equation 1. FlashAttention computes the same matrix."""
    return softmax_over(everything, mechanism, head)


def window_keys(mechanism: Any, tokens: Tokens, position: int) -> Iterable[int]:
    window = range(position - mechanism.window_size + 1, position + mechanism.window_size)
    sinks = range(tokens.anchor, tokens.anchor + mechanism.num_sinks)
    return [*window, *sinks]


def sliding_window(mechanism: Any, head: Head) -> list[Row]:
    """Beltagy et al. 2020, section 3.1; sinks as in Xiao et al. 2023."""
    return softmax_over(window_keys, mechanism, head)


def longformer_keys(mechanism: Any, tokens: Tokens, position: int) -> Iterable[int]:
    tokens_from_anchor = mechanism.global_tokens
    if isinstance(tokens_from_anchor, int):
        tokens_from_anchor = range(tokens_from_anchor)
    global_positions = [tokens.anchor + int(t) for t in tokens_from_anchor]
    if position in global_positions:
        return range(tokens.length)
    window = range(position - mechanism.window_size + 1, position + mechanism.window_size)
    return [*window, *global_positions]


def longformer(mechanism: Any, head: Head) -> list[Row]:
    """Beltagy et al. 2020, section 3.1: a window, and global tokens that see and are seen by all."""
    return softmax_over(longformer_keys, mechanism, head)


def bigbird_keys(mechanism: Any, tokens: Tokens, position: int) -> Iterable[int]:
    size, num_global = mechanism.block_size, mechanism.num_global_blocks
    num_blocks = math.ceil((tokens.end - tokens.anchor) / size)
    own = (position - tokens.anchor) // size
    if 0 <= own < num_global:
        return range(tokens.length)
    each_side = mechanism.num_window_blocks // 2
    window = range(own - each_side, own + each_side + 1)
    blocks = [*range(num_global), *window, *random_blocks(mechanism, own, num_blocks)]
    keys = []
    for block in blocks:
        start = tokens.anchor + block * size
        keys.extend(range(start, start + size))
    return keys


def random_blocks(mechanism: Any, own: int, num_blocks: int) -> list[int]:
    """The mechanism's own draw, a hash that cannot be written twice; its range and count are checked."""
    choices = range(own) if mechanism.is_causal else range(num_blocks)
    if mechanism.num_random_blocks == 0 or len(choices) == 0:
        return []
    drawn = [block for block in mechanism.random_block_choices(own, num_blocks) if block >= 0]
    count = min(mechanism.num_random_blocks, len(choices))
    if len(drawn) != count or len(set(drawn)) != count or any(block not in choices for block in drawn):
        raise AssertionError(f"block {own} should draw {count} distinct blocks of {choices}, got {drawn}")
    return drawn


def bigbird(mechanism: Any, head: Head) -> list[Row]:
    """Zaheer et al. 2020, section 2: window, global and random, all in blocks."""
    return softmax_over(bigbird_keys, mechanism, head)


def sparse_transformer_keys(mechanism: Any, tokens: Tokens, position: int) -> Iterable[int]:
    stride = mechanism.stride
    if mechanism.pattern == "strided":
        near = range(position - stride + 1, position + stride)
        every_stride = range(position % stride, tokens.length, stride)
        return [*near, *every_stride]
    if mechanism.pattern != "fixed":
        raise ValueError(f"pattern: no oracle for {mechanism.pattern!r}")
    own_start = position - (position - tokens.anchor) % stride
    keys = [*range(own_start, own_start + stride)]
    for start in range(tokens.anchor, tokens.length, stride):
        keys.extend(range(start + stride - mechanism.summary, start + stride))
    return keys


def sparse_transformer(mechanism: Any, head: Head) -> list[Row]:
    """Child et al. 2019, section 4.3: the union of both factors, in every head."""
    return softmax_over(sparse_transformer_keys, mechanism, head)


# Linformer: softmax over compressed keys, then the compression of the values written back on their positions.


def linformer(mechanism: Any, head: Head) -> list[Row]:
    """Wang et al. 2020, equation 7: softmax(scale Q (E^T K)^T) F^T, with E and F counted from the anchor."""
    tokens = head.tokens
    refuse(mechanism, segment_ids=tokens.segments, attn_bias=head.bias)
    compress_keys, compress_values = linformer_projections(mechanism, head.kv_head)
    rank = len(compress_keys[0])
    present = [j for j in range(tokens.length) if tokens.present[j]]
    width = len(head.queries[0]) if head.queries else 0
    summaries = [[0.0] * width for _ in range(rank)]
    for r in range(rank):
        for j in present:
            for e in range(width):
                summaries[r][e] += compress_keys[j - tokens.anchor][r] * head.keys[j][e]
    rows = []
    for query in head.queries:
        scores = {r: softmax_scale(mechanism, width) * dot(query, summaries[r]) for r in range(rank)}
        weights = softmax(scores, rank)
        row = [0.0] * tokens.length
        for j in present:
            row[j] = dot(weights, compress_values[j - tokens.anchor])
        rows.append(row)
    return rows


def linformer_projections(mechanism: Any, kv_head: int) -> tuple[list[Vector], list[Vector]]:
    """E and F of one key head, each (max_seq_len, rank)."""
    keys = mechanism.key_projection
    values = keys if mechanism.sharing == "key-value" else mechanism.value_projection
    if mechanism.sharing == "none":
        keys, values = keys[kv_head], values[kv_head]
    return keys.tolist(), values.tolist()


# Linear attention: A_ij = phi(q_i) . phi(k_j), each row divided by its sum over the keys that i sees.
# Features are kept as logarithms, so that no scale of the input overflows or underflows here.


def log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


LOG_FEATURES: dict[str, Callable[[float], float]] = {
    "elu": lambda x: math.log(x + 1) if x > 0 else x,
    "relu": log,
    "squared_relu": lambda x: 2 * log(x),
    "exp": lambda x: x,
}


def linear(mechanism: Any, head: Head) -> list[Row]:
    """Katharopoulos et al. 2020, equation 4 (and 9 if causal)."""
    name = mechanism.feature_map if isinstance(mechanism.feature_map, str) else mechanism.feature_map.name
    log_feature = LOG_FEATURES[name]
    return normalised_kernel(mechanism, head, lambda x: [log_feature(value) for value in x])


def performer(mechanism: Any, head: Head) -> list[Row]:
    """Choromanski et al. 2021, lemma 1 (softmax) and section 2.2 (relu).

    With x' = x / E^(1/4), phi_f(x) is exp(w_f . x' - |x'|^2 / 2) or relu(w_f . x'). The paper's 1/sqrt(m)
    cancels in the ratio.
    """
    projection = mechanism.feature_map.projection.tolist()
    if mechanism.kernel not in ("softmax", "relu"):
        raise ValueError(f"kernel: no oracle for {mechanism.kernel!r}")

    def log_phi(x: Vector) -> Vector:
        scaled = [value / len(x) ** 0.25 for value in x]
        if mechanism.kernel == "relu":
            return [log(dot(w, scaled)) for w in projection]
        return [dot(w, scaled) - dot(scaled, scaled) / 2 for w in projection]

    return normalised_kernel(mechanism, head, log_phi)


def normalised_kernel(mechanism: Any, head: Head, log_phi: Callable[[Vector], Vector]) -> list[Row]:
    refuse(mechanism, attn_bias=head.bias)
    tokens = head.tokens
    key_features = [log_phi(key) if tokens.present[j] else [] for j, key in enumerate(head.keys)]
    rows = []
    for i, query in enumerate(head.queries):
        rescale = softmax_scale(mechanism, len(query)) * math.sqrt(len(query))
        query_features = log_phi([rescale * value for value in query])
        products = {}
        for j in visible_keys(mechanism, tokens, tokens.first_query + i, everything):
            products[j] = [a + b for a, b in zip(query_features, key_features[j], strict=True)]
        row = [0.0] * tokens.length
        top = max((term for terms in products.values() for term in terms), default=-math.inf)
        if top != -math.inf:
            weights = {j: sum(math.exp(term - top) for term in terms) for j, terms in products.items()}
            total = sum(weights.values())
            for j, weight in weights.items():
                row[j] = weight / total
        rows.append(row)
    return rows


def refuse(mechanism: Any, **masks: Any) -> None:
    for name, mask in masks.items():
        if mask is not None:
            raise ValueError(f"{name}: has no meaning for {type(mechanism).__name__}")


ORACLES: dict[str, Callable[[Any, Head], list[Row]]] = {
    "FullAttention": full,
    "FlashAttention": full,
    "SlidingWindowAttention": sliding_window,
    "LongformerAttention": longformer,
    "BigBirdAttention": bigbird,
    "SparseTransformerAttention": sparse_transformer,
    "LinformerAttention": linformer,
    "PerformerAttention": performer,
    "LinearAttention": linear,
}
