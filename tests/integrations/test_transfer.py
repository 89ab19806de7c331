"""`transfer_attention`: what it trains, towards what, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficient_attn import (
    Attention,
    FlashAttention,
    FullAttention,
    LinearAttention,
    LinformerAttention,
    Mechanism,
    MultiheadAttention,
    SlidingWindowAttention,
    transfer_attention,
)

B, H, N, E = 3, 2, 12, 4


class Block(nn.Module):
    """An attention layer and a residual, as in any model."""

    def __init__(self, mechanism: Mechanism) -> None:
        super().__init__()
        self.attention = Attention(H * E, H, mechanism)
        self.mlp = nn.Linear(H * E, H * E)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(x, key_mask=key_mask)
        return x + self.mlp(x).relu()


def stack(*mechanisms: Mechanism) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*map(Block, mechanisms))
    for block in model:
        for projection in (block.attention.q_proj, block.attention.k_proj):
            nn.init.normal_(projection.weight, std=0.5)
    return model


def batches(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, N, H * E, generator=generator) for _ in range(count)]


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@torch.no_grad()
def errors_by_hand(student: nn.Sequential, teacher: nn.Sequential, x: Tensor) -> list[float]:
    """Each layer's error on the tokens of the teacher, from the weights written out in fp64."""

    def heads(projection: nn.Linear, tokens: Tensor) -> Tensor:
        y = tokens.double() @ projection.weight.double().T + projection.bias.double()
        return y.view(B, N, H, E).transpose(1, 2)

    found = []
    for new, old in zip(student, teacher, strict=True):
        a, b = new.attention, old.attention
        q, k, v = (heads(p, x) for p in (b.q_proj, b.k_proj, b.v_proj))
        exact = torch.softmax(q @ k.transpose(2, 3) / E**0.5, -1) @ v
        q, k, v = (heads(p, x) for p in (a.q_proj, a.k_proj, a.v_proj))
        out = a.mechanism.double().matrix(q, k) @ v
        a.mechanism.float()
        found.append(float((out - exact).norm() / exact.norm()))
        x = x + b.out_proj(exact.transpose(1, 2).reshape(B, N, H * E).to(x.dtype))
        x = x + old.mlp(x).relu()
    return found


def test_the_errors_are_those_of_each_layer_on_the_tokens_of_the_exact_model() -> None:
    model = stack(LinearAttention(), SlidingWindowAttention(3), LinearAttention())
    teacher = copy.deepcopy(model)
    first, second = batches()
    report = transfer_attention(model, [first, second], steps=60, lr=1e-2, projections=True)
    assert list(report.before.values()) == pytest.approx(errors_by_hand(teacher, teacher, first), rel=1e-4)
    assert list(report.after.values()) == pytest.approx(errors_by_hand(model, teacher, first), rel=1e-4)
    for name, before in report.before.items():
        assert report.after[name] < 0.8 * before, name
    held_out = torch.randn(B, N, H * E, generator=torch.Generator().manual_seed(9))
    pairs = zip(
        errors_by_hand(model, teacher, held_out), errors_by_hand(teacher, teacher, held_out), strict=True
    )
    assert all(after < before for after, before in pairs)


def test_steps_are_those_of_adam_on_the_relative_square_with_a_falling_rate() -> None:
    model = stack(LinearAttention())
    by_hand = copy.deepcopy(model[0].attention)
    (x,) = batches(1)
    transfer_attention(model, [x], steps=4, lr=1e-2, projections=True)

    def heads(projection: nn.Linear) -> Tensor:
        return projection(x).view(B, N, H, E).transpose(1, 2)

    def qkv() -> list[Tensor]:
        return [heads(p) for p in (by_hand.q_proj, by_hand.k_proj, by_hand.v_proj)]

    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
    target = nn.functional.scaled_dot_product_attention(*qkv()).detach()
    for rate in (1e-2, 0.75e-2, 0.5e-2, 0.25e-2):
        q, k, v = qkv()
        weights = (nn.functional.elu(q) + 1) @ (nn.functional.elu(k) + 1).transpose(2, 3)
        error = weights @ v / weights.sum(-1, keepdim=True) - target
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (error.square().sum() / target.square().sum()).backward()
        optimizer.step()
    for name, expected in by_hand.named_parameters():
        torch.testing.assert_close(model[0].attention.get_parameter(name), expected, rtol=1e-4, atol=2e-5)


def test_only_the_mechanisms_parameters_learn_unless_told_otherwise() -> None:
    model = stack(LinformerAttention(N, H, rank=4), SlidingWindowAttention(3))
    before = states(model)
    report = transfer_attention(model, batches(), steps=20, lr=1e-2)
    own = {f"0.attention.mechanism.{name}_projection" for name in ("key", "value")}
    assert set(report.trained) == changed(model, before) == own
    assert report.after["0.attention.mechanism"] < report.before["0.attention.mechanism"]
    assert report.after["1.attention.mechanism"] == report.before["1.attention.mechanism"]


def test_with_projections_what_stands_before_the_mechanism_learns_and_nothing_else() -> None:
    model = stack(LinearAttention())
    before = states(model)
    report = transfer_attention(model, batches(), steps=2, projections=True)
    names = {f"0.attention.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")}
    assert set(report.trained) == names
    assert changed(model, before) == names


