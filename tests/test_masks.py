"""Every view of a mask against brute force over its predicate, written as a loop over pairs."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from efficient_attn.masks import (
    BlockLayout,
    BlockWindow,
    Causal,
    Everything,
    Fixed,
    GlobalTokens,
    Mask,
    RandomBlocks,
    Sinks,
    Strided,
    Window,
    plan,
    random_blocks,
    segment_ids_from_cu_seqlens,
    tile_groups,
)


def bigbird(causal: bool) -> Mask:
    mask = BlockWindow(4, 3) | GlobalTokens.first(4) | RandomBlocks(4, 2, 0, causal)
    return mask & Causal() if causal else mask


MASKS = {
    "everything": Everything(),
    "causal": Causal(),
    "window": Window(5),
    "window_causal": Window(5) & Causal(),
    "sinks": (Window(3) | Sinks(2)) & Causal(),
    "sinks_both_sides": Window(3) | Sinks(2),
    "global_prefix": Window(3) | GlobalTokens.first(2),
    "global_positions": (Window(4) | GlobalTokens.at((9, 2, 3, 40))) & Causal(),
    "bigbird": bigbird(False),
    "bigbird_causal": bigbird(True),
    "strided": Strided(5),
    "strided_causal": Strided(5) & Causal(),
    "causal_strided": Causal() & Strided(5),
    "strided_or_sinks": Strided(6) | Sinks(3),
    "sinks_or_strided_causal": (Sinks(3) | Strided(6)) & Causal(),
    "fixed": Fixed(5, 2),
    "fixed_causal": Causal() & Fixed(5, 2),
    "fixed_or_window": Fixed(7, 1) | Window(4),
    "window_and_strided": Window(9) & Strided(4),
    "strided_and_causal_window": Strided(5) & (Window(11) & Causal()),
    "strided_and_union": Strided(4) & (Window(11) | Window(2)),
    "drawn_first": RandomBlocks(4, 2, 1, False) | Window(3),
    "earlier_blocks": RandomBlocks(4, 3, 1, True),
    "global_twice": Window(2) | GlobalTokens.at((9, 2, 9, 3)),
}
SHAPES = [
    (1, 1, None),
    (7, 7, None),
    (37, 37, None),
    (64, 64, None),
    (5, 40, None),
    (12, 30, 3),
    (9, 6, 0),
    (8, 5, -3),
]
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
every_shape = pytest.mark.parametrize(("q_len", "num_keys", "offset"), SHAPES)


@functools.cache
def brute(mask: Mask, q_len: int, num_keys: int, offset: int | None) -> torch.Tensor:
    offset = num_keys - q_len if offset is None else offset
    mask = mask.sized(num_keys)
    rows = [
        [bool(mask.allows(torch.tensor(offset + i), torch.tensor(j))) for j in range(num_keys)]
        for i in range(q_len)
    ]
    return torch.tensor(rows, dtype=torch.bool).view(q_len, num_keys)


@every_mask
@every_shape
def test_every_view_is_the_predicate(mask, q_len, num_keys, offset):
    truth = brute(mask, q_len, num_keys, offset)
    assert torch.equal(mask.dense(q_len, num_keys, offset), truth)
    assert mask.pairs(q_len, num_keys, offset) == int(truth.sum())
    assert Mask.from_spec(mask.spec()) == mask

    start = num_keys - q_len if offset is None else offset
    q = torch.arange(start, start + q_len)
    lower, upper = mask.sized(num_keys).row_spans(q, num_keys)
    positions = torch.arange(num_keys)
    in_spans = ((positions >= lower[..., None]) & (positions < upper[..., None])).any(1)
    assert torch.equal(in_spans, truth), "row_spans"

    mod = mask.mask_mod(num_keys, start)
    zero = torch.zeros((), dtype=torch.long)
    assert torch.equal(mod(zero, zero, torch.arange(q_len)[:, None], positions[None]).expand_as(truth), truth)


@every_mask
@every_shape
@pytest.mark.parametrize(("rows", "keys"), [(4, 1000), (8, 3), (64, 16)])
def test_tiles_hold_every_pair_exactly_once(mask, q_len, num_keys, offset, rows, keys):
    start = num_keys - q_len if offset is None else offset
    visits = torch.zeros(q_len, num_keys, dtype=torch.long)
    stored: set[int] = set()
    for tile in plan(mask, start, start + q_len, num_keys, rows, keys):
        q = torch.arange(start, start + q_len)[
            slice(tile.rows.start - start, tile.rows.stop - start, tile.rows.step)
        ]
        k = torch.cat([torch.arange(num_keys)[s] for s in tile.keys])
        assert len(q) == tile.num_rows <= rows and len(k) == tile.num_keys <= keys
        assert len(set(k.tolist())) == len(k), "a key twice in one tile"
        allowed = torch.ones(len(q), len(k), dtype=torch.long)
        if tile.mask is not None:
            allowed = tile.mask.allows(q[:, None], k[None]).expand(len(q), len(k)).long()
        if tile.first:
            assert stored.isdisjoint(q.tolist()), "stored twice: the second store would lose the first"
            stored |= set(q.tolist())
        visits[(q - start)[:, None], k[None]] += allowed
    assert torch.equal(visits, brute(mask, q_len, num_keys, offset).long())


@every_mask
@every_shape
@pytest.mark.parametrize("size", [1, 4, 6])
def test_block_layout_is_exact(mask, q_len, num_keys, offset, size):
    truth = brute(mask, q_len, num_keys, offset)
    layout = mask.block_layout(q_len, num_keys, size, offset)
    assert isinstance(layout, BlockLayout)
    for row in range(-(-q_len // size)):
        full = set(layout.full_index[layout.full_start[row] : layout.full_start[row + 1]].tolist())
        partial = set(
            layout.partial_index[layout.partial_start[row] : layout.partial_start[row + 1]].tolist()
        )
        for block in range(-(-num_keys // size)):
            cell = truth[row * size : (row + 1) * size, block * size : (block + 1) * size]
            assert (block in full) == bool(cell.all()), (row, block)
            assert (block in partial) == bool(cell.any() and not cell.all()), (row, block)


@pytest.mark.parametrize(
    "mask", [m for m in MASKS.values() if m not in (MASKS["everything"], MASKS["causal"])]
)
def test_tile_plans_are_subquadratic(mask):
    def covered(n: int) -> int:
        return sum(t.num_rows * t.num_keys for t in plan(mask, 0, n, n, 64, 1024))

    # A stride of 5 is a constant share of all pairs, so compare each plan with the pairs themselves.
    n = 1024
    assert covered(n) <= 2.5 * mask.pairs(n, n) + 64 * 3 * n


@every_mask
def test_batches_of_tiles_take_few_views(mask):
    """Slices are cut until those of a group's tiles are equally long: not until each tile is cut where any other is."""
    groups = tile_groups(mask, 0, 1024, 1024, 64, 1024)
    slices = sum(len(tile.keys) for group in groups for tile in group.tiles)
    assert sum(len(run.slices) for group in groups for run in group.key_runs) <= 3 * slices


