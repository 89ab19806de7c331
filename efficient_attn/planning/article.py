"""The tables of two articles on the cost of attention, under their own conventions and corrected.

Michael Brenndoerfer, "Attention Complexity: Quadratic Scaling, Memory Limits & Efficient Alternatives", 2025,
https://mbrenndoerfer.com/writing/attention-complexity-quadratic-scaling-memory-efficient-transformers.

The convention "article" counts multiplications alone (half of the FLOPs), the softmax of one head, memory in GiB that
it calls GB, and variants as n * k * d. "corrected" counts 2 FLOPs for each multiply-accumulate, matrix products alone,
from what this library's mechanisms declare; GiB is 2^30 bytes. The table of pairs is also that of "Why faster training
still hit a length limit", which has no other figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from types import MappingProxyType

import torch

from ..complexity import Shape
from ..mechanisms import (
    FlashAttention,
    FullAttention,
    LinearAttention,
    Mechanism,
    PerformerAttention,
    SlidingWindowAttention,
)
from .costs import model_cost
from .devices import GB, GIB
from .models import Model
from .shares import layer_shares

WIDTH, HEADS, LAYERS = 768, 12, 12
"""GPT-2 Small, which the article mostly speaks of."""
SIZE = WIDTH // HEADS


@dataclass(frozen=True)
class Table:
    """A table: what it says, its columns, and its rows.

    Attributes:
        title: what is shown.
        section: of the article.
        columns: headings; those that begin with "article" follow its conventions.
        rows: a tuple for each row, as long as `columns`.
        note: what was corrected.
    """

    title: str
    section: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]
    note: str


def core_flops(length: int, *, is_causal: bool = False) -> int:
    """FLOPs of full attention in one layer of GPT-2 Small, projections left out."""
    shape = Shape(1, HEADS, length, length, SIZE)
    return FullAttention(is_causal=is_causal).cost(shape).flops.forward


def article_flops(length: int, width: int) -> int:
    """2 n^2 d + 3 n^2: multiplications, and a softmax as if there were one head."""
    return 2 * length**2 * width + 3 * length**2


def pairs() -> Table:
    """Pairs of tokens by length, and what doubling the length does."""
    model = Model(1, WIDTH, HEADS, is_causal=False)
    rows = []
    for length in (8, 16, 32, 100, 1000, 2000, 4000, 16_000, 64_000):
        whole = [
            sum(part.flops.forward for part in model_cost(model, 1, n, device_type="cpu").parts.values())
            for n in (length // 2, length)
        ]
        causal = FullAttention(is_causal=True).mask.pairs(length, length)
        core = core_flops(length) / core_flops(length // 2)
        rows.append((length, length**2, causal, core, whole[1] / whole[0]))
    return Table(
        "Pairs of tokens, and how much dearer the last doubling made a layer of d = 768",
        "The Quadratic Bottleneck; and Why attention cost grows with sequence length",
        ("tokens", "article: pairs", "causal pairs", "core of attention", "whole layer"),
        tuple(rows),
        "Doubling a sequence quadruples the core of attention alone. A layer with projections and FFN, 24 n d^2 "
        "FLOPs more, is doubled by it while n is far below 6 d, and quadrupled far above.",
    )


def flops() -> Table:
    """FLOPs of one layer by length."""
    rows = []
    for length in (128, 512, 1024, 2048, 4096, 8192):
        core = core_flops(length)
        projections = sum(2 * length * a * b for _, a, b in Model(1, WIDTH, HEADS).projection_sizes)
        rows.append(
            (
                length,
                article_flops(length, WIDTH) / 1e9,
                core / 1e9,
                core_flops(length, is_causal=True) / 1e9,
                (core + projections) / 1e9,
            )
        )
    return Table(
        "GFLOP of one layer's attention, d = 768",
        "Implementation: Counting FLOPs",
        (
            "tokens",
            "article",
            "2 FLOPs a multiply-accumulate",
            "of them causal",
            "with projections, not causal",
        ),
        tuple(rows),
        "The article counts multiplications, half of the FLOPs, and the softmax for one head in place of twelve.",
    )


CONFIGURATIONS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "GPT-2 Small": (768, 12, 12),
        "GPT-2 Medium": (1024, 16, 24),
        "GPT-2 Large": (1280, 20, 36),
        "13B": (5120, 40, 40),
    }
)
"""Width, heads and layers."""


def article_bytes(length: int, width: int, heads: int, layers: int) -> int:
    """q, k, v, scores and output in 16 bits, those of every layer held at once."""
    return layers * 2 * (4 * length * width + heads * length**2)


def memory() -> Table:
    """Memory of attention by model and length."""
    rows = []
    for name, (width, heads, layers) in CONFIGURATIONS.items():
        for length in (512, 2048, 8192, 32_768):
            shape = Shape(1, heads, length, length, width // heads)
            kept = layers * FlashAttention().cost(shape, training=True).saved_bytes
            dense = article_bytes(length, width, heads, layers)
            rows.append((name, length, dense / GIB, dense / GB, kept / GIB))
    return Table(
        "Memory of attention, 16 bits, all layers",
        "Total Memory Breakdown",
        ("model", "tokens", 'article "GB", which are GiB', "the same in GB", "kept by flash attention, GiB"),
        tuple(rows),
        "512 to 2048 tokens is 12 times the memory, not 16; 2048 to 4096 is 3.8 times, and Small to Large 5.0 times, "
        "so the larger model has the larger impact. Flash attention keeps q, k, v, output and a number for each row.",
    )


def article_length(gigabytes: int) -> int:
    """Tokens at which 16-bit scores of all layers of GPT-2 Small fill 70 % of memory."""
    return isqrt(int(gigabytes * 1e9 * 0.7) // (HEADS * 2 * LAYERS))


def lengths() -> Table:
    """The longest sequences by memory."""
    rows = []
    for gigabytes in (24, 40, 80):
        budget = gigabytes * 7 * GB // 10
        per_token = LAYERS * FlashAttention().cost(Shape(1, HEADS, 1, 1, SIZE), training=True).saved_bytes
        one_layer = isqrt(budget // (HEADS * 2))
        rows.append((f"{gigabytes} GB", article_length(gigabytes), one_layer, budget // per_token))
    return Table(
        "Longest sequence of GPT-2 Small in 70 % of memory, batch 1",
        "GPU Memory Constraints",
        (
            "memory",
            "article: scores of 12 layers",
            "scores of one layer at a time",
            "what flash attention keeps",
        ),
        tuple(rows),
        "The article's text speaks of 27K and 50K tokens, which are near the limits of one layer at a time. Weights, "
        "logits and the feed-forward network are left out here; `planning.max_seq_len` counts them.",
    )


def times() -> Table:
    """Times by length at 150 TFLOP/s."""
    rows = []
    for length in (512, 1024, 2048, 4096, 8192, 16_384, 32_768):
        article = 2 * length**2 * WIDTH * LAYERS / 150e12
        correct = core_flops(length) * LAYERS / 150e12
        rows.append((length, article * 1e3, round(length / article), correct * 1e3, round(length / correct)))
    return Table(
        "Attention of GPT-2 Small, 12 layers, at 150 TFLOP/s",
        "Time Constraints",
        ("tokens", "article, ms", "article, tokens/s", "ms", "tokens/s"),
        tuple(rows),
        "The article divides multiplications by a rate of FLOPs, and comes out twice as fast.",
    )


def shares() -> Table:
    """Shares of a layer's FLOPs by length."""
    model = Model(1, WIDTH, HEADS, is_causal=False)
    rows = []
    for length in (256, 512, 1024, 2048, 4096):
        both, causal = layer_shares(model, length), layer_shares(Model(1, WIDTH, HEADS), length)
        whole = 2 * length**2 * WIDTH + 12 * length * WIDTH**2
        article = 200 * length**2 * WIDTH / whole
        rows.append(
            (
                length,
                article,
                100 * both.attention,
                100 * both.projections,
                100 * both.ffn,
                100 * causal.attention,
            )
        )
    return Table(
        "Shares of a layer's FLOPs in per cent, d = 768",
        "The Attention Bottleneck",
        ("tokens", "article: attention", "attention", "projections", "FFN", "attention if causal"),
        tuple(rows),
        "The table is right, since a factor of two cancels; the text beside it says 69, 17 and 45 where it has 63.2, "
        "18.2 and 47.1. Attention exceeds the FFN from n = 4 d on, and is half of a layer from n = 6 d on, "
        "which is 3,072 and 4,608 tokens here, not 512 to 1024.",
    )


