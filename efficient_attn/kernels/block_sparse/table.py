"""Tables of blocks: which blocks of queries and keys a program walks, built in time linear in the blocks stored.

Positions count from a batch row's anchor, so one table serves rows whose anchors differ: a program finds its own
queries and keys from the position of its block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...masks import Mask

_ROWS_AT_ONCE = 1 << 16
_PAIRS_AT_ONCE = 1 << 24
_LEAST_LIMIT, _TIMES_MEAN = 32, 4
"""A row of blocks is cut among programs where it has more than the one, and more than so many times the average."""


@dataclass(frozen=True)
class Table:
    """What the programs of a kernel walk, on its device; int64 but for the patterns, because positions have no bound.

    items: (n, 6): block of the walking axis, full entries [start, stop), partial entries [start, stop), and the
        slot that takes the partial sums, or -1 if the program has the block for itself.
    blocks: block of the other axis, of each entry.
    pattern: of each entry that is partial, which of `patterns` says what is allowed.
    patterns: (m, block_q, block_k / 32), a bit for each pair.
    merges: (s, 3): block of the walking axis, its slots [start, stop).
    """

    items: Tensor
    blocks: Tensor
    pattern: Tensor
    patterns: Tensor
    merges: Tensor
    num_slots: int


@dataclass(frozen=True)
class Tables:
    """The blocks of row blocks [first, last) and the first `num_key_blocks`, to be walked by rows or by keys."""

    row: Tensor
    key: Tensor
    pattern: Tensor
    patterns: Tensor
    first: int
    last: int
    num_key_blocks: int

    @cached_property
    def by_row(self) -> Table:
        return _walk(self.row, self.key, self.pattern, self.patterns, self.first, self.last)

    @cached_property
    def by_key(self) -> Table:
        return _walk(self.key, self.row, self.pattern, self.patterns, 0, self.num_key_blocks)

    def __len__(self) -> int:
        return len(self.row)


def tables(
    mask: Mask, start: int, stop: int, num_keys: int, block_q: int, block_k: int, device: torch.device
) -> Tables:
    """The tables of `mask`, sized already, for query positions [start, stop) and keys [0, num_keys).

    Row blocks are aligned to multiples of `block_q`. There is an item for each block, also for one without entries.
    """
    found = _tables(mask, start // block_q, -(-stop // block_q), num_keys, block_q, block_k, device)
    if _is_captured(device):
        _CAPTURED[id(found)] = found
    return found


_CAPTURED: dict[int, Tables] = {}
"""What CUDA graphs walk: they read the memory whenever they are replayed, so that it is never given back."""


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refuse_to_build_while_captured(device: torch.device) -> None:
    if _is_captured(device):
        raise RuntimeError(
            "the table of blocks of this mask and these lengths cannot be built while a CUDA graph is captured: "
            "call once with the same lengths before"
        )


# Enough for the layers of a model whose masks all differ; one table is megabytes for a million tokens.
@lru_cache(maxsize=64)
def _tables(
    mask: Mask, first: int, last: int, num_keys: int, block_q: int, block_k: int, device: torch.device
) -> Tables:
    _refuse_to_build_while_captured(device)
    row, key, inside = _candidates(mask, first, last, num_keys, block_q, block_k, device)
    row, key, pattern, patterns = _classified(mask, row, key, inside, num_keys, block_q, block_k)
    return Tables(row, key, pattern, patterns, first, last, -(-num_keys // block_k))


def _candidates(
    mask: Mask, first: int, last: int, num_keys: int, block_q: int, block_k: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks (row, key) that may hold a pair, in order, and which of them are known to be full."""
    width = max(1, -(-num_keys // block_k))
    per_chunk = max(1, _ROWS_AT_ONCE // block_q)
    rows, keys, full = [], [], []
    for low in range(first, last, per_chunk):
        up = min(low + per_chunk, last)
        q = torch.arange(low * block_q, up * block_q, device=device)
        lower, upper = mask.row_spans(q, num_keys)
        lower, upper = lower.clamp(min=0), upper.clamp(max=num_keys)
        some = upper > lower
        # Each row's interval in blocks, once for every run of rows that agree in it.
        begin, end = lower // block_k, (upper + block_k - 1) // block_k
        spans = torch.stack([torch.where(some, begin, 0), torch.where(some, end, 0)], -1)
        spans = spans.unflatten(0, (-1, block_q))
        fresh = torch.ones(spans.shape[:3], dtype=torch.bool, device=device)
        fresh[:, 1:] = (spans[:, 1:] != spans[:, :-1]).any(-1)
        fresh &= spans[..., 1] > spans[..., 0]
        block, chosen = fresh.nonzero()[:, 0], spans[fresh]
        count = chosen[:, 1] - chosen[:, 0]
        owner = torch.repeat_interleave(block, count)
        within = torch.arange(len(owner), device=device) - torch.repeat_interleave(
            count.cumsum(0) - count, count
        )
        key = torch.repeat_interleave(chosen[:, 0], count) + within
        code = torch.unique(owner * width + key)
        owner, key = code // width, code % width
        inner_low = torch.where(some, lower, num_keys).unflatten(0, (-1, block_q)).amax(1)
        inner_up = torch.where(some, upper, 0).unflatten(0, (-1, block_q)).amin(1)
        starts = (key * block_k)[:, None]
        full.append(((inner_low[owner] <= starts) & (starts + block_k <= inner_up[owner])).any(1))
        rows.append(owner + low)
        keys.append(key)
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    return torch.cat([empty, *rows]), torch.cat([empty, *keys]), torch.cat([empty.bool(), *full])


def _classified(
    mask: Mask, row: Tensor, key: Tensor, full: Tensor, num_keys: int, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The blocks that hold a pair, the pattern of each, -1 where every pair is allowed, and the patterns in bits."""
    device, words = row.device, block_k // 32
    pattern = torch.full_like(row, -1)
    kept = torch.ones_like(full)
    undecided = (~full).nonzero().squeeze(1)
    bits = 1 << torch.arange(32, device=device)
    packed = []
    for part in undecided.split(max(1, _PAIRS_AT_ONCE // (block_q * block_k))):
        q = row[part, None] * block_q + torch.arange(block_q, device=device)
        k = key[part, None] * block_k + torch.arange(block_k, device=device)
        allowed = (mask.allows(q[:, :, None], k[:, None, :]) & (k < num_keys)[:, None, :]).flatten(1)
        some, every = allowed.any(1), allowed.all(1)
        kept[part] = some
        some &= ~every
        pattern[part] = torch.where(some, 0, -1)
        grouped = allowed[some].unflatten(1, (block_q, words, 32))
        packed.append(((grouped * bits).sum(-1) - (grouped[..., 31].long() << 32)).to(torch.int32))
    none = torch.zeros(0, block_q, words, dtype=torch.int32, device=device)
    patterns, which = torch.unique(torch.cat([none, *packed]), dim=0, return_inverse=True)
    pattern[pattern == 0] = which
    return row[kept], key[kept], pattern[kept], patterns


def _walk(block: Tensor, other: Tensor, pattern: Tensor, patterns: Tensor, first: int, last: int) -> Table:
    """Entries (block, other) in the order in which the programs of `block` take them."""
    _refuse_to_build_while_captured(block.device)
    partial = pattern >= 0
    span = int(other.max()) + 1 if len(other) else 1
    order = (((block - first) * 2 + partial) * span + other).argsort()
    block, other, pattern, partial = block[order], other[order], pattern[order], partial[order]
    counts = torch.bincount((block - first) * 2 + partial, minlength=2 * (last - first))
    ends = counts.cumsum(0)
    bounds = torch.stack([ends - counts, ends], 1).view(-1, 4).cpu()
    sizes = counts.view(-1, 2).sum(1)
    # A row of blocks that is alone has no others that work meanwhile.
    times = _TIMES_MEAN if last - first > 1 else 0
    limit = max(_LEAST_LIMIT, times * -(-len(block) // max(1, last - first)))
    long = (sizes > limit).nonzero().squeeze(1).tolist()
    numbers = torch.arange(first, last)[:, None]
    whole = torch.cat([numbers, bounds, torch.full_like(numbers, -1)], 1)
    cut, merges = [], []
    for index in long:
        slot = len(cut)
        full_start, full_stop, start, stop = bounds[index].tolist()
        for low in range(full_start, full_stop, limit):
            cut.append([first + index, low, min(low + limit, full_stop), 0, 0, len(cut)])
        for low in range(start, stop, limit):
            cut.append([first + index, 0, 0, low, min(low + limit, stop), len(cut)])
        merges.append([first + index, slot, len(cut)])
    whole = whole[(sizes <= limit).cpu()]
    # The long ones first, so that none is left over at the end.
    items = torch.cat([torch.tensor(cut, dtype=torch.int64).view(-1, 6), whole])
    device = block.device
    table = Table(
        items.to(device),
        _never_empty(other),
        _never_empty(pattern.clamp(min=0).int()),
        _never_empty(patterns.flatten()),
        torch.tensor(merges, dtype=torch.int64, device=device).view(-1, 3),
        len(cut),
    )
    if device.type == "cuda":
        # The next call may walk it on another stream.
        torch.cuda.current_stream(device).synchronize()
    return table


def _never_empty(x: Tensor) -> Tensor:
    """A kernel's argument must have an address, even if nothing is read there."""
    return x.contiguous() if len(x) else F.pad(x, (0, 1))