@every_mask
def test_flex_attention_takes_the_predicate(mask):
    block_mask = create_block_mask(
        mask.mask_mod(40, q_offset=8), None, None, 32, 40, device="cpu", BLOCK_SIZE=8
    )
    blocks = mask.dense(32, 40, 8).view(4, 8, 5, 8).any(3).any(1)
    assert torch.equal(block_mask.to_dense()[0, 0].bool(), blocks)


def test_pair_counts_at_a_million_tokens_are_closed_forms():
    n = 1 << 20
    assert (Window(256) & Causal()).pairs(n, n) == 256 * n - 256 * 255 // 2
    assert Causal().pairs(n, n) == n * (n + 1) // 2
    assert Everything().pairs(n, n) == n * n
    blocks = n // 1024
    assert (Strided(1024) & Causal()).pairs(n, n) == 1024 * n - 1024 * 1023 // 2 + 1024 * (
        blocks - 1
    ) * blocks // 2


@pytest.mark.parametrize("few", [True, False])
def test_global_positions_are_a_set(few: bool):
    """In any order, given once or twice: few runs are compared one by one, many are searched for."""
    positions = (9, 2, 9, 3) if few else (31, 9, 40, 3, 17, 3, 0, 22, 12, 26, 35, 6)
    expected = {(i, j) for i in range(45) for j in range(45) if i in positions or j in positions}
    assert len(GlobalTokens.at(positions).runs) == (4 if few else 22)
    dense = GlobalTokens.at(positions).dense(45, 45)
    assert {(int(i), int(j)) for i, j in dense.nonzero()} == expected


def test_random_blocks_are_distinct_uniform_and_pure():
    blocks = torch.arange(4096)
    drawn = random_blocks(blocks, count=3, seed=7, num_choices=64)
    assert torch.equal(drawn, random_blocks(blocks, count=3, seed=7, num_choices=64))
    assert torch.equal(drawn[100:200], random_blocks(blocks[100:200], count=3, seed=7, num_choices=64))
    assert (drawn[:, 1:] > drawn[:, :-1]).all() and (drawn >= 0).all() and (drawn < 64).all()
    counts = torch.bincount(drawn.flatten(), minlength=64).double()
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 64 + 5 * (2 * 64) ** 0.5, "not uniform over the whole sequence"
    assert not torch.equal(drawn, random_blocks(blocks, count=3, seed=8, num_choices=64))
    few = random_blocks(torch.arange(5), count=3, seed=0, num_choices=torch.arange(5))
    assert (few >= 0).sum(-1).tolist() == [0, 1, 2, 3, 3]
    assert all(set(row[row >= 0].tolist()) <= set(range(i)) for i, row in enumerate(few))


def test_segment_ids_from_cu_seqlens():
    ids = segment_ids_from_cu_seqlens(torch.tensor([0, 3, 3, 5], dtype=torch.int32), total=7)
    assert ids.tolist() == [[0, 0, 0, 2, 2, -1, -1]]
    assert segment_ids_from_cu_seqlens(torch.tensor([0]), total=2).tolist() == [[-1, -1]]
