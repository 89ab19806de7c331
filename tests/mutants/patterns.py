"""Mutants of the patterns: windows, sinks, global tokens, blocks, strides."""

from __future__ import annotations

from .mutant import Mutant, Subject

FILE = "masks/patterns.py"


def mutant(before: str, after: str, why: str, survives: str = "") -> Mutant:
    return Mutant(FILE, before, after, why, survives)


WINDOW = (
    mutant(
        "return (q - k).abs() < self.size", "return (q - k).abs() <= self.size", "a window of 8 shows 9 keys"
    ),
    mutant(
        "return (q - k).abs() < self.size", "return (q - k) < self.size", "a window that sees all the future"
    ),
    mutant(
        "return (q - k).abs() < self.size",
        "return (q - k).abs() < 2 * self.size",
        "local-attention without exact_windowsize: up to 2 W keys",
    ),
    mutant(
        "_clip((q - self.size + 1)[:, None]",
        "_clip((q - self.size)[:, None]",
        "a window's span starts a key early",
    ),
    mutant(
        "(q + self.size)[:, None], num_keys)",
        "(q + self.size - 1)[:, None], num_keys)",
        "a window's span ends a key early",
    ),
    mutant(
        "return max(0, start - self.size + 1), max(0, min(num_keys, stop + self.size - 1))",
        "return max(0, start - self.size + 2), max(0, min(num_keys, stop + self.size - 1))",
        "the hull of a window drops its first key",
    ),
    mutant(
        "max(0, min(num_keys, stop + self.size - 1))",
        "max(0, min(num_keys, start + self.size))",
        "the hull of a window is that of its first row",
    ),
    mutant(
        "return max(0, stop - self.size), max(0, min(num_keys, start + self.size))",
        "return max(0, stop - self.size - 1), max(0, min(num_keys, start + self.size))",
        "the last row does not see the first key of the core",
    ),
    mutant(
        "return max(0, stop - self.size), max(0, min(num_keys, start + self.size))",
        "return max(0, start - self.size + 1), max(0, min(num_keys, stop + self.size - 1))",
        "what any row sees is taken for what every row sees",
    ),
    mutant(
        "return lower.clamp(min=0), upper.clamp(max=num_keys)",
        "return lower, upper.clamp(max=num_keys)",
        "spans start before the first key",
    ),
    mutant(
        "return lower.clamp(min=0), upper.clamp(max=num_keys)",
        "return lower.clamp(min=0), upper",
        "spans run past the last key",
    ),
)

SINKS = (
    mutant("(k < self.count) & (q == q)", "(k <= self.count) & (q == q)", "one sink too many"),
    mutant(
        "(k < self.count) & (q == q)", "(k < self.count) & (q >= k)", "sinks are causal even where nothing is"
    ),
    mutant(
        "torch.full_like(q, min(self.count, num_keys))[:, None]",
        "torch.full_like(q, self.count)[:, None]",
        "sinks of a sequence shorter than their number",
    ),
    mutant(
        "torch.full_like(q, min(self.count, num_keys))[:, None]",
        "torch.full_like(q, min(self.count - 1, num_keys))[:, None]",
        "the tiles miss the last sink",
    ),
    mutant(
        'as queries they are ordinary."""\n\n    count: int\n    anchored = True',
        'as queries they are ordinary."""\n\n    count: int\n    anchored = False',
        "sinks stay at the start of the padded row",
    ),
)

GLOBAL = (
    mutant(
        "return cls((0, count) if count else ())", "return cls((0, count + 1))", "one global token too many"
    ),
    mutant("sorted(set(positions))", "list(positions)", "global positions must come in order"),
    mutant("sorted(set(positions))", "sorted(positions)", "a global position given twice undoes itself"),
    mutant(
        "edges, right=True) % 2 == 1",
        "edges, right=False) % 2 == 1",
        "global runs are shifted by one",
    ),
    mutant(
        "return self._is_global(q) | self._is_global(k)",
        "return self._is_global(k) & (q == q)",
        "global tokens are seen by all but do not see all",
    ),
    mutant(
        "return self._is_global(q) | self._is_global(k)",
        "return self._is_global(q) & self._is_global(k)",
        "global tokens see each other alone",
    ),
    mutant(
        "everything = torch.where(self._is_global(q), num_keys, 0)[:, None]",
        "everything = torch.where(self._is_global(q), q + 1, 0)[:, None]",
        "the tiles of a global query end at itself",
    ),
    mutant(
        "torch.cat([everything, runs[..., 1]], -1)",
        "torch.cat([everything, runs[..., 0] + 1], -1)",
        "the tiles hold the first token of each global run",
    ),
    mutant(
        'ascending half-open runs."""\n\n    runs: tuple[int, ...]\n    anchored = True',
        'ascending half-open runs."""\n\n    runs: tuple[int, ...]\n    anchored = False',
        "global tokens stay at the start of the padded row",
    ),
)

