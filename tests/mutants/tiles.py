"""Mutants of the walk over tiles: slabs, rows, keys and bounds of a batch, and the memory that batches share."""

from __future__ import annotations

from .mutant import Mutant, Subject

FILE = "ops/tiles.py"
LAYOUT = "masks/layout.py"


def mutant(before: str, after: str, why: str, survives: str = "") -> Mutant:
    return Mutant(FILE, before, after, why, survives)


ROWS = (
    mutant(
        "return self.take(x).narrow(dim, self.start, self.stop - self.start)",
        "return self.take(x).narrow(dim, 0, self.stop - self.start)",
        "keys are taken from the first position on, not from the anchor",
    ),
    mutant("if not mask.drawn_over_all:", "if mask.drawn_over_all:", "draws forget where the padding begins"),
    mutant(
        "if k_segment is None or not mask.anchored:",
        "if k_segment is None or not mask.drawn_over_all:",
        "an anchored pattern counts from position 0 under padding",
    ),
    mutant(
        "return stored == self.q.shape[2]",
        "return stored > 0",
        "rows are taken for stored where only some of them are",
    ),
    mutant(
        "target[:, :, :, s] = values[:, :, number]",
        "target[:, :, :, s] = values[:, :, 0]",
        "all tiles of a batch store the result of its first",
    ),
    mutant(
        "torch.stack([x[:, :, :, s] for s in self._rows], 2)",
        "torch.stack([x[:, :, :, self._rows[0]] for s in self._rows], 2)",
        "all tiles of a batch take the rows of its first",
    ),
    mutant(
        "x.unflatten(1, (heads, x.shape[1] // heads))[self.slab]",
        "x.unflatten(1, (x.shape[1] // heads, heads)).transpose(1, 2)[self.slab]",
        "query heads are dealt out to key heads in turn",
    ),
)

BATCHES = (
    mutant(
        "for first in range(0, len(group.tiles), size):",
        "for first in range(0, max(1, len(group.tiles) - size + 1), size):",
        "the last batch of a group is left out unless it is full",
    ),
    mutant(
        "slice(first, first + size), part, cap)",
        "slice(first, first + size + 1), part, cap)",
        "the tile between two batches is counted twice",
    ),
    mutant(
        "yield slice(row, row + rows), slice(column, column + columns)",
        "yield slice(row, row + rows), slice(column, heads)",
        "slabs of heads overlap",
    ),
    mutant(
        "for row in range(0, batch, rows):",
        "for row in range(0, batch - rows + 1, rows):",
        "the last slab of rows is left out unless it is full",
    ),
    mutant(
        "first = self.span.start + number",
        "first = number",
        "a tile to be merged is looked up in its batch's place in the first batch",
    ),
    mutant(
        "tuple(x[:, :, number : number + 1] for x in values)",
        "tuple(x[:, :, :1] for x in values)",
        "every tile of a batch merges the result of the first",
    ),
)

KEYS = (
    mutant(
        "index[self.span].flatten()",
        "index[: len(self.tiles)].flatten()",
        "blocks of keys are those of the first batch",
    ),
    mutant(
        "blocks.index_add_(2, index, values.view(*target.shape[:2], len(index), -1, target.shape[3]))",
        "blocks[:, :, index] += values.view(*target.shape[:2], len(index), -1, target.shape[3])",
        "of the gradients of a block that two tiles share one is lost",
    ),
    mutant(
        "            column += run.width\n",
        "",
        "the second slice of keys is written over the first",
    ),
    mutant(
        '"queries", dtype).mul_(scale)',
        '"keys", dtype).mul_(scale)',
        "queries and keys share a buffer",
    ),
    Mutant(
        "ops/workspace.py",
        "held = self._held.get(name)",
        "held = next(iter(self._held.values()), None)",
        "every name gets one and the same buffer",
    ),
)

HIDDEN = (
    mutant(
        "_bound(~tile.allowed(self.k.device), dtype)",
        "_bound(tile.allowed(self.k.device), dtype)",
        "partial keys: what is allowed is hidden",
    ),
    Mutant(
        LAYOUT,
        "_positions((self.rows,), device), _positions(self.partial, device)",
        "_positions((self.rows,), device), _positions(self.keys, device)[: self.num_partial]",
        "the predicate is asked about the first keys of a tile, not the partial ones",
    ),
    Mutant(
        LAYOUT,
        "torch.arange(s.start, s.stop, s.step, device=device)",
        "torch.arange(s.start, s.start + len(range(s.start, s.stop, s.step)), device=device)",
        "the predicate is asked about strided keys as if they followed each other",
    ),
    mutant(
        "cap = None if tile.mask is None else",
        "cap = None if tile.mask is None or not tile.mask.stationary else",
        "tiles that hide pairs of their own hide none",
    ),
    mutant(
        "partial = scores[..., -self.cap.shape[-1] :]",
        "partial = scores[..., : self.cap.shape[-1]]",
        "the bound is put on the first columns, the partial keys are the last",
    ),
    mutant(
        "torch.full(hidden.shape, torch.inf, dtype",
        "torch.full(hidden.shape, 88.0, dtype",
        "scores of partial keys are clipped at 88",
    ),
    mutant(
        "torch.cat([walk.k_segment[rows, s] for s in tile.keys], 1)",
        "torch.cat([walk.k_segment[: len(walk.k_segment[rows]), s] for s in tile.keys], 1)",
        "every slab has the segments of the first rows",
    ),
)

SUBJECT = Subject(
    "tiles",
    ROWS + BATCHES + KEYS + HIDDEN,
    tests=(
        "tests/ops/test_small_budgets.py::test_tiles",
        "tests/ops/test_small_budgets.py::test_aligned_blocks_in_several_batches",
    ),
    mechanisms=("flash", "sliding_window", "longformer", "bigbird", "sparse_transformer"),
    first=("matrix_is_the_paper", "equals_its_matrix", "error_is_within_budget"),
)
