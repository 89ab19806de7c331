"""Decode states by themselves: branches, gradients, masks that come late, and what a pickle takes along."""

from __future__ import annotations

import pickle

import pytest
import torch

from efficient_attn import FullAttention, LinearAttention, SlidingWindowAttention
from efficient_attn.mechanisms import Mechanism
from efficient_attn.state import State
from efficient_attn.testing.laws.law import expect_close
from efficient_attn.testing.sampling import sample

LENGTH = 12
CAUSAL: dict[str, Mechanism] = {
    "full": FullAttention(is_causal=True, backend="reference"),
    "window": SlidingWindowAttention(4, num_sinks=2, is_causal=True, scale=0.9),
    "linear": LinearAttention(feature_map="exp", is_causal=True),
}
each = pytest.mark.parametrize("m", CAUSAL.values(), ids=CAUSAL)


def begin(m: Mechanism, k: torch.Tensor, v: torch.Tensor) -> State:
    return m.init_state(len(k), k.shape[1], k.shape[3], v_head_dim=v.shape[3], dtype=k.dtype)


def advance(m: Mechanism, inputs, state: State, start: int, stop: int, key_mask=None):
    return m.step(*(x[:, :, start:stop] for x in inputs), state, key_mask=key_mask)


def test_branches_of_one_state_keep_their_own_tokens():
    """Two states that go on from one, in turn, each token by token: neither writes where the other reads."""
    m, left, right = (
        CAUSAL["full"],
        sample(CAUSAL["full"], LENGTH),
        list(sample(CAUSAL["full"], LENGTH, seed=1)),
    )
    right = tuple(torch.cat([a[:, :, :5], b[:, :, 5:]], 2) for a, b in zip(left, right, strict=True))
    _, trunk = advance(m, left, begin(m, *left[1:]), 0, 5)
    branches = {"left": (left, trunk), "right": (right, trunk)}
    whole = {"left": m(*left), "right": m(*right)}
    for i in range(5, LENGTH):
        for name, (inputs, state) in branches.items():
            out, after = advance(m, inputs, state, i, i + 1)
            expect_close(out, whole[name][:, :, i : i + 1], f"token {i} of the {name} branch")
            branches[name] = inputs, after


@each
def test_gradients_pass_through_steps(m: Mechanism):
    """Gradients of all tokens through single steps are those of the forward pass, if only the first ones want any."""
    for wanted in (LENGTH, 3):
        q, k, v = (x.requires_grad_() for x in sample(m, LENGTH))
        frozen = [torch.cat([x[:, :, :wanted], x[:, :, wanted:].detach()], 2) for x in (q, k, v)]
        state, outputs = begin(m, k, v), []
        for i in range(LENGTH):
            # Leaves of their own, so that later tokens want no gradient.
            part = [x[:, :, i : i + 1] if i < wanted else x[:, :, i : i + 1].detach() for x in (q, k, v)]
            out, state = m.step(*part, state)
            outputs.append(out)
        weight = torch.randn_like(outputs[0]).repeat(1, 1, LENGTH, 1)
        actual = torch.autograd.grad(torch.cat(outputs, 2), (q, k, v), weight)
        expected = torch.autograd.grad(m(*frozen), (q, k, v), weight)
        for name, a, b in zip("qkv", actual, expected, strict=True):
            expect_close(a, b, f"gradient of {name}, the first {wanted} tokens want one")


@each
def test_a_state_of_inference_mode_goes_on_outside(m: Mechanism):
    inputs = sample(m, LENGTH)
    with torch.inference_mode():
        # So many that there is room for another one.
        _, state = advance(m, inputs, begin(m, *inputs[1:]), 0, 8)
    for i in range(8, LENGTH):
        out, state = advance(m, inputs, state, i, i + 1)
        expect_close(out, m(*inputs)[:, :, i : i + 1], f"token {i}")


@each
def test_a_mask_may_come_late_and_go(m: Mechanism):
    inputs, mask = sample(m, LENGTH), torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, 5:7] = mask[1, 6] = False
    state, outputs = begin(m, *inputs[1:]), []
    for start, stop in ((0, 4), (4, 5), (5, 8), (8, LENGTH)):
        given = mask[:, start:stop] if start == 5 else None
        out, state = advance(m, inputs, state, start, stop, given)
        outputs.append(out)
    expect_close(torch.cat(outputs, 2), m(*inputs, key_mask=mask), "a mask in the third of four steps")


@each
def test_a_pickle_holds_the_state_and_no_more(m: Mechanism):
    inputs = sample(m, 200)
    _, state = advance(m, inputs, begin(m, *inputs[1:]), 0, 150)
    for i in range(150, 160):
        _, state = advance(m, inputs, state, i, i + 1)
    assert len(pickle.dumps(state)) < state.nbytes + 4000
