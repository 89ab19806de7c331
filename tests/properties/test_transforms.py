"""torch.func: vmap and gradients by transforms are those of loops and of autograd, or are refused in words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from efficient_attn import MECHANISMS, Attention, Mechanism, SlidingWindowAttention
from efficient_attn.testing.laws.law import expect_close
from efficient_attn.testing.sampling import HEAD_DIM, HEADS, LENGTH, holes, in_dtype, sample

STACK, SHORT = 3, 9
EXAMPLES: dict[str, Mechanism] = {
    f"{name}{number}": in_dtype(example, torch.float64)
    for name, cls in MECHANISMS.items()
    for number, example in enumerate(cls.examples(LENGTH, HEADS, HEAD_DIM))
}
every_example = pytest.mark.parametrize("mechanism", EXAMPLES.values(), ids=EXAMPLES)


def stacked(mechanism: Mechanism, length: int = SHORT) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with a dimension of STACK in front."""
    samples = [sample(mechanism, length, seed=seed) for seed in range(STACK)]
    q, k, v = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return q, k, v


def loss(mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (mechanism(q, k, v) * (1 + torch.arange(v.shape[-1]))).square().sum()


def gradients(mechanism: Mechanism, *inputs: Tensor) -> tuple[Tensor, ...]:
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    return torch.autograd.grad(loss(mechanism, *inputs), inputs)


@every_example
def test_vmap_is_a_loop(mechanism, record_property):
    q, k, v = stacked(mechanism)
    masks = torch.stack([holes(SHORT, seed) for seed in range(STACK)])
    plain = vmap(mechanism)(q, k, v)
    masked = vmap(lambda a, b, c, mask: mechanism(a, b, c, key_mask=mask))(q, k, v, masks)
    keys = vmap(lambda b: mechanism(q[0], b, v[0]), in_dims=-1, out_dims=1)(k.movedim(0, -1))
    twice = vmap(vmap(mechanism, (0, None, None)), (None, 0, 0))(q, k, v)
    for i in range(STACK):
        expect_close(plain[i], mechanism(q[i], k[i], v[i]), f"number {i}")
        expect_close(masked[i], mechanism(q[i], k[i], v[i], key_mask=masks[i]), f"number {i}, key_mask")
        expect_close(keys[:, i], mechanism(q[0], k[i], v[0]), f"number {i}, keys alone")
        for j in range(STACK):
            expect_close(twice[i, j], mechanism(q[j], k[i], v[i]), f"vmap of vmap, {i}, {j}")
    record_property("cases", STACK * (3 + STACK))


@every_example
def test_transforms_give_the_gradients_of_autograd(mechanism, record_property):
    q, k, v = stacked(mechanism)
    expected = [gradients(mechanism, q[i], k[i], v[i]) for i in range(STACK)]
    function = grad(lambda a, b, c: loss(mechanism, a, b, c), (0, 1, 2))
    one, many = function(q[0], k[0], v[0]), vmap(function)(q, k, v)
    out, pull = vjp(lambda a, b, c: loss(mechanism, a, b, c), q[0], k[0], v[0])
    outside = q.clone().requires_grad_()
    vmap(lambda a, b, c: loss(mechanism, a, b, c))(outside, k, v).sum().backward()
    for position, name in enumerate("qkv"):
        expect_close(one[position], expected[0][position], f"grad, {name}")
        expect_close(pull(torch.ones_like(out))[position], expected[0][position], f"vjp, {name}")
        for i in range(STACK):
            expect_close(many[position][i], expected[i][position], f"vmap of grad, {name}, number {i}")
    for i in range(STACK):
        expect_close(outside.grad[i], expected[i][0], f"autograd of vmap, number {i}")
    record_property("cases", 3 * (2 + STACK) + STACK)


@every_example
def test_jacrev_is_the_matrix_where_the_values_are_the_variable(mechanism):
    """A mechanism is linear in v, so its Jacobian there is its matrix."""
    q, k, v = (x[:1] for x in sample(mechanism, SHORT, v_head_dim=1))
    jacobian = jacrev(lambda c: mechanism(q, k, c))(v)[0, :, :, 0, 0, :, :, 0]
    group = q.shape[1] // k.shape[1]
    by_head = torch.stack([jacobian[h, :, h // group] for h in range(q.shape[1])])
    expect_close(by_head, mechanism.matrix(q, k)[0], "the Jacobian")


@every_example
def test_second_and_forward_derivatives_are_right_or_refused(mechanism, record_property):
    q, k, v = sample(mechanism, SHORT, batch=1)

    def first(a: Tensor) -> Tensor:
        return grad(lambda x: loss(mechanism, x, k, v))(a).sum()

    x = q.clone().requires_grad_()
    try:
        (by_autograd,) = torch.autograd.grad(loss(mechanism, x, k, v), x, create_graph=True)
        (expected,) = torch.autograd.grad(by_autograd.sum(), x)
    except NotImplementedError:
        with pytest.raises(NotImplementedError, match="second derivative"):
            grad(first)(q)
    else:
        expect_close(grad(first)(q), expected, "grad of grad")
    try:
        tangent = jvp(lambda c: mechanism(q, k, c), (v,), (v,))[1]
    except NotImplementedError:
        pass
    else:
        expect_close(tangent, mechanism(q, k, v), "the tangent, which is linear in v")
    record_property("cases", 2)


def test_gradients_of_parameters_by_example():
    """What differential privacy and influence functions ask of a layer: vmap(grad) over its parameters."""
    layer = Attention(16, 2, SlidingWindowAttention(4, is_causal=True)).double()
    parameters = {name: x.detach() for name, x in layer.named_parameters()}
    tokens = torch.randn(STACK, LENGTH, 16, dtype=torch.float64)

    def of_one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, weights, (x[None],)).square().mean()

    many = vmap(grad(of_one), (None, 0))(parameters, tokens)
    for i in range(STACK):
        layer.zero_grad()
        layer(tokens[i : i + 1]).square().mean().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(many[name][i], parameter.grad)


def test_what_cannot_be_mapped_is_refused_by_name():
    mechanism = SlidingWindowAttention(4, is_causal=True)
    q, k, v = sample(mechanism, SHORT)
    with pytest.raises(NotImplementedError, match="vmap over q_offset"):
        vmap(lambda offset: mechanism(q, k, v, q_offset=offset))(torch.arange(3))
