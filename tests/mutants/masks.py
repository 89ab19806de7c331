"""Mutants of the mask algebra, of random draws and of packed documents."""

from __future__ import annotations

from .mutant import Mutant, Subject

BASE, DRAWS, SEGMENTS = "masks/base.py", "masks/random_blocks.py", "masks/segments.py"

ALGEBRA = (
    Mutant(
        BASE,
        "_measure(lower.clamp(min=0), torch.minimum(upper, limit[:, None]))",
        "_measure(lower.clamp(min=0), upper)",
        "counts forget that a query's limit is its own",
    ),
    Mutant(
        BASE,
        "offset = num_keys - q_len if q_offset is None else q_offset\n        mask, total",
        "offset = 0 if q_offset is None else q_offset\n        mask, total",
        "pairs are counted with the queries first, not last",
    ),
    Mutant(
        BASE,
        "mask, total = self.sized(num_keys), 0",
        "mask, total = self, 0",
        "pairs are counted before the pattern knows the length",
    ),
    Mutant(
        BASE,
        "min(start + _ROWS_AT_ONCE, offset + q_len)",
        "start + _ROWS_AT_ONCE",
        "the last batch of counted rows runs past the queries",
    ),
    Mutant(
        BASE,
        "for start in range(offset, offset + q_len, _ROWS_AT_ONCE)",
        "for start in range(0, offset + q_len, _ROWS_AT_ONCE)",
        "rows before the first query are counted too",
    ),
    Mutant(
        BASE,
        "q = torch.arange(offset, offset + q_len, device=device)[:, None]",
        "q = torch.arange(q_len, device=device)[:, None]",
        "the dense view ignores the offset",
    ),
    Mutant(
        BASE,
        "return self.sized(num_keys).allows(q, k).expand(q_len, num_keys)",
        "return self.allows(q, k).expand(q_len, num_keys)",
        "the dense view does not tell the pattern its length",
    ),
    Mutant(
        BASE, "mask.allows(q_idx + q_offset, kv_idx)", "mask.allows(q_idx, kv_idx)", "mask_mod: no offset"
    ),
    Mutant(
        BASE,
        'return f"{cls.__module__}.{cls.__qualname__}"',
        "return cls.__name__",
        "masks of one name in two modules replace each other",
    ),
    Mutant(
        BASE,
        "upper.cummax(-1).values[..., :-1]",
        "upper[..., :-1]",
        "a union is measured from the previous interval, not the running maximum",
    ),
    Mutant(
        BASE,
        "(upper - torch.maximum(lower, reached)).clamp",
        "(upper - lower).clamp",
        "what two intervals share is counted twice",
    ),
    Mutant(
        BASE,
        "return self.a.anchored or self.b.anchored",
        "return self.a.anchored and self.b.anchored",
        "half an anchored pattern is not anchored",
    ),
    Mutant(
        BASE,
        "return self.a.drawn_over_all or self.b.drawn_over_all",
        "return self.a.drawn_over_all and self.b.drawn_over_all",
        "half a drawn pattern is not drawn over the row's own length",
    ),
    Mutant(
        BASE,
        "return self.a.has_plan or self.b.has_plan",
        "return self.a.has_plan and self.b.has_plan",
        "causality throws away a pattern's own tile plan: quadratic",
    ),
    Mutant(
        BASE,
        "type(self)(self.a.sized(num_keys), self.b.sized(num_keys))",
        "type(self)(self.a, self.b.sized(num_keys))",
        "only the second half of a pair learns the length",
    ),
    Mutant(
        BASE,
        "return self.a.allows(q, k) & self.b.allows(q, k)",
        "return self.a.allows(q, k) | self.b.allows(q, k)",
        "an intersection that is a union",
    ),
    Mutant(
        BASE,
        "return self.a.allows(q, k) | self.b.allows(q, k)",
        "return self.a.allows(q, k) ^ self.b.allows(q, k)",
        "a union that leaves out what both allow",
    ),
    Mutant(
        BASE,
        "lower = torch.maximum(a_low[..., :, None], b_low[..., None, :])",
        "lower = torch.minimum(a_low[..., :, None], b_low[..., None, :])",
        "an intersection starts at the earlier start",
    ),
    Mutant(
        BASE,
        "torch.minimum(a_up[..., :, None], b_up[..., None, :])",
        "torch.maximum(a_up[..., :, None], b_up[..., None, :])",
        "an intersection ends at the later end",
    ),
    Mutant(
        BASE,
        "torch.cat([a_low, b_low], -1), torch.cat([a_up, b_up], -1)",
        "torch.cat([a_low, b_low], -1), torch.cat([b_up, a_up], -1)",
        "a union pairs starts with the other mask's ends",
    ),
    Mutant(
        BASE,
        "self.b.hull(start, stop, num_keys)\n        return max(a_low, b_low), min(a_up, b_up)",
        "self.b.hull(start, stop, num_keys)\n        return max(a_low, b_low), min(a_up, b_low)",
        "an intersection's hull ends where the second mask begins",
    ),
    Mutant(
        BASE,
        "return min(a_low, b_low), max(a_up, b_up)",
        "return max(a_low, b_low), min(a_up, b_up)",
        "a union's hull is that of an intersection",
    ),
    Mutant(
        BASE,
        "        if not self.has_plan:\n            return super().tiles(start, stop, num_keys, size)\n        plan",
        "        if self.b.has_plan or not self.has_plan:\n"
        "            return super().tiles(start, stop, num_keys, size)\n        plan",
        "a plan on the right of & is not used: quadratic",
    ),
    Mutant(
        BASE,
        "return mask.counts(q, torch.minimum(limit, q + 1).clamp(min=0))",
        "return mask.counts(q, torch.minimum(limit, q).clamp(min=0))",
        "causal pairs are counted without the diagonal",
    ),
    Mutant(
        BASE,
        "self.b.core(start, stop, num_keys)\n        return max(a_low, b_low), min(a_up, b_up)",
        "self.b.core(start, stop, num_keys)\n        return min(a_low, b_low), max(a_up, b_up)",
        "the core of an intersection is that of a union",
    ),
    Mutant(
        BASE,
        "mask = _Minus(tile.mask or Everything(), self.a)",
        "mask = tile.mask or Everything()",
        "a union visits what both masks allow twice",
    ),
    Mutant(
        BASE,
        "mask = _Minus(tile.mask or Everything(), self.a)",
        "mask = _Minus(Everything(), self.a)",
        "the second half of a union forgets its own mask",
    ),
    Mutant(
        BASE,
        "yield Tile(tile.rows, (), tile.keys, mask, first=False)",
        "yield Tile(tile.rows, tile.whole, tile.partial, mask, first=False)",
        "a union trusts whole keys that the other mask has had",
    ),
    Mutant(
        BASE,
        "yield Tile(tile.rows, (), tile.keys, mask, first=False)",
        "yield Tile(tile.rows, (), tile.partial, mask, first=False)",
        "a union drops the keys that its second half has whole",
    ),
    Mutant(
        BASE,
        "yield Tile(tile.rows, (), tile.keys, mask, first=False)",
        "yield Tile(tile.rows, (), tile.keys, mask, first=tile.first)",
        "the second half of a union stores over the first",
    ),
    Mutant(
        BASE,
        "return self.a.stationary and self.b.stationary\n\n    @property\n    def has_plan",
        "return self.a.stationary or self.b.stationary\n\n    @property\n    def has_plan",
        "a pair of masks repeats if either does: tiles share a pattern that is not theirs",
    ),
    Mutant(
        BASE,
        "return self.a.stationary and self.b.stationary\n\n    def allows",
        "return self.a.stationary\n\n    def allows",
        "a difference repeats if its first half does",
    ),
    Mutant(
        BASE,
        "return 0, max(0, min(start + 1, num_keys))",
        "return 0, max(0, min(stop, num_keys))",
        "what the last causal row sees is taken for what every row sees",
    ),
    Mutant(
        BASE,
        "return self.a.allows(q, k) & ~self.b.allows(q, k)",
        "return self.a.allows(q, k) & self.b.allows(q, k)",
        "a difference that is an intersection",
    ),
    Mutant(BASE, "return k <= q\n", "return k < q\n", "causal: a query does not see itself"),
    Mutant(
        BASE,
        "torch.zeros_like(q)[:, None], (q + 1).clamp(max=num_keys)[:, None]",
        "torch.zeros_like(q)[:, None], q.clamp(max=num_keys)[:, None]",
        "causal spans end before the query",
    ),
    Mutant(
        BASE,
        "(q + 1).clamp(max=num_keys)[:, None]",
        "(q + 1)[:, None]",
        "causal spans run past the last key",
    ),
    Mutant(
        BASE,
        "return 0, max(0, min(stop, num_keys))",
        "return 0, max(0, min(start + 1, num_keys))",
        "the hull of causal rows is that of the first of them",
    ),
)

