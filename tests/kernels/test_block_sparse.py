"""What the block-sparse kernels are told: the parts of a mask, and the tables of blocks, against the predicate."""

from __future__ import annotations

import pytest
import torch

from efficient_attn.kernels.block_sparse import table as table_module
from efficient_attn.kernels.block_sparse.configs import CONFIGS
from efficient_attn.kernels.block_sparse.pairs import multiplied_pairs
from efficient_attn.kernels.block_sparse.parts import (
    UNBOUNDED,
    Band,
    Blocks,
    FarSinks,
    Part,
    as_band,
    parts_of,
    refusals,
)
from efficient_attn.kernels.block_sparse.table import Table, tables
from efficient_attn.masks import Causal, Everything, Fixed, GlobalTokens, Mask, Sinks, Strided, Window
from efficient_attn.mechanisms import MECHANISMS
from efficient_attn.testing.sampling import HEAD_DIM, HEADS

LENGTH = 70
CPU = torch.device("cpu")
MASKS = {
    f"{name} {number}": example.mask
    for name in ("flash", "sliding_window", "longformer", "bigbird", "sparse_transformer")
    for number, example in enumerate(MECHANISMS[name].examples(LENGTH, HEADS, HEAD_DIM))
}


def pairs_of(part: Part, q: torch.Tensor, num_keys: int) -> torch.Tensor:
    """(positions, keys): the pairs of one part, from its definition."""
    k = torch.arange(num_keys)[None]
    q = q[:, None]
    if isinstance(part, Blocks) and part.summaries is not None:
        stride, count = part.summaries.stride, part.summaries.count
        number = torch.arange(part.summaries.num_keys(num_keys))
        index = number // count * stride + stride - count + number % count
        inside = index < num_keys
        seen = torch.zeros(len(q), num_keys, dtype=torch.bool)
        seen[:, index[inside]] = part.mask.allows(q, number[None])[:, inside]
        return seen
    if isinstance(part, Blocks):
        return part.mask.sized(num_keys).allows(q, k).expand(len(q), num_keys)
    distance = q - k
    back, ahead = (UNBOUNDED if x == UNBOUNDED else x * part.step for x in (part.back, part.ahead))
    seen = (distance <= back) & (-distance <= ahead) & (distance % part.step == 0)
    return seen | ((k < part.sinks) & (-distance <= part.sinks_ahead))


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_parts_hold_every_pair_once(name: str, by_key: bool) -> None:
    mask, q = MASKS[name], torch.arange(-7, LENGTH + 9)
    together = sum(pairs_of(part, q, LENGTH).int() for part in parts_of(mask, by_key))
    assert isinstance(together, torch.Tensor)
    expected = mask.sized(LENGTH).allows(q[:, None], torch.arange(LENGTH)[None]).expand(len(q), LENGTH)
    assert torch.equal(together, expected.int())


def test_bands_are_recognised() -> None:
    assert as_band(Everything()) == Band(UNBOUNDED, UNBOUNDED)
    assert as_band(Window(5) & Causal()) == Band(4, 0)
    assert as_band(Window(9) & Window(5)) == Band(4, 4)
    assert as_band((Window(5) | Sinks(3)) & Causal()) == Band(4, 0, 3, 0)
    assert as_band(Sinks(3) | Window(5)) == Band(4, 4, 3)
    # A window around sinks hides some of them, and two kinds of sinks are none that a band has.
    assert as_band((Causal() | Sinks(3)) & Window(5)) is None
    assert as_band(Window(5) | Sinks(3) | Sinks(4)) is None
    assert as_band(Window(5) | GlobalTokens.first(2)) is None


def test_what_jumps_is_served_alone() -> None:
    for mask in (Strided(5), Causal() & Fixed(5, 2), Window(3) & Causal()):
        assert refusals(mask) == []
    for mask in (Strided(5) | Sinks(2), Causal() & (Fixed(5, 2) | Window(9))):
        assert "not joined with others" in refusals(mask)[0]


