"""Random choices as a pure function of a seed: the same on every device, rank, reload and recomputation."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


def _signed(x: int) -> int:
    """A Python integer wrapped to 64 bits, as tensor arithmetic wraps."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014, figure 16) in wrapping int64 arithmetic."""
    x = (x ^ _logical_shift(x, 30)) * -4658895280553007687
    x = (x ^ _logical_shift(x, 27)) * -7723592293110705685
    return x ^ _logical_shift(x, 31)


def random_blocks(blocks: Tensor, *, count: int, seed: int, num_choices: Tensor | int) -> Tensor:
    """For each entry of `blocks`, `count` distinct integers drawn uniformly from [0, num_choices).

    A pure function of (seed, block, num_choices, draw): no generator, no global state, no table.

    Args:
        blocks: integers (...), the row blocks that draw.
        count: how many draws for each.
        seed: selects the pattern.
        num_choices: size of the range, one for all or one for each block.
    Returns:
        (..., count) int64, each row ascending; where fewer than `count` integers exist, the rest are -1.
    """
    blocks = blocks.to(torch.int64)
    choices = torch.as_tensor(num_choices, dtype=torch.int64, device=blocks.device).expand(blocks.shape)
    key = _mix(blocks * 0x2545F4914F6CDD1D + _signed(seed))
    drawn: list[Tensor] = []
    for draw in range(count):
        left = choices - draw
        value = _logical_shift(_mix(key + _signed((draw + 1) * _GOLDEN)), 2) % left.clamp(min=1)
        # Drawing from the `left` integers not yet taken: step over the taken ones in ascending order.
        for taken in drawn:
            value = value + ((taken >= 0) & (value >= taken))
        value = torch.where(left > 0, value, -1)
        drawn = _insert(drawn, value)
    return torch.stack(drawn, -1) if drawn else blocks.new_empty((*blocks.shape, 0))


def _insert(ascending: list[Tensor], value: Tensor) -> list[Tensor]:
    """Insertion into sorted rows, elementwise; -1 (nothing drawn) goes last because it is drawn last."""
    result = []
    for existing in ascending:
        smaller = (value >= 0) & (value < existing)
        result.append(torch.where(smaller, value, existing))
        value = torch.where(smaller, existing, value)
    return [*result, value]