BLOCKS = (
    mutant(
        "return distance.abs() <= self.num_blocks // 2",
        "return distance.abs() < self.num_blocks // 2",
        "a window of blocks is a block short on each side",
    ),
    mutant(
        "return distance.abs() <= self.num_blocks // 2",
        "return distance.abs() <= self.num_blocks",
        "a window of 3 blocks shows 7",
    ),
    mutant(
        'distance = q.div(self.block, rounding_mode="floor") - k.div(self.block, rounding_mode="floor")',
        'distance = q.div(self.block, rounding_mode="trunc") - k.div(self.block, rounding_mode="trunc")',
        "positions before the anchor are rounded towards it",
    ),
    mutant(
        "(own + side + 1) * self.block",
        "(own + side) * self.block",
        "the tiles miss the last block of the window",
    ),
    mutant(
        "return not self.causal\n",
        "return self.causal\n",
        "non-causal draws take the padded length for the row's own",
    ),
    mutant(
        "num_blocks=-(-num_keys // self.block)",
        "num_blocks=num_keys // self.block",
        "the last, partial block is never drawn",
    ),
    mutant(
        "available = row_blocks if self.causal else self.num_blocks",
        "available = row_blocks + 1 if self.causal else self.num_blocks",
        "causal draws include the row's own block",
    ),
    mutant(
        "available = row_blocks if self.causal else self.num_blocks",
        "available = row_blocks if self.causal else row_blocks + 1",
        "non-causal draws look back only",
    ),
    mutant(
        "available = row_blocks if self.causal else self.num_blocks",
        "available = row_blocks if self.causal else torch.as_tensor(self.num_blocks).clamp(max=1024 // self.block)",
        "transformers#16566: random blocks from the first 1024 tokens only",
    ),
    mutant("count=self.count, seed=self.seed", "count=self.count, seed=0", "the pattern ignores its seed"),
    mutant(
        "for draw in range(self.count):",
        "for draw in range(self.count - 1):",
        "the last of the drawn blocks is not seen",
    ),
    mutant(
        "torch.where(chosen >= 0, lower + self.block, 0), num_keys)",
        "lower + self.block, num_keys)",
        "where nothing could be drawn the tiles hold block 0",
    ),
)

