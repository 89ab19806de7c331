"""The oracles alone, on stand-ins that carry a mechanism's class name and attributes and nothing else."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracles import ORACLES, oracle_matrix
from torch import Tensor

BATCH, HEADS, KV_HEADS, LENGTH, WIDTH, RANK = 2, 4, 2, 11, 4, 5


def stand_in(class_name: str, **attributes: Any) -> Any:
    defaults = {"is_causal": False, "scale": None}
    return type(class_name, (SimpleNamespace,), {})(**(defaults | attributes))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def queries_and_keys(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    return normal(BATCH, HEADS, length, WIDTH, seed=1), normal(BATCH, KV_HEADS, length, WIDTH, seed=2)


def last_blocks(is_causal: bool, count: int) -> Any:
    def draw(block: int, num_blocks: int) -> tuple[int, ...]:
        return tuple(range(block if is_causal else num_blocks))[-count:]

    return draw


def bigbird(is_causal: bool = False, *, block_size: int, num_random_blocks: int, **attributes: Any) -> Any:
    return stand_in(
        "BigBirdAttention",
        is_causal=is_causal,
        block_size=block_size,
        num_random_blocks=num_random_blocks,
        random_block_choices=last_blocks(is_causal, num_random_blocks),
        **({"num_window_blocks": 3, "num_global_blocks": 1} | attributes),
    )


def linformer(sharing: str = "headwise") -> Any:
    shape = (KV_HEADS, LENGTH, RANK) if sharing == "none" else (LENGTH, RANK)
    return stand_in(
        "LinformerAttention",
        sharing=sharing,
        key_projection=normal(*shape, seed=3),
        value_projection=normal(*shape, seed=4),
    )


def performer(is_causal: bool = False, kernel: str = "softmax") -> Any:
    feature_map = SimpleNamespace(projection=normal(6, WIDTH, seed=5))
    return stand_in("PerformerAttention", is_causal=is_causal, kernel=kernel, feature_map=feature_map)


def normalised(is_causal: bool) -> list[Any]:
    """Stand-ins whose rows sum to one."""
    common = {"is_causal": is_causal}
    sparse = common | {"stride": 3, "summary": 1}
    return [
        stand_in("FullAttention", **common),
        stand_in("FlashAttention", **common, scale=0.3),
        stand_in("SlidingWindowAttention", **common, window_size=3, num_sinks=0),
        stand_in("SlidingWindowAttention", **common, window_size=2, num_sinks=2),
        stand_in("LongformerAttention", **common, window_size=2, global_tokens=2),
        stand_in("LongformerAttention", **common, window_size=1, global_tokens=(1, 6)),
        bigbird(is_causal, block_size=1, num_random_blocks=1),
        bigbird(is_causal, block_size=2, num_random_blocks=1),
        stand_in("SparseTransformerAttention", **sparse, pattern="strided"),
        stand_in("SparseTransformerAttention", **sparse, pattern="fixed"),
        performer(is_causal),
        stand_in("LinearAttention", **common, feature_map="elu"),
        stand_in("LinearAttention", **common, feature_map=SimpleNamespace(name="exp")),
    ]


NOT_CAUSAL = [*normalised(False), linformer(), linformer("key-value"), linformer("none")]
CAUSAL = normalised(True)
UNANCHORED = ("FullAttention", "FlashAttention", "PerformerAttention", "LinearAttention")
# The others refuse packing: they count from the start of the row, or mix every position.
PACKABLE = [
    mechanism
    for mechanism in NOT_CAUSAL + CAUSAL
    if type(mechanism).__name__ in UNANCHORED
    or getattr(mechanism, "num_sinks", None) == 0
    or getattr(mechanism, "pattern", None) == "strided"
]


def name(mechanism: Any) -> str:
    return type(mechanism).__name__ + ("-causal" if mechanism.is_causal else "")


every = pytest.mark.parametrize("mechanism", NOT_CAUSAL + CAUSAL, ids=name)


def support(mechanism: Any, length: int, **masks: Any) -> list[str]:
    """One string per query of the first head: 'x' where the key has weight."""
    matrix = oracle_matrix(mechanism, *queries_and_keys(length), **masks)[0, 0]
    return ["".join("x" if weight > 0 else "." for weight in row) for row in matrix.tolist()]


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def grouped(k: Tensor) -> Tensor:
    return k.repeat_interleave(HEADS // KV_HEADS, dim=1)


def normalise(kernel_matrix: Tensor) -> Tensor:
    """Rows divided by their sums; a row of zeros, as relu features can give, stays one."""
    total = kernel_matrix.sum(-1, keepdim=True)
    return torch.where(total > 0, kernel_matrix / total, 0.0)


def test_stand_ins_cover_every_oracle() -> None:
    assert {type(mechanism).__name__ for mechanism in NOT_CAUSAL} == set(ORACLES)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["FullAttention", "FlashAttention"])
def test_full_is_softmax(kind: str, is_causal: bool) -> None:
    q, k = queries_and_keys()
    scores = q @ grouped(k).mT / math.sqrt(WIDTH)
    if is_causal:
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
    same(oracle_matrix(stand_in(kind, is_causal=is_causal), q, k), scores.softmax(-1))


def test_bias_is_added_or_masks() -> None:
    q, k = queries_and_keys()
    scores, full = q @ grouped(k).mT * 0.7, stand_in("FullAttention", scale=0.7)
    added = normal(HEADS, 1, LENGTH, seed=6)
    same(oracle_matrix(full, q, k, attn_bias=added), (scores + added).softmax(-1))
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(2)
    minus_inf = torch.zeros(LENGTH, LENGTH).masked_fill(~allowed, -math.inf)
    expected = (scores + minus_inf).softmax(-1)
    same(oracle_matrix(full, q, k, attn_bias=allowed), expected)
    same(oracle_matrix(full, q, k, attn_bias=minus_inf), expected)


def test_window_counts() -> None:
    two_sided = stand_in("SlidingWindowAttention", window_size=3, num_sinks=0)
    causal = stand_in("SlidingWindowAttention", window_size=3, num_sinks=0, is_causal=True)
    assert [row.count("x") for row in support(two_sided, 8)] == [3, 4, 5, 5, 5, 5, 4, 3]
    assert [row.count("x") for row in support(causal, 8)] == [1, 2, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("is_causal", [False, True])
def test_window_with_sinks_by_hand(is_causal: bool) -> None:
    window = stand_in("SlidingWindowAttention", window_size=1, num_sinks=2, is_causal=is_causal)
    first = "x..." if is_causal else "xx.."
    assert support(window, 4) == [first, "xx..", "xxx.", "xx.x"]


def test_longformer_by_hand() -> None:
    positions = stand_in("LongformerAttention", window_size=2, global_tokens=(3,))
    assert support(positions, 5) == ["xx.x.", "xxxx.", ".xxx.", "xxxxx", "...xx"]
    first = stand_in("LongformerAttention", window_size=1, global_tokens=1, is_causal=True)
    assert support(first, 3) == ["x..", "xx.", "x.x"]


def test_bigbird_by_hand() -> None:
    """Blocks of one token: the first is global, the window is the own block, one random block is drawn."""
    draws = {1: (3,), 2: (0,), 3: (1,)}
    tiny = bigbird(block_size=1, num_window_blocks=1, num_random_blocks=1)
    tiny.random_block_choices = lambda block, num_blocks: draws[block]
    assert support(tiny, 4) == ["xxxx", "xx.x", "x.x.", "xx.x"]
    causal = bigbird(True, block_size=1, num_window_blocks=1, num_random_blocks=1)
    causal.random_block_choices = lambda block, num_blocks: {1: (0,), 2: (1,), 3: (2,)}[block]
    assert support(causal, 4) == ["x...", "xx..", "xxx.", "x.xx"]


def test_bigbird_blocks_by_hand() -> None:
    blocks = bigbird(block_size=2, num_random_blocks=0, num_global_blocks=0)
    assert support(blocks, 7) == ["xxxx...", "xxxx...", *["xxxxxx."] * 2, *["..xxxxx"] * 2, "....xxx"]
    wider = bigbird(block_size=1, num_window_blocks=5, num_random_blocks=0, num_global_blocks=0)
    assert support(wider, 8) == support(stand_in("SlidingWindowAttention", window_size=3, num_sinks=0), 8)


@pytest.mark.parametrize("draw", [(5,), (1, 1), ()])
def test_bigbird_rejects_a_bad_draw(draw: tuple[int, ...]) -> None:
    broken = bigbird(block_size=2, num_random_blocks=1)
    broken.random_block_choices = lambda block, num_blocks: draw
    with pytest.raises(AssertionError, match="distinct"):
        support(broken, 8)


def test_sparse_transformer_by_hand() -> None:
    strided = stand_in("SparseTransformerAttention", pattern="strided", stride=2, summary=1)
    assert support(strided, 5) == ["xxx.x", "xxxx.", "xxxxx", ".xxxx", "x.xxx"]
    fixed = stand_in("SparseTransformerAttention", pattern="fixed", stride=3, summary=2, is_causal=True)
    assert support(fixed, 7) == ["x......", "xx.....", "xxx....", ".xxx...", ".xxxx..", ".xxxxx.", ".xx.xxx"]


@pytest.mark.parametrize("sharing", ["headwise", "key-value", "none"])
def test_linformer_is_its_equation(sharing: str) -> None:
    q, k = queries_and_keys()
    mechanism = linformer(sharing)
    shape = (KV_HEADS, LENGTH, RANK)
    compress = mechanism.key_projection.expand(shape)
    restore = compress if sharing == "key-value" else mechanism.value_projection.expand(shape)
    summaries = grouped(torch.einsum("hsr,bhse->bhre", compress, k))
    weights = (torch.einsum("bhle,bhre->bhlr", q, summaries) / math.sqrt(WIDTH)).softmax(-1)
    expected = torch.einsum("bhlr,bhsr->bhls", weights, grouped(restore[None]).expand(BATCH, -1, -1, -1))
    same(oracle_matrix(mechanism, q, k), expected)


@pytest.mark.parametrize("scale", [None, 0.9])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_performer_is_its_equation(kernel: str, scale: float | None) -> None:
    q, k = queries_and_keys()
    mechanism = performer(kernel=kernel)
    mechanism.scale = scale
    projection = mechanism.feature_map.projection

    def phi(x: Tensor) -> Tensor:
        x = x * WIDTH**-0.25
        if kernel == "relu":
            return (x @ projection.mT).relu()
        return (x @ projection.mT - x.square().sum(-1, keepdim=True) / 2).exp()

    kernel_matrix = phi(q * (1.0 if scale is None else scale * math.sqrt(WIDTH))) @ phi(grouped(k)).mT
    same(oracle_matrix(mechanism, q, k), normalise(kernel_matrix))


@pytest.mark.parametrize(
    ("feature_map", "phi"),
    [
        ("elu", lambda x: torch.nn.functional.elu(x) + 1),
        ("relu", torch.relu),
        ("squared_relu", lambda x: x.relu().square()),
        ("exp", torch.exp),
    ],
)
def test_linear_is_its_equation(feature_map: str, phi: Any) -> None:
    q, k = queries_and_keys()
    kernel_matrix = (phi(0.9 * math.sqrt(WIDTH) * q) @ phi(grouped(k)).mT).tril()
    mechanism = stand_in("LinearAttention", feature_map=feature_map, is_causal=True, scale=0.9)
    same(oracle_matrix(mechanism, q, k), normalise(kernel_matrix))


@pytest.mark.parametrize("mechanism", normalised(False) + normalised(True), ids=name)
@pytest.mark.parametrize("magnitude", [1.0, 1000.0])
def test_rows_sum_to_one(mechanism: Any, magnitude: float) -> None:
    q, k = queries_and_keys()
    total = oracle_matrix(mechanism, magnitude * q, magnitude * k).sum(-1)
    same(total, torch.ones_like(total))


@pytest.mark.parametrize("mechanism", CAUSAL, ids=name)
def test_causal_has_no_upper_triangle_and_chunks_agree(mechanism: Any) -> None:
    q, k = queries_and_keys()
    whole = oracle_matrix(mechanism, q, k)
    assert whole.triu(1).count_nonzero() == 0
    same(oracle_matrix(mechanism, q[:, :, 7:], k), whole[:, :, 7:])
    same(oracle_matrix(mechanism, q[:, :, 3:6], k, q_offset=torch.tensor(3)), whole[:, :, 3:6])


@every
def test_left_and_right_padding_change_nothing(mechanism: Any) -> None:
    q, k = queries_and_keys()
    real = slice(5, 10)  # not a multiple of any stride or block size here
    key_mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    key_mask[:, real] = True
    expected = oracle_matrix(mechanism, q[:, :, real], k[:, :, real])
    polluted = k.masked_fill(~key_mask[:, None, :, None], math.nan)
    padded = oracle_matrix(mechanism, q, polluted, key_mask=key_mask)
    same(padded[:, :, real, real], expected)
    assert padded[..., ~key_mask[0]].count_nonzero() == 0


@pytest.mark.parametrize("mechanism", PACKABLE, ids=name)
def test_packed_is_separate(mechanism: Any) -> None:
    q, k = queries_and_keys()
    segment_ids = torch.tensor([0] * 4 + [1] * 5 + [-1] * 2).expand(BATCH, LENGTH)
    expected = torch.zeros(BATCH, HEADS, LENGTH, LENGTH, dtype=torch.float64)
    for part in (slice(0, 4), slice(4, 9)):
        expected[:, :, part, part] = oracle_matrix(mechanism, q[:, :, part], k[:, :, part])
    same(oracle_matrix(mechanism, q, k, segment_ids=segment_ids), expected)
    same(oracle_matrix(mechanism, q[:, :, 6:], k, segment_ids=segment_ids), expected[:, :, 6:])
    assert oracle_matrix(mechanism, q, k, segment_ids=segment_ids, q_offset=LENGTH).count_nonzero() == 0


@every
def test_nothing_to_attend_to_gives_zeros(mechanism: Any) -> None:
    q, k = queries_and_keys()
    key_mask = torch.tensor([[False] * LENGTH, [True] * LENGTH])
    matrix = oracle_matrix(mechanism, q, k, key_mask=key_mask)
    assert matrix[0].count_nonzero() == 0
    same(matrix[1], oracle_matrix(mechanism, q, k)[1])


@every
def test_empty_inputs_keep_their_shape(mechanism: Any) -> None:
    q, k = queries_and_keys()
    assert oracle_matrix(mechanism, q[:0], k[:0]).shape == (0, HEADS, LENGTH, LENGTH)
    assert oracle_matrix(mechanism, q[:, :, :0], k).shape == (BATCH, HEADS, 0, LENGTH)
    assert oracle_matrix(mechanism, q, k[:, :, :0], q_offset=0).shape == (BATCH, HEADS, LENGTH, 0)


def test_undefined_questions_are_refused() -> None:
    q, k = queries_and_keys()
    with pytest.raises(ValueError, match="q_offset"):
        oracle_matrix(stand_in("FullAttention", is_causal=True), q, k[:, :, :5])
    with pytest.raises(ValueError, match="segment_ids"):
        oracle_matrix(linformer(), q, k, segment_ids=torch.zeros(BATCH, LENGTH, dtype=torch.long))
    for mechanism in (linformer(), performer()):
        with pytest.raises(ValueError, match="attn_bias"):
            oracle_matrix(mechanism, q, k, attn_bias=normal(LENGTH, LENGTH))
