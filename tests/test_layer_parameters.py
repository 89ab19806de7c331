"""What `Attention` does with its parameters, and what reaches their gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efficient_attn import (
    Attention,
    FullAttention,
    LinearAttention,
    LinformerAttention,
    SlidingWindowAttention,
)

EMBED, HEADS, BATCH, LENGTH = 24, 4, 2, 9


def projections(layer: Attention) -> list[nn.Linear]:
    return [layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj]


def test_no_projection_has_a_bias_that_was_not_asked_for() -> None:
    layer = Attention(EMBED, HEADS, FullAttention(), bias=False)
    assert all(projection.bias is None for projection in projections(layer))
    assert all(
        projection.bias is not None for projection in projections(Attention(EMBED, HEADS, FullAttention()))
    )


def test_reset_parameters_draws_the_mechanisms_too() -> None:
    layer = Attention(EMBED, HEADS, LinformerAttention(LENGTH, HEADS, rank=4))
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert name.endswith("bias") or not torch.equal(parameter, before[name]), name


def test_a_context_as_long_as_the_queries_is_still_the_context() -> None:
    layer = Attention(EMBED, HEADS, FullAttention())
    x, context = torch.randn(2, BATCH, LENGTH, EMBED)
    longer = torch.cat([context, torch.randn(BATCH, 1, EMBED)], 1)
    expected = layer(x, longer, key_mask=torch.arange(LENGTH + 1).expand(BATCH, -1) < LENGTH)
    torch.testing.assert_close(layer(x, context), expected, atol=1e-6, rtol=1e-5)


def gradients(layer: Attention, x: Tensor, keep: Tensor) -> list[Tensor]:
    state, total = layer.init_state(BATCH), torch.zeros(())
    for new in torch.arange(LENGTH).split(4):
        out, state = layer.step(x[:, new], state, key_mask=keep[:, new])
        total = total + out[keep[:, new]].square().sum()
    return list(torch.autograd.grad(total, list(layer.parameters())))


def test_padding_of_a_step_reaches_no_gradient() -> None:
    keep = torch.arange(LENGTH)[None] >= torch.tensor([[0], [3]])
    x = torch.randn(BATCH, LENGTH, EMBED)
    for mechanism in (SlidingWindowAttention(3, is_causal=True), LinearAttention(is_causal=True)):
        layer = Attention(EMBED, HEADS, mechanism)
        clean = gradients(layer, x, keep)
        poisoned = gradients(layer, x.masked_fill(~keep[..., None], torch.nan), keep)
        for a, b in zip(clean, poisoned, strict=True):
            torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)


def test_the_cost_reads_and_writes_every_projection_once() -> None:
    layer = Attention(EMBED, HEADS, FullAttention(), num_kv_heads=2)
    cost = layer.cost(BATCH, LENGTH, dtype=torch.float32)
    q_width, kv_width = EMBED, EMBED // 2
    heads = q_width + 2 * kv_width
    weights = sum(parameter.numel() for parameter in layer.parameters())
    # Tokens go into three projections, heads into the mechanism, merged heads into the last projection.
    assert cost.bytes_read == 4 * (BATCH * LENGTH * (3 * EMBED + heads + EMBED) + weights)
    assert cost.bytes_written == 4 * BATCH * LENGTH * (heads + EMBED + EMBED)