def drawn_from(table: Table, block: int, other: int, transposed: bool) -> tuple[torch.Tensor, int]:
    """How often each pair is walked, (blocks' rows, other's columns) from position 0, and how many items there are."""
    firsts = table.items[:, 0].tolist()
    rows = (max(firsts) + 1) * block
    columns = (int(table.blocks.max()) + 1) * other
    shape = (rows, columns)
    seen = torch.zeros(shape, dtype=torch.int32)
    block_q, block_k = (other, block) if transposed else (block, other)
    for first, full, full_stop, partial, partial_stop, _ in table.items.tolist():
        for entry in (*range(full, full_stop), *range(partial, partial_stop)):
            tile = torch.ones(block_q, block_k, dtype=torch.int32)
            if entry in range(partial, partial_stop):
                words = table.patterns.view(-1, block_q, block_k // 32)[table.pattern[entry]]
                tile = ((words[..., None] >> torch.arange(32)) & 1).flatten(1)
            column = int(table.blocks[entry]) * other
            seen[first * block : (first + 1) * block, column : column + other] += (
                tile.mT if transposed else tile
            )
    return seen, len(firsts)


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 32), (32, 64), (64, 32)])
@pytest.mark.parametrize("name", [name for name in MASKS if "sparse" not in name])
def test_tables_hold_the_mask(name: str, block_q: int, block_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows and by keys, also where rows are cut, and with a last block that is not whole."""
    mask = MASKS[name].sized(LENGTH)
    expected = (
        mask.allows(torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]).expand(LENGTH, LENGTH).int()
    )
    for cut in (False, True):
        if cut:
            monkeypatch.setattr(table_module, "_LEAST_LIMIT", 1)
            monkeypatch.setattr(table_module, "_TIMES_MEAN", 0)
        table_module._tables.cache_clear()
        both = tables(mask, 0, LENGTH, LENGTH, block_q, block_k, CPU)
        by_row, items = drawn_from(both.by_row, block_q, block_k, False)
        assert torch.equal(by_row[:LENGTH, :LENGTH], expected)
        assert not by_row[:, LENGTH:].any()
        assert items >= -(-LENGTH // block_q)
        by_key, _ = drawn_from(both.by_key, block_k, block_q, True)
        assert torch.equal(by_key.mT[:LENGTH, :LENGTH], expected)
    table_module._tables.cache_clear()


def test_long_rows_are_cut() -> None:
    """One global row among many short ones is walked by several programs, and its slots are merged."""
    length = 16 * 256
    both = tables(Window(4) | GlobalTokens.first(1), 0, length, length, 16, 32, CPU)
    slots = both.by_row.items[:, 5]
    assert both.by_row.num_slots == int((slots >= 0).sum()) > 1
    assert both.by_row.merges.tolist() == [[0, 0, both.by_row.num_slots]]
    lengths = (both.by_row.items[:, 2] - both.by_row.items[:, 1]) + (
        both.by_row.items[:, 4] - both.by_row.items[:, 3]
    )
    assert int(lengths.max()) <= 32 < length // 32
    assert sorted(slots[slots >= 0].tolist()) == list(range(both.by_row.num_slots))


def test_tables_are_linear_in_their_blocks() -> None:
    """Draws of one row block lie anywhere: blocks between them are never looked at."""
    calls = []

    class Counting(type(Window(1))):  # type: ignore[misc]
        def allows(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            calls.append(torch.broadcast_shapes(q.shape, k.shape).numel())
            return super().allows(q, k)

    try:
        for length in (1 << 12, 1 << 13):
            tables(Counting(100), 0, length, length, 64, 64, CPU)
    finally:
        del Mask.registry[Counting._name()]
    assert sum(calls[1:]) < 2.1 * calls[0]


@pytest.mark.parametrize(("q_len", "num_keys"), [(500, 500), (37, 500), (500, 37)])
@pytest.mark.parametrize("name", [name for name in MASKS if "flash" in name or "sliding" in name])
def test_costs_count_the_blocks_that_hold_anything(name: str, q_len: int, num_keys: int) -> None:
    """Of a band, the blocks walked are those with an allowed pair, and each is multiplied whole."""
    mask, offset = MASKS[name], num_keys - q_len
    q, k = torch.arange(offset, offset + q_len), torch.arange(num_keys)
    allowed = mask.allows(q[:, None], k[None]).expand(q_len, num_keys)
    counted = multiplied_pairs(mask, q_len, num_keys, offset, 2, 64)
    for kernel in ("forward", "dq", "dkdv"):
        if kernel == "dkdv" and len(parts_of(mask, by_key=True)) > 1:
            continue
        config = CONFIGS[f"band_{kernel}"][90, 2, 64]
        block_q, block_k = config["BLOCK_Q"], config["BLOCK_K"]
        padded = torch.nn.functional.pad(allowed, (0, -num_keys % block_k, 0, -q_len % block_q))
        held = padded.unflatten(1, (-1, block_k)).any(2).unflatten(0, (-1, block_q)).any(1)
        assert getattr(counted, kernel) == int(held.sum()) * block_q * block_k


def test_far_sinks_are_those_beyond_the_window() -> None:
    mask = FarSinks((3, 0, 5, 0))
    q, k = torch.arange(-4, 30), torch.arange(20)
    lower, upper = mask.row_spans(q, 20)
    spans = ((k >= lower[..., None]) & (k < upper[..., None])).any(1)
    assert torch.equal(spans, mask.allows(q[:, None], k[None]))


def test_what_a_cuda_graph_walks_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is replayed reads tables by their addresses; and none can be built while it is captured."""
    mask, held = Window(5), {}
    monkeypatch.setattr(table_module, "_CAPTURED", held)
    table_module._tables.cache_clear()
    found = tables(mask, 0, LENGTH, LENGTH, 32, 32, CPU)
    monkeypatch.setattr(table_module, "_is_captured", lambda device: True)
    assert tables(mask, 0, LENGTH, LENGTH, 32, 32, CPU) is found and list(held.values()) == [found]
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        _ = found.by_row
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        tables(mask, 0, LENGTH + 32, LENGTH + 32, 32, 32, CPU)
