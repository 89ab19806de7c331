"""Mutants of plans and block layouts: how a mask becomes tiles, and tiles become groups."""

from __future__ import annotations

from .mutant import Mutant, Subject

FILE = "masks/layout.py"


def mutant(before: str, after: str, why: str, survives: str = "") -> Mutant:
    return Mutant(FILE, before, after, why, survives)


SLICES = (
    mutant(
        "for part in outside(s, *core)]",
        "for part in outside(s, *hull)]",
        "keys that a second mask allows to some rows are lost",
    ),
    mutant(
        "mask = other if self.mask is None else self.mask & other",
        "mask = other",
        "a second mask replaces the first",
    ),
    mutant(
        "s.start + -(-(low - s.start) // step) * step",
        "low",
        "a strided slice that is trimmed changes its phase",
    ),
    mutant(
        "for edges in ((s.start, low), (up, s.stop))",
        "for edges in ((s.start, low),)",
        "what is cut off behind is lost",
    ),
    mutant("max(b, merged[-1][1])", "b", "a union with an interval inside another shrinks it"),
    mutant(
        '(torch.where(empty, num_keys, lower), "amax", 0)',
        '(torch.where(empty, num_keys, lower), "amin", num_keys)',
        "keys that some row lacks are taken for whole",
    ),
    mutant(
        "                low = b\n",
        "",
        "whole keys are partial ones as well, and counted twice",
    ),
    mutant(
        "                if low < a:\n                    partial.append(slice(low, a, 1))\n",
        "",
        "partial keys before the whole ones are lost",
    ),
)

PARTS = (
    mutant(
        "            first = False\n    return tuple(result)",
        "    return tuple(result)",
        "every part of a tile is stored as if it were the first",
    ),
    mutant(
        "part[kind].append(piece)",
        "part[0].append(piece)",
        "partial keys of a tile that is split are taken for whole",
    ),
    mutant(
        "    if room < most:\n        yield _part(tile, *part)\n",
        "",
        "the keys left over when a tile is split are lost",
    ),
)

GROUPS = (
    mutant(
        "shape = (not tile.first, tile.num_rows",
        "shape = (False, tile.num_rows",
        "tiles to be stored and tiles to be merged share a group",
    ),
    mutant(
        "in_order = sorted(members, key=lambda shape: shape[0])",
        "in_order = sorted(members, key=lambda shape: not shape[0])",
        "parts are merged before there is anything to merge them with",
    ),
    mutant(
        "if tile.mask.stationary:",
        "if True:",
        "tiles of equal shape are said to hide the same pairs wherever they stand",
    ),
    mutant(
        "*((s.start - tile.rows.start, _length(s), s.step) for s in tile.partial)",
        "*((0, _length(s), s.step) for s in tile.partial)",
        "tiles whose partial keys lie elsewhere are said to hide the same pairs",
    ),
    mutant(
        "return tile.mask, *((s.start",
        "return 0, *((s.start",
        "tiles under two masks are said to hide the same pairs",
    ),
    mutant(
        "(bits << torch.arange(62)).sum(1).tolist()",
        "bits.sum(1).tolist()",
        "tiles that hide as many pairs are said to hide the same ones",
    ),
    mutant(
        "F.pad(allowed, (0, -len(allowed) % 62)).unflatten",
        "allowed[: len(allowed) // 62 * 62].unflatten",
        "tiles that differ in their last pairs are said to hide the same ones",
    ),
    mutant(
        "alike = all(run.width == width and all(s.step == 1 for s in run.slices) for run in runs)",
        "alike = all(run.width == width for run in runs)",
        "strided slices are read as blocks",
    ),
    mutant(
        "aligned = all(start % width == 0 for run in starts for start in run)",
        "aligned = True",
        "slices that straddle blocks are read as blocks",
    ),
    mutant(
        "even = len(gaps) == 1 and all(s.step == 1 for s in slices)",
        "even = all(s.step == 1 for s in slices)",
        "uneven slices are read as one strided view",
    ),
    mutant(
        "even = len(gaps) == 1 and all(s.step == 1 for s in slices)",
        "even = len(gaps) == 1",
        "slices with steps are read as if their keys followed each other",
    ),
    mutant(
        "edges = sorted({edge for own in lengths for edge in accumulate(own)})",
        "edges = sorted({edge for own in lengths[:2] for edge in accumulate(own)} | {sum(lengths[0])})",
        "slices are cut where the first two tiles have edges",
    ),
)

BLOCKS = (
    mutant(
        "range(low // size, -(-up // size))",
        "range(low // size, max(low // size + 1, up // size))",
        "the block in which an interval ends is left out",
    ),
    mutant(
        "if any(a <= low and up <= b for a, b in inner):",
        "if any(a <= low or up <= b for a, b in inner):",
        "blocks with half of their pairs are full",
    ),
    mutant(
        "low, up = block * size, min((block + 1) * size, num_keys)",
        "low, up = block * size, (block + 1) * size",
        "the last block is judged by keys that do not exist",
    ),
    mutant(
        "if bool(allowed.all()):",
        "if bool(allowed.any()):",
        "blocks with any pair are full",
    ),
    mutant(
        "(s, min(s + block_size, offset + q_len)) for s",
        "(s, s + block_size) for s",
        "the last row of blocks is judged by queries that do not exist",
    ),
)

SUBJECT = Subject(
    "layout",
    SLICES + PARTS + GROUPS,
    tests=("tests/ops/test_small_budgets.py::test_tiles",),
    mechanisms=("sliding_window", "longformer", "bigbird", "sparse_transformer"),
    first=("matrix_is_the_paper", "equals_its_matrix"),
    others=(
        "tests/test_regressions.py::test_tiles_of_one_shape_under_different_masks_stay_apart",
        "tests/test_masks.py::test_tiles_hold_every_pair_exactly_once",
    ),
)

BLOCK_LAYOUT = Subject("block layout", BLOCKS, tests=("tests/test_masks.py::test_block_layout_is_exact",))
