"""Mutants of the decode states."""

from __future__ import annotations

from .mutant import Mutant, Subject

FILE = "state.py"


def mutant(before: str, after: str, why: str, survives: str = "") -> Mutant:
    return Mutant(FILE, before, after, why, survives)


ANY = (
    mutant(
        "sum(t.nbytes for t in self.tensors().values())",
        "sum(t.numel() for t in self.tensors().values())",
        "bytes are counted as numbers",
    ),
    mutant(
        "t.index_select(0, indices) for name, t",
        "t.index_select(0, indices) if t.dim() > 2 else t for name, t",
        "beam search moves keys and values but not their bookkeeping",
    ),
    mutant(
        "t.index_select(0, indices) for name, t",
        "t.index_select(0, indices.sort().values) for name, t",
        "beams are reordered in ascending order",
    ),
)

WINDOW = (
    mutant(
        "first = valid.to(torch.int64).argmax(1) + self.seen",
        "first = valid.to(torch.int64).argmax(1)",
        "the anchor is a position in the chunk, not in the sequence",
    ),
    mutant(
        "torch.where(self.anchor >= 0, self.anchor, torch.where(valid.any(1), first, -1))",
        "torch.where(valid.any(1), first, self.anchor)",
        "the anchor moves with every chunk",
    ),
    mutant(
        "torch.where(self.anchor >= 0, self.anchor, torch.where(valid.any(1), first, -1))",
        "torch.where(self.anchor >= 0, self.anchor, first)",
        "a chunk of padding is taken for the anchor",
    ),
    mutant(
        "torch.where(self.anchor >= 0, self.anchor, torch.where(valid.any(1), first, -1))",
        "torch.where(self.anchor > 0, self.anchor, torch.where(valid.any(1), first, -1))",
        "an anchor at position 0 is forgotten",
    ),
    mutant(
        "new = (position >= self.seen) & (position < self.seen + k.shape[2])",
        "new = position < self.seen + k.shape[2]",
        "sinks are overwritten by the first token of each chunk",
    ),
    mutant(
        "new = (position >= self.seen) & (position < self.seen + k.shape[2])",
        "new = position >= self.seen",
        "sinks to come are filled with the last token so far",
    ),
    mutant(
        'for name, source in (("sink_k", k), ("sink_v", v)):',
        'for name, source in (("sink_k", k), ("sink_v", k[..., : v.shape[3]])):',
        "sinks hold keys for values",
    ),
    mutant(
        "torch.where(new, valid.gather(1, index), self.sink_valid)",
        "new | self.sink_valid",
        "a hole at a sink's position is a sink",
    ),
    mutant("self.seen += k.shape[2]", "self.seen += 1", "a chunk moves the window by one"),
    mutant(
        "self.k = torch.cat([self.k, k], 2)[:, :, -slots:].contiguous()",
        "self.k = torch.cat([self.k, k], 2)[:, :, :slots].contiguous()",
        "the window keeps the oldest keys",
    ),
    mutant(
        "self.v = torch.cat([self.v, v], 2)[:, :, -slots:].contiguous()",
        "self.v = torch.cat([v, self.v], 2)[:, :, -slots:].contiguous()",
        "values are put before those that are there",
    ),
    mutant(
        "self.valid = torch.cat([self.valid, valid], 1)[:, -slots:].contiguous()",
        "self.valid = torch.cat([self.valid, torch.ones_like(valid)], 1)[:, -slots:].contiguous()",
        "the key_mask of a step is forgotten after it",
    ),
    mutant("        if slots:\n", "        if True:\n", "a window of one token keeps them all"),
)

SUBJECT = Subject(
    "state",
    ANY + WINDOW,
    mechanisms=("full", "sliding_window", "longformer", "linear", "performer"),
    first=("stepping_equals_forward", "state_size_is_declared", "state_can_be_moved_about"),
    others=("tests/test_errors.py", "tests/test_layers.py"),
)