STRIDED = (
    mutant(
        "return (distance < self.stride) | (distance % self.stride == 0)",
        "return (distance <= self.stride) | (distance % self.stride == 1)",
        "the strided part is shifted by one",
    ),
    mutant(
        "return (distance < self.stride) | (distance % self.stride == 0)",
        "return (distance < self.stride) | (k % self.stride == 0)",
        "strided as if it were fixed",
    ),
    mutant(
        "            + (q % self.stride)[:, None]\n",
        "",
        "the columns of strided spans are those of the first row",
    ),
    mutant(
        "torch.cat([up, (column + 1).clamp(max=num_keys)], -1)",
        "torch.cat([up, column + 1], -1)",
        "strided columns run past the last key",
    ),
    mutant(
        "(torch.minimum(q + self.stride, limit) - (q - self.stride + 1).clamp(min=0))",
        "(torch.minimum(q + self.stride, limit) - (q - self.stride + 1))",
        "the band's keys before the first are counted",
    ),
    mutant(
        "(limit - q % self.stride + self.stride - 1).div",
        "(limit - q % self.stride).div",
        "the last key of a column is not counted",
    ),
    mutant(
        "return window + column - ((q >= 0) & (q < limit)).to(q.dtype)",
        "return window + column",
        "the diagonal is counted in the band and in the column",
    ),
    mutant(
        "return window + column - ((q >= 0) & (q < limit)).to(q.dtype)",
        "return window + column - 1",
        "a diagonal is taken off that does not exist",
    ),
    mutant(
        "window = Window(self.stride)\n        for low",
        "window = Window(self.stride + 1)\n        for low",
        "band and columns overlap in the tiles",
    ),
    mutant(
        "first = start + (residue - start) % self.stride",
        "first = start + residue",
        "residue classes count from the first query",
    ),
    mutant("if len(keys) > 1 or rows != keys:", "if len(keys) > 1:", "a column of a single key is dropped"),
    mutant(
        "((), None) if own is None else ((own,), _OffDiagonal())",
        "((), None) if own is None else ((own,), None)",
        "the diagonal is visited twice",
    ),
    mutant(
        "yield Tile(query_slice, others, partial, mask, first=False)",
        "yield Tile(query_slice, others, partial, mask)",
        "the columns store over the band",
    ),
    mutant(
        "others = tuple(outside(key_slice, rows.start, rows.stop))",
        "others = tuple(outside(key_slice, rows.start, rows.stop))[:1]",
        "the later keys of a column are dropped",
    ),
    mutant(
        "own = trim(key_slice, rows.start, rows.stop)",
        "own = trim(key_slice, rows.start + 1, rows.stop)",
        "the first key beside the rows of a column is lost",
    ),
    mutant("        return q != k\n", "        return q < k\n", "the tiles of a column look ahead only"),
)

FIXED = (
    mutant(
        "return own | (k % self.stride >= self.stride - self.summary)",
        "return own | (k % self.stride > self.stride - self.summary)",
        "a summary is a key short",
    ),
    mutant(
        "return own | (k % self.stride >= self.stride - self.summary)",
        "return own | (k % self.stride < self.summary)",
        "summaries are the first keys of a block, not the last",
    ),
    mutant(
        "return own | (k % self.stride >= self.stride - self.summary)",
        "return k % self.stride >= self.stride - self.summary",
        "the own block is not seen",
    ),
    mutant(
        "torch.arange(1, 1 + num_keys // self.stride + 1, device=q.device)",
        "torch.arange(1, 1 + num_keys // self.stride, device=q.device)",
        "the summary of the last, partial block is missing from the spans",
    ),
    mutant(
        "torch.cat([own, ends - self.summary], -1)",
        "torch.cat([own, ends - 1], -1)",
        "spans hold one key of each summary",
    ),
    mutant(
        "x // self.stride * self.summary + (x % self.stride - self.stride + self.summary).clamp(\n"
        "                min=0\n            )",
        "x // self.stride * self.summary",
        "the summary keys of a partial block are not counted",
    ),
    mutant(
        "return summaries(limit) - (summaries(up) - summaries(low)) + (up - low)",
        "return summaries(limit) + (up - low)",
        "the own block's summary is counted twice",
    ),
    mutant(
        "in row_ranges(start, stop, size, self.cuts(start, stop)):",
        "in row_ranges(start, stop, size, []):",
        "tiles straddle two blocks and take the first for their own",
    ),
    mutant(
        "rest = slice(max(0, own), min(own + first, num_keys), 1)",
        "rest = slice(max(0, own), own + first, 1)",
        "the last own block runs past the last key",
    ),
    mutant(
        "for at in range(first, self.stride)]",
        "for at in range(self.summary)]",
        "the tiles hold the first keys of each block",
    ),
    mutant(
        "summaries = [slice(at, num_keys, self.stride) for",
        "summaries = [slice(at, stop, self.stride) for",
        "the tiles hold no summaries after the last query",
    ),
    mutant(
        "rest = slice(max(0, own), min(own + first, num_keys), 1)",
        "rest = slice(max(0, own), min(own + self.stride, num_keys), 1)",
        "the own block's summary is visited twice",
    ),
)

SUBJECT = Subject(
    "patterns",
    WINDOW + SINKS + GLOBAL + BLOCKS + STRIDED + FIXED,
    tests=("tests/test_masks.py", "tests/test_arguments.py"),
    mechanisms=("sliding_window", "longformer", "bigbird", "sparse_transformer"),
    others=("tests/test_properties.py", "tests/test_regressions.py"),
)