def recurrent() -> Table:
    """Attention against a recurrent network by length."""
    width = 512
    rows = []
    for length in (64, 128, 256, 512, 1024, 2048, 4096):
        core, steps = 4 * length**2 * width, 4 * length * width**2
        ratio = length**2 * width / (length * width**2)
        rows.append((length, ratio, core / steps, (core + 8 * length * width**2) / steps))
    return Table(
        "Attention to a vanilla RNN, d = 512: ratio of FLOPs",
        "Comparative Analysis",
        ("tokens", "article: n^2 d / n d^2", "core to RNN", "with projections to RNN"),
        tuple(rows),
        "Both matrices of an RNN are 4 n d^2 FLOPs, as the core of attention at n = d. With its projections attention "
        "is never cheaper than a vanilla RNN; than a GRU up to n = d, than an LSTM up to n = 2 d.",
    )


def paths() -> Table:
    """Compute and path length against a recurrent network."""
    width = 512
    rows = []
    for length in (128, 256, 512, 1024, 2048):
        compute, article = length / width, (length - 1) / 2
        rows.append(
            (length, compute, article, article / compute, (length + 1) / 3, (length + 1) / 3 / compute)
        )
    return Table(
        "Mean path of an RNN against attention's 1, d = 512",
        "Path Length vs. Computation Trade-off",
        ("tokens", "compute ratio", "article: mean path", "article: efficiency", "mean path", "efficiency"),
        tuple(rows),
        "Between two positions drawn at random the mean distance is (n + 1) / 3; (n - 1) / 2 is half of the largest.",
    )