@pytest.mark.parametrize("exact", [FullAttention(), FlashAttention(), SlidingWindowAttention(N)])
def test_a_layer_that_is_exact_already_is_left_alone(exact: Mechanism) -> None:
    model = stack(exact, LinearAttention())
    before = states(model)
    report = transfer_attention(model, batches(), steps=3, projections=True)
    assert all(name.startswith("1.attention.") for name in changed(model, before))
    assert all(name.startswith("1.attention.") for name in report.trained)
    assert report.after["0.attention.mechanism"] < 1e-5


def test_frozen_parameters_stay_frozen_and_all_is_restored() -> None:
    model = stack(LinearAttention(), SlidingWindowAttention(2))
    model.train()
    model[1].eval()
    model[0].attention.v_proj.requires_grad_(False)
    model(batches()[0]).sum().backward()
    before = states(model)
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    report = transfer_attention(model, batches(), steps=2, projections=True)
    assert not any("0.attention.v_proj" in name for name in report.trained)
    assert not any("0.attention.v_proj" in name for name in changed(model, before))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for parameter, (required, gradient) in zip(model.parameters(), flags, strict=True):
        assert parameter.requires_grad == required
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            assert torch.equal(parameter.grad, gradient)


def test_the_same_call_gives_the_same_weights_whatever_was_drawn_before() -> None:
    def run() -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = stack(LinformerAttention(N, H, rank=4, dropout_p=0.5))
        torch.rand(next(draws))
        transfer_attention(model, batches(), steps=3, projections=True)
        return states(model)

    draws = iter((1, 7))
    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_padding_teaches_nothing() -> None:
    (x,) = batches(1)
    key_mask = torch.ones(B, N, dtype=torch.bool)
    key_mask[0, 8:] = False
    results = []
    for fill in (0.0, 1e3, torch.nan):
        model = stack(LinearAttention())[0]
        padded = torch.where(key_mask[..., None], x, fill)
        report = transfer_attention(model, [(padded, key_mask)], steps=3, projections=True)
        results.append((dict(report.after), states(model)))
    for errors, weights in results[1:]:
        assert errors == results[0][0]
        assert all(torch.equal(weights[name], results[0][1][name]) for name in weights)


def test_batches_may_be_tensors_tuples_or_mappings_and_are_gone_through_again() -> None:
    (x,) = batches(1)
    results = []
    for batch in (x, (x,), {"x": x}):
        model = Block(LinearAttention())
        model.load_state_dict(stack(LinearAttention())[0].state_dict())
        transfer_attention(model, [batch], steps=3, projections=True)
        results.append(states(model))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)
    with pytest.raises(ValueError, match="must hold 3 batches"):
        transfer_attention(stack(LinearAttention()), iter([x]), steps=3, projections=True)


def test_it_learns_within_autocast() -> None:
    model = stack(LinearAttention())
    with torch.autocast("cpu", torch.bfloat16):
        report = transfer_attention(model, batches(), steps=60, lr=1e-2, projections=True)
    (before,), (after,) = report.before.values(), report.after.values()
    assert after < 0.8 * before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_torchs_attention_inside_an_encoder_learns_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(H * E, H, 16, batch_first=True)
    layer.self_attn = MultiheadAttention(  # type: ignore[assignment]
        H * E, H, batch_first=True, mechanism=LinearAttention()
    )
    nn.init.normal_(layer.self_attn.in_proj_weight, std=0.5)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    report = transfer_attention(model, batches(), steps=20, lr=1e-2, projections=True)
    assert set(report.before) == {f"layers.{i}.self_attn.mechanism" for i in range(2)}
    assert all(report.after[name] < report.before[name] for name in report.before)
    assert {name.rpartition(".")[2] for name in report.trained} == {"in_proj_weight", "in_proj_bias"}
    lines = str(report).splitlines()
    assert lines[1].split() == [
        "layers.0.self_attn.mechanism",
        f"{report.before['layers.0.self_attn.mechanism']:.3f}",
        f"{report.after['layers.0.self_attn.mechanism']:.3f}",
    ]
    assert lines[-1].endswith("and 1 more")


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mechanism = LinearAttention()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None] * self.scale
        return self.mechanism(q, q, self.mechanism(q, q, q))[:, 0]


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing to train": (lambda: stack(LinearAttention()), {}, "nothing to train: LinearAttention"),
    "all exact": (lambda: stack(FullAttention()), {"projections": True}, "the outputs are exact"),
    "frozen": (
        lambda: stack(LinearAttention()).requires_grad_(False),
        {"projections": True},
        "require no gradients",
    ),
    "no mechanism": (lambda: nn.Linear(H * E, 2), {}, "Linear holds none"),
    "a mechanism": (lambda: LinearAttention(), {}, "is a mechanism itself"),
    "no steps": (lambda: stack(LinearAttention()), {"steps": 0}, "steps"),
    "called twice": (
        lambda: nn.Sequential(Twice()),
        {"projections": True},
        "must call its LinearAttention once",
    ),
}


@pytest.mark.parametrize(("make", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transfer_attention(make(), batches(), **{"steps": 1, **options})