RANDOM = (
    Mutant(
        DRAWS,
        "return (x >> bits) & ((1 << (64 - bits)) - 1)",
        "return x >> bits",
        "an arithmetic shift in place of a logical one: another pattern for the same seed",
    ),
    Mutant(
        DRAWS,
        "(x ^ _logical_shift(x, 27)) * -7723592293110705685",
        "(x ^ _logical_shift(x, 27)) * -7723592293110705683",
        "a constant of the hash mistyped: another pattern for the same seed",
    ),
    Mutant(
        DRAWS,
        "key = _mix(blocks * 0x2545F4914F6CDD1D + _signed(seed))",
        "key = _mix(blocks * 0x2545F4914F6CDD1D)",
        "the draw ignores the seed",
    ),
    Mutant(
        DRAWS,
        "key = _mix(blocks * 0x2545F4914F6CDD1D + _signed(seed))",
        "key = _mix(torch.zeros_like(blocks) + _signed(seed))",
        "every row block draws the same blocks",
    ),
    Mutant(
        DRAWS,
        "_mix(key + _signed((draw + 1) * _GOLDEN))",
        "_mix(key)",
        "the draws of a row are not independent",
    ),
    Mutant(DRAWS, "left = choices - draw\n", "left = choices\n", "draws reach past the range"),
    Mutant(
        DRAWS,
        "value = value + ((taken >= 0) & (value >= taken))",
        "value = value + ((taken >= 0) & (value > taken))",
        "a block can be drawn twice",
    ),
    Mutant(
        DRAWS,
        "value = torch.where(left > 0, value, -1)",
        "value = torch.where(left >= 0, value, -1)",
        "one more block is drawn than there are",
    ),
    Mutant(
        DRAWS,
        "smaller = (value >= 0) & (value < existing)",
        "smaller = (value >= 0) & (value > existing)",
        "draws are kept in descending order",
    ),
)

PACKING = (
    Mutant(
        SEGMENTS,
        "positions, right=True) - 1",
        "positions, right=False) - 1",
        "the first token of a document belongs to the one before",
    ),
    Mutant(
        SEGMENTS,
        "document < cu_seqlens.numel() - 1",
        "document < cu_seqlens.numel()",
        "the padding behind the last document is a document",
    ),
)

SUBJECT = Subject(
    "masks",
    ALGEBRA + RANDOM + PACKING,
    tests=("tests/test_masks.py", "tests/test_arguments.py", "tests/test_regressions.py"),
    mechanisms=("sliding_window", "longformer", "bigbird", "sparse_transformer"),
)