def variants() -> Table:
    """Efficient mechanisms at 16,384 tokens."""
    length = 16_384
    # Causal windows see as many keys as they say, but for the first rows.
    mechanisms: dict[str, tuple[Mechanism, int | None]] = {
        "standard": (FullAttention(), length**2 * WIDTH),
        "linear": (LinearAttention(), length * WIDTH**2),
        "128 keys": (SlidingWindowAttention(128, is_causal=True), length * 128 * WIDTH),
        "window of 256 keys": (SlidingWindowAttention(256, is_causal=True), length * 256 * WIDTH),
        "Performer, m = 256": (PerformerAttention(SIZE, num_features=256), None),
    }
    standard = core_flops(length)
    layer = 24 * length * WIDTH**2
    rows = []
    for name, (mechanism, article) in mechanisms.items():
        cost = mechanism.cost(Shape(1, HEADS, length, length, SIZE, dtype=torch.bfloat16))
        core = cost.flops.forward
        rows.append(
            (
                name,
                "" if article is None else article / 1e9,
                "" if article is None else length**2 * WIDTH / article,
                core / 1e9,
                standard / core,
                (standard + layer) / (core + layer),
            )
        )
    return Table(
        "Variants at n = 16,384, d = 768, 12 heads",
        "Efficient Attention Variants",
        (
            "mechanism",
            "article, G",
            "article, speedup",
            "GFLOP",
            "fewer FLOPs",
            "fewer FLOPs of a whole layer",
        ),
        tuple(rows),
        "With twelve heads linear attention takes 4 n d^2 / 12 FLOPs: 256 times fewer than softmax, not 21.3, which is "
        "one head as wide as the model. A whole layer gains 4.5 times at most, for projections and FFN stay.",
    )


TABLES: Mapping[str, Callable[[], Table]] = MappingProxyType(
    {
        each.__name__: each
        for each in (pairs, flops, memory, recurrent, paths, lengths, times, shares, variants)
    }
)
"""Every table, in the order of the articles, by name."""


def all_tables() -> Sequence[Table]:
    """Every table, computed."""
    return [build() for build in TABLES.values()]
