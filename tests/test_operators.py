"""The custom operators by themselves: torch's own checks of schema, fake implementation and autograd."""

from __future__ import annotations

import pytest
import torch

from efficient_attn.masks import Causal, Mask, RandomBlocks, Sinks, Strided, Window

OPERATORS = torch.ops.efficient_attn
MASKS: dict[str, Mask] = {
    "window": Window(5) & Causal(),
    "sinks": (Window(3) | Sinks(2)) & Causal(),
    "strided": Strided(4),
    "random": RandomBlocks(4, 2, 0, False) | Window(2),
}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("masked", [False, True])
def test_blocked_attention(mask: Mask, masked: bool):
    q, k, v = normal(2, 4, 19, 8), normal(2, 2, 19, 8), normal(2, 2, 19, 5)
    segments = torch.where(torch.rand(2, 19) > 0.2, 0, -1) if masked else None
    queries = torch.zeros(2, 19, dtype=torch.int64) if masked and not mask.anchored else None
    arguments = (q, k, v, queries, segments, torch.tensor(0), None, mask.spec(), 0.3, 0.0)
    torch.library.opcheck(OPERATORS.blocked_forward.default, arguments)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["plain", "scaled", "segments"])
def test_linear_scan(kind: str, reverse: bool):
    length = 130
    q, k, v = normal(2, 2, 3, length, 4), normal(2, 2, 1, length, 4), normal(2, 2, 1, length, 5)
    exponent = torch.arange(length).expand(2, 2, -1) // 9 * 1.0 if kind == "scaled" else None
    segment = (torch.arange(length) // 31).expand(2, -1).contiguous() if kind == "segments" else None
    row = None if exponent is None else (-exponent if not reverse else -exponent.flip(2))
    key = exponent if not reverse or exponent is None else exponent.flip(2)
    torch.library.opcheck(OPERATORS.linear_scan.default, (q, k, v, row, key, segment, reverse))
