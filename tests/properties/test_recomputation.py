"""Activation checkpointing of a layer: the same bits, with dropout, under autocast, with either implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from efficient_attn import MECHANISMS, Attention, Mechanism
from efficient_attn.testing.sampling import HEAD_DIM, HEADS, LENGTH

WIDTH = HEADS * HEAD_DIM
EXAMPLES: dict[str, Mechanism] = {
    f"{name}{number}": example
    for name, cls in MECHANISMS.items()
    for number, example in enumerate(cls.examples(LENGTH, HEADS, HEAD_DIM))
}
WAYS: list[Callable] = [partial(checkpoint, use_reentrant=reentrant) for reentrant in (False, True)]


def gradients(layer: Attention, x: Tensor, run: Callable, autocast: bool) -> list[Tensor]:
    """Of the input and of each parameter, from one global seed, after something else was drawn from it."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(1)
    torch.rand(7)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = run(layer, x).float().square().mean()
    loss.backward()
    return [leaf.grad for leaf in (x, *layer.parameters()) if leaf.grad is not None]


@pytest.mark.parametrize("mechanism", EXAMPLES.values(), ids=EXAMPLES)
def test_recomputed_gradients_are_the_same_bits(mechanism, record_property):
    if mechanism.dropout_p is not None:
        mechanism.dropout_p = 0.3
    layer = Attention(WIDTH, HEADS, mechanism).train()
    x = torch.randn(2, LENGTH, WIDTH)
    cases = 0
    for autocast in (False, True):
        plain = gradients(layer, x, lambda module, y: module(y), autocast)
        for way in WAYS:
            for a, b in zip(gradients(layer, x, way, autocast), plain, strict=True):
                assert torch.equal(a, b), f"{way.keywords}, autocast={autocast}"
            cases += 1
    record_property("cases", cases)
