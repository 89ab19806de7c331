"""How many pairs the kernels multiply, allowed or not: those of all blocks that they walk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...masks import Mask
from ..configs import Config, size_class
from .configs import CONFIGS
from .parts import FEW_QUERIES, MANY_KEYS, Band, Blocks, Part, parts_of, walk_of
from .table import tables


@dataclass(frozen=True)
class Pairs:
    """Pairs of one head that each kernel multiplies."""

    forward: int
    dq: int
    dkdv: int


@lru_cache(maxsize=64)
def multiplied_pairs(
    mask: Mask, q_len: int, num_keys: int, q_offset: int, itemsize: int, head_dim: int, architecture: int = 90
) -> Pairs:
    """The pairs of `mask` as the configs of an architecture cut it, keys unmasked; Hopper's if none is named."""
    key = architecture, 2 if itemsize == 2 else 4, size_class(min(head_dim, 256))

    def total(kernel: str, by_key: bool) -> int:
        pairs = 0
        for part in parts_of(mask, by_key, q_len <= FEW_QUERIES and num_keys >= MANY_KEYS):
            config = CONFIGS[f"{walk_of(part)}_{kernel}"][key]
            pairs += _pairs(part, config, q_len, num_keys, q_offset, by_key)
        return pairs

    if q_len == 0 or num_keys == 0:
        return Pairs(0, 0, 0)
    return Pairs(total("forward", False), total("dq", False), total("dkdv", True))


def _pairs(part: Part, config: Config, q_len: int, num_keys: int, offset: int, by_key: bool) -> int:
    block_q, block_k = config["BLOCK_Q"], config["BLOCK_K"]
    if isinstance(part, Blocks):
        number = num_keys if part.summaries is None else part.summaries.num_keys(num_keys)
        mask, cpu = part.mask.sized(num_keys), torch.device("cpu")
        found = tables(mask, offset, offset + q_len, number, block_q, block_k, cpu)
        return len(found) * block_q * block_k
    blocks = 0
    for residue in range(min(part.step, num_keys)):
        first = (residue - offset) % part.step
        rows = max(0, -(-(q_len - first) // part.step))
        keys = max(0, -(-(num_keys - residue) // part.step))
        start = (first + offset - residue) // part.step
        if by_key:
            low, up = _seen(-start, keys, block_k, part.ahead, part.back, rows, block_q)
        else:
            low, up = _seen(start, rows, block_q, part.back, part.ahead, keys, block_k)
        blocks += int((up - low).sum())
        if part.sinks and not by_key:
            blocks += _sink_blocks(part, start, rows, keys, block_q, block_k, low, up)
    return blocks * block_q * block_k


def _seen(
    start: int, count: int, block: int, before: int, after: int, others: int, other_block: int
) -> tuple[Tensor, Tensor]:
    """The blocks [low, up) of the other axis that each block of `count` positions from `start` on walks."""
    number = torch.arange(0, count, block)
    first, last = start + number, start + (number + block).clamp(max=count) - 1
    low = (first - before).clamp(min=0) // other_block
    up = ((last + after + 1).clamp(max=others).clamp(min=0) + other_block - 1) // other_block
    return low, torch.maximum(up, low)


def _sink_blocks(
    band: Band, start: int, rows: int, keys: int, block_q: int, block_k: int, low: Tensor, up: Tensor
) -> int:
    """Blocks of sinks outside those of the window."""
    last = start + (torch.arange(0, rows, block_q) + block_q).clamp(max=rows) - 1
    stop = (last + band.sinks_ahead + 1).clamp(max=min(band.sinks, keys)).clamp(min=0)
    sinks = (stop + block_k - 1) // block_k
    return int((torch.minimum(sinks, low) + (sinks - up).clamp(min=0)).sum())
