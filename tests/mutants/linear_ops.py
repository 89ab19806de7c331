"""Mutants of linear attention: streamed and composed, its packing of documents, its steps."""

from __future__ import annotations

from .mutant import Mutant, Subject

STREAM, COMPOSED = "ops/stream.py", "ops/composed.py"
LINEAR, PACKING = "ops/linear.py", "ops/packing.py"

PLACES = (
    Mutant(
        STREAM,
        "self.first = min(max(0, -self.offset), length)",
        "self.first = 0",
        "queries before the first key are paired with keys",
    ),
    Mutant(
        STREAM,
        "min(length, num_keys - self.offset)",
        "min(length, num_keys - self.offset - 1)",
        "the last key stands beside no query",
    ),
    Mutant(
        STREAM,
        "self.past = min(max(0, self.offset), num_keys)",
        "self.past = min(max(0, self.offset - 1), num_keys)",
        "the key just before the first query is forgotten",
    ),
    Mutant(
        STREAM,
        "return self._blocks(self.last, self.q.shape[2] if",
        "return self._blocks(self.last + 1, self.q.shape[2] if",
        "the first query after the last key is left out",
    ),
    Mutant(
        STREAM,
        "return slice(0, self.first if self.k.shape[2]",
        "return slice(0, self.first - 1 if self.k.shape[2]",
        "the query just before the first key keeps what memory holds",
    ),
    Mutant(
        STREAM,
        "self.offset + self.q.shape[2]\n        return",
        "self.offset + self.q.shape[2] + 1\n        return",
        "the key just after the last query keeps what memory holds as its gradient",
    ),
    Mutant(
        STREAM,
        "x[:, :, rows].unflatten(1, (-1, self.groups))",
        "x[:, :, rows].unflatten(1, (self.groups, -1)).transpose(1, 2)",
        "query heads are dealt out to key heads in turn",
    ),
)

STREAMED = (
    Mutant(STREAM, "x if self.scale == 1.0 else x * self.scale", "x", "queries without their scale"),
    Mutant(
        STREAM,
        "            values = values.masked_fill(~valid[:, :, None, :, None], 0.0)\n",
        "",
        "keys that are not valid keep their features: phi(0) is 1",
    ),
    Mutant(
        STREAM,
        "            b = None if b is None else b.masked_fill(~valid, NOTHING)\n",
        "",
        "keys that are not valid keep their exponents, beside which others vanish",
    ),
    Mutant(
        STREAM,
        "            running = torch.maximum(running, before)\n",
        "",
        "a row's exponent forgets the blocks before its own",
    ),
    Mutant(
        STREAM,
        "                before = torch.where((segment == carry.segment[:, None])[:, None], before, NOTHING)\n",
        "                pass\n",
        "a row's exponent is that of the document before, beside which its own keys vanish",
    ),
    Mutant(
        STREAM,
        "running = running_maximum(b, segment)",
        "running = running_maximum(b, None)",
        "a row's exponent crosses documents inside a block",
    ),
    Mutant(
        STREAM,
        "(u * exact).sum(-1, keepdim=True)",
        "torch.zeros_like(u[..., :1])",
        "the sum of a row's weights has no gradient",
    ),
    Mutant(STREAM, "w = -(u * exact)", "w = (u * exact)", "the sign of the normaliser's gradient"),
    Mutant(STREAM, ".copy_(d_x.mul_(s.scale))", ".copy_(d_x)", "the gradient of q without the scale"),
    Mutant(
        STREAM,
        "a = None if carry.exponent is None else -carry.exponent[..., None]",
        "a = None if carry.exponent is None else 0 * carry.exponent[..., None]",
        "queries after the last key leave no exponent for the gradients of keys",
    ),
    Mutant(
        STREAM,
        "rest = b, a, s.segments(columns), True",
        "rest = a, b, s.segments(columns), True",
        "a and b are not swapped in the reverse scans",
    ),
    Mutant(
        STREAM,
        "rest = b, a, s.segments(columns), True",
        "rest = b, a, s.segments(columns), False",
        "gradients of keys come from earlier rows",
    ),
    Mutant(
        STREAM,
        "rest = b, a, s.segments(columns), True",
        "rest = b, a, None, True",
        "gradients of keys cross documents",
    ),
    Mutant(
        STREAM,
        "later.absorb(gradient, phi_q, a)",
        "later.absorb(gradient, phi_q, None)",
        "late queries enter the gradient of keys without their exponents",
    ),
    Mutant(
        STREAM,
        "*rest, past, other_workspace)",
        "*rest, past, s.workspace)",
        "the gradient of v is written over that of k's features",
    ),
    Mutant(
        STREAM,
        "d_phi = later.read(s.values(columns), b)",
        "d_phi = later.read(s.values(columns), None)",
        "gradients of keys before the first query ignore exponents",
    ),
)

ROUNDING = (
    Mutant(
        STREAM,
        "exact = exact + s.by_key_head(lost, rows)",
        "exact = exact",
        "the gradient ignores what rounding took from the output",
    ),
    Mutant(
        STREAM,
        "(exact - s.by_key_head(out, rows))",
        "(s.by_key_head(out, rows) - exact)",
        "the sign of what rounding took",
    ),
)

