"""Mutants of the causal scan: its carry, its chunks, its exponents, its segments and its gradients."""

from __future__ import annotations

from .mutant import Mutant, Subject

FILE = "ops/scan.py"


def mutant(before: str, after: str, why: str, survives: str = "") -> Mutant:
    return Mutant(FILE, before, after, why, survives)


CARRY = (
    mutant(
        "if segment is not None and self.segment is not None:\n            same =",
        "if False:\n            same =",
        "the carry is not reset where a segment begins",
    ),
    mutant(
        "before = self.exponent if same is None else torch.where(same, self.exponent, -torch.inf)",
        "before = self.exponent",
        "with exponents, the carry is not reset where a segment begins",
    ),
    mutant(
        "joint = torch.maximum(before, exponent)",
        "joint = exponent",
        "the carry's unit is that of the last keys, in which earlier ones overflow",
    ),
    mutant(
        "            exponent = joint\n",
        "            exponent = joint + 1\n",
        "the carry's exponent is too large by one",
    ),
    mutant("self.kv = kv.clone()", "self.kv = kv", "the carry is a buffer that the next block overwrites"),
    mutant(
        "k = k * torch.exp2(b - peak[..., None])[:, :, None, :, None]",
        "k = k * torch.exp2(b)[:, :, None, :, None]",
        "keys that are absorbed are not in units of their peak",
    ),
    mutant(
        "_row_weights(a + self.exponent[..., None])",
        "_row_weights(a)",
        "rows that read the carry forget its exponent",
    ),
)

CHUNKS = (
    mutant(
        "([slice(whole, length)] if whole < length else [])",
        "([slice(whole, length)] if whole < length - 1 else [])",
        "a last row by itself is left out",
    ),
    mutant(
        "yield from reversed(parts) if reverse else parts",
        "yield from parts",
        "a reverse scan takes its blocks from the first to the last",
    ),
    mutant("states[:, :, c].zero_()", "pass", "before the first chunk the state is what memory holds"),
    mutant(
        "for c in reversed(chunks) if reverse else chunks:",
        "for c in chunks:",
        "a reverse scan takes its chunks from the first to the last",
    ),
    mutant(
        "torch.stack(weights[::-1] if reverse else weights, 2)",
        "torch.stack(weights, 2)",
        "in reverse, each chunk takes the weights of its mirror image",
    ),
    mutant(
        "scaled = qc if weights is None else _times(qc, weights, groups)",
        "scaled = qc",
        "rows take all of the carry, whatever their exponents and segments",
    ),
    mutant(
        "y += read.mul_(weights[:, :, :, None, :, None]).view(y.shape)",
        "y += read.view(y.shape)",
        "where values are narrow, rows take all of the carry",
    ),
    mutant('qc, states, "read")', 'qc, states, "rows")', "what is read is written over the chunk's own sums"),
    mutant(
        'states = workspace.take("states", *sums.shape, dtype=sums.dtype)\n    weights',
        'states = workspace.take("sums", *sums.shape, dtype=sums.dtype)\n    weights',
        "the states are written over the sums they come from",
    ),
)

INSIDE = (
    mutant(
        "row, column = (b, a) if turned else (a, b)",
        "row, column = a, b",
        "a and b change places where k has several copies",
    ),
    mutant(
        "squares.triu_ if reverse != turned else squares.tril_",
        "squares.triu_ if reverse else squares.tril_",
        "the triangle is not turned with the matrix",
    ),
    mutant(
        "squares.triu_ if reverse != turned else squares.tril_",
        "squares.tril_ if reverse != turned else squares.triu_",
        "tril and triu change places",
    ),
    mutant(
        "(segment[..., :, None] != segment[..., None, :])",
        "(segment[..., :, None] < segment[..., None, :])",
        "inside a chunk rows see the segments before their own",
    ),
    mutant(
        "return x[..., 0] if reverse else x[..., -1]",
        "return x[..., -1]",
        "a reverse scan leaves a chunk at its end",
    ),
    mutant(
        "    if b is None:\n        return keep, None",
        "    if b is None:\n        return None, None",
        "segments that ended in a chunk are carried on",
    ),
    mutant(
        "        b = torch.where(keep, b, -torch.inf)\n",
        "        pass\n",
        "with exponents, segments that ended in a chunk are carried on",
    ),
    mutant(
        "return torch.exp2(b - peak[..., None]), peak",
        "return torch.exp2(b), peak",
        "a chunk's state is not in units of its peak",
    ),
    mutant(
        "        vc = _times(vc, taken, copies)\n",
        "        pass\n",
        "where values are the narrower side, a chunk's state takes all of its keys in full",
    ),
    mutant(
        "now = None if segment is None else _last(segment[:, c], reverse)",
        "now = None if segment is None else segment[:, c, -1]",
        "in reverse, the carry is said to be of the segment at the chunk's end",
    ),
    mutant(
        "torch.exp2((a[:, :, chunk] + carry.exponent[..., None]).clamp(max=0))",
        "torch.exp2(a[:, :, chunk].clamp(max=0))",
        "how much a row takes of the carry ignores the carry's exponent",
    ),
    mutant(
        "    if segment is not None and carry.segment is not None:\n        weights",
        "    if False:\n        weights",
        "rows take the carry of another segment",
    ),
)

GRADIENTS = (
    mutant(
        "scan(v, grad, q, b, a, segment, not ctx.reverse)",
        "scan(v, grad, q, a, b, segment, not ctx.reverse)",
        "a and b are not swapped in the gradient of k",
    ),
    mutant(
        "scan(k, q, grad, b, a, segment, not ctx.reverse)",
        "scan(k, q, grad, b, a, segment, ctx.reverse)",
        "the gradient of v comes from earlier rows",
    ),
    mutant(
        "scan(grad, v, k, a, b, segment, ctx.reverse)",
        "scan(grad, v, k, a, b, None, ctx.reverse)",
        "the gradient of q crosses segments",
    ),
)

SUBJECT = Subject(
    "scan",
    CARRY + CHUNKS + INSIDE + GRADIENTS,
    tests=(
        "tests/ops/test_small_budgets.py::test_scan_is_its_definition",
        "tests/ops/test_small_budgets.py::test_chunks",
        "tests/ops/test_small_budgets.py::test_exponents_far_apart",
    ),
    mechanisms=("linear", "performer"),
    first=("equals_its_matrix", "packed_equals_separate", "stays_finite"),
)