COMPOSITION = (
    Mutant(
        COMPOSED,
        "while step < x.shape[2]:",
        "while step < x.shape[2] // 2:",
        "a running maximum that looks back over half of the sequence",
    ),
    Mutant(
        COMPOSED,
        "same = (segment[:, step:] == segment[:, :-step])[:, None]",
        "same = torch.ones_like(segment[:, step:], dtype=torch.bool)[:, None]",
        "running maxima cross documents",
    ),
    Mutant(
        COMPOSED,
        "        values = torch.where(valid[:, None, :, None], values, 0.0)\n",
        "",
        "keys that are not valid keep their features",
    ),
    Mutant(
        COMPOSED,
        "values / torch.where(nothing, 1.0, total)",
        "values / total",
        "the gradient of a row without weight is not a number",
    ),
    Mutant(
        COMPOSED,
        "k * torch.exp2(exponent - peak[..., None])[..., None]",
        "k * torch.exp2(exponent)[..., None]",
        "a state is not in units of its peak",
    ),
    Mutant(
        COMPOSED,
        "return _rescale(kv, peak, joint) + _rescale",
        "return kv + _rescale",
        "an earlier state is not rescaled before a later one is added",
    ),
    Mutant(
        COMPOSED,
        "joint = torch.maximum(peak, new_peak)",
        "joint = new_peak",
        "a state's unit is that of the last keys, in which earlier ones overflow",
    ),
    Mutant(COMPOSED, "torch.exp2(peak - joint)", "torch.exp2(joint - peak)", "rescaling goes the wrong way"),
    Mutant(
        COMPOSED,
        "running = torch.maximum(exponent.cummax(2).values, peak[..., None])",
        "running = exponent.cummax(2).values",
        "rows after a state forget its exponent",
    ),
    Mutant(
        COMPOSED,
        " * torch.exp2(peak[..., None] - running)[:, :, None, :, None]",
        "",
        "what is read of a state is not rescaled",
    ),
    Mutant(
        COMPOSED,
        "None, None, None, False) + read(q, kv)",
        "None, None, None, False)",
        "a scan without exponents forgets the state before it",
    ),
    Mutant(
        COMPOSED,
        "past = torch.where(position < q_offset, 1.0, 0.0)",
        "past = torch.where(position <= q_offset, 1.0, 0.0)",
        "the key beside the first query is counted twice",
    ),
    Mutant(
        COMPOSED,
        "inside = (beside >= 0) & (beside < num_keys)",
        "inside = beside >= 0",
        "queries after the last key see it again and again",
    ),
    Mutant(
        COMPOSED,
        "peak = -maximum_of_segment(exponent, segment)",
        "peak = -running_maximum(exponent, segment)",
        "non-causal documents are scaled by the keys so far, not by all",
    ),
    Mutant(
        COMPOSED,
        "next_k = torch.where(same[:, None, None, :, None], k.roll(-1, 3), 0.0)",
        "next_k = k.roll(-1, 3)",
        "the first key of the next document is seen from this one",
    ),
    Mutant(COMPOSED, "k.roll(-1, 3), 0.0)", "k, 0.0)", "a token's own key is counted from both sides"),
)

DOCUMENTS = (
    Mutant(LINEAR, "p.scale * p.q.shape[3] ** 0.5", "p.scale", "queries are scaled as for softmax"),
    Mutant(
        LINEAR,
        "inside & p.key_mask",
        "p.key_mask",
        "with a key_mask, tokens of no document are keys",
        survives="they are a segment of their own, and its rows are zeroed: nobody else sees them",
    ),
    Mutant(
        LINEAR,
        "valid = None if valid is None else valid.gather(1, packing.order)",
        "pass",
        "the key_mask is not sorted with the documents",
    ),
    Mutant(
        LINEAR,
        "p.v, p.key_mask, _query_scale(p), kv, peak)",
        "p.v, None, _query_scale(p), kv, peak)",
        "a step ignores its key_mask",
    ),
    Mutant(
        COMPOSED,
        "one = query.shape[3] == 1",
        "one = query.shape[3] <= 2",
        "of two new tokens, the first sees the second",
    ),
    Mutant(
        PACKING,
        "p.segment_ids.argsort(dim=1, stable=True)",
        "self.num_keys - 1 - p.segment_ids.flip(1).argsort(dim=1, stable=True)",
        "sorting turns the order within a document round",
    ),
    Mutant(PACKING, "positions - p.q_offset", "positions + p.q_offset", "queries move the wrong way"),
    Mutant(PACKING, "p.q_offset) >= 0", "p.q_offset) > 0", "the document 0 is padding"),
    Mutant(
        PACKING,
        "self._gather(x, self.order.argsort(dim=1))",
        "self._gather(x, self.order)",
        "outputs are sorted once more, not sorted back",
    ),
    Mutant(
        PACKING,
        "return torch.where(self.own[:, None, :, None], x, 0.0)",
        "return x",
        "queries of no document get outputs",
    ),
)

CHUNKS = "tests/ops/test_small_budgets.py::test_chunks"
STEPS = "tests/ops/test_small_budgets.py::test_steps"
FAR = "tests/ops/test_small_budgets.py::test_exponents_far_apart"
GRAPH = "tests/ops/test_small_budgets.py::test_gradients_with_a_graph"

FIRST = ("equals_its_matrix", "matrix_is_the_paper", "stepping_equals_forward", "error_is_within_budget")

SUBJECT = Subject(
    "linear operators",
    PLACES + STREAMED + COMPOSITION + DOCUMENTS,
    tests=(CHUNKS, STEPS, GRAPH, FAR),
    mechanisms=("linear", "performer"),
    first=(*FIRST, "gradients_do_not_depend_on_who_asks"),
)

IN_HALF = Subject(
    "rounding of linear operators",
    ROUNDING,
    mechanisms=("linear", "performer"),
    first=("cancels_nothing_far_from_zero", "error_is_within_budget"),
)
