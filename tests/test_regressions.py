"""What a review once broke, each in the smallest form."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficient_attn import (
    FlashAttention,
    FullAttention,
    LinearAttention,
    LinformerAttention,
    LongformerAttention,
    PerformerAttention,
    SlidingWindowAttention,
)
from efficient_attn.masks import Causal, Everything, Fixed, GlobalTokens, Mask, Strided, Window
from efficient_attn.mechanisms import SoftmaxMechanism
from efficient_attn.ops.tiles import BATCH_SCORES
from efficient_attn.testing import check_mechanism
from efficient_attn.testing.counting import count


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    "mechanism",
    [SlidingWindowAttention(3), PerformerAttention(8, is_causal=True), FlashAttention(backend="blocked")],
    ids=lambda m: type(m).__name__,
)
def test_forward_mode_refuses_instead_of_losing_the_tangent(mechanism):
    q = normal(1, 1, 6, 8)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda k: mechanism(q, k, q), (q,), (q,))


def test_small_weights_are_still_weights():
    v = normal(1, 1, 4, 8)
    for dtype, x in ((torch.float32, -30.0), (torch.float64, -200.0)):
        q = torch.full((1, 1, 4, 8), x, dtype=dtype)
        torch.testing.assert_close(LinearAttention()(q, q, v.to(dtype))[0, 0, 0], v.to(dtype).mean(2)[0, 0])


def test_a_bias_is_not_rounded_to_the_dtype_of_q():
    q, k, v = (normal(1, 2, 256, 16, seed=s, dtype=torch.bfloat16) for s in range(3))
    bias = 300 - torch.arange(256.0).sub(torch.arange(256.0)[:, None]).abs() / 16
    exact = FullAttention(backend="reference")(q.double(), k.double(), v.double(), attn_bias=bias.double())
    assert (FullAttention()(q, k, v, attn_bias=bias).double() - exact).abs().max() < 0.03


def test_flash_takes_inputs_whose_last_dimension_is_not_contiguous():
    q = normal(1, 2, 8, 16).mT
    expected = FullAttention()(q, q, q)
    torch.testing.assert_close(FlashAttention()(q, q, q), expected)
    assert "must be contiguous" in FlashAttention().explain(q, q, q)


def test_the_offset_of_the_forward_pass_is_that_of_the_backward_pass():
    q, k = normal(1, 1, 4, 8).requires_grad_(), normal(1, 1, 20, 8, seed=1)
    offset = torch.tensor(3)
    out = SlidingWindowAttention(3, is_causal=True)(q, k, k, q_offset=offset)
    expected = SlidingWindowAttention(3, is_causal=True)(q, k, k, q_offset=3)
    offset += 9
    assert torch.equal(*(torch.autograd.grad(x.square().sum(), q)[0] for x in (out, expected)))


def test_linformer_shares_one_parameter_not_two_names_of_it():
    with torch.device("meta"):
        lazy = LinformerAttention(8, 2, rank=4, sharing="key-value")
    assert [name for name, _ in lazy.named_parameters()] == ["key_projection"]
    assert list(lazy.state_dict()) == ["key_projection"]
    lazy = lazy.to_empty(device="cpu")
    lazy.reset_parameters()
    x = normal(1, 2, 8, 4)
    torch.testing.assert_close(lazy(x, x, x), lazy.matrix(x, x) @ x)


def test_linformer_keeps_its_sums_under_autocast():
    mechanism = LinformerAttention(4096, 1, rank=4)
    with torch.no_grad():
        mechanism.key_projection.fill_(1.0)
        mechanism.value_projection.fill_(1e-3)
    x = torch.full((1, 1, 4096, 8), 20.0)
    with torch.autocast("cpu", dtype=torch.float16):
        out = mechanism(x.half(), x.half(), x.half())
    torch.testing.assert_close(out.float(), torch.full_like(x, 81.92), rtol=2e-3, atol=0)


def test_masking_the_future_moves_no_bit_of_the_past():
    q, k, v = (normal(1, 2, 900, 16, seed=s) for s in range(3))
    for mechanism in (
        SlidingWindowAttention(40, num_sinks=3, is_causal=True),
        LongformerAttention(40, global_tokens=5, is_causal=True),
    ):
        whole, cut = torch.ones(1, 900, dtype=torch.bool), torch.ones(1, 900, dtype=torch.bool)
        cut[:, 500:] = False
        a, b = (mechanism(q, k, v, key_mask=mask)[:, :, :500] for mask in (whole, cut))
        assert torch.equal(a, b)


def test_nan_in_a_padding_segment_reaches_nobody():
    segments = torch.tensor([[0, 0, 0, -1, -1, 1, 1, 1]])
    x = normal(1, 2, 8, 4)
    dirty = torch.where((segments < 0)[:, None, :, None], torch.nan, x)
    for mechanism in (FullAttention(), SlidingWindowAttention(3), LinearAttention(is_causal=True)):
        clean = mechanism(x, x, x, segment_ids=segments)
        assert torch.equal(mechanism(x, dirty, dirty, segment_ids=segments), clean)


def test_segment_ids_of_any_integer_dtype_mean_the_same():
    q, k = normal(1, 1, 4, 8), normal(1, 1, 9, 8, seed=1)
    for mechanism in (FullAttention(), LinearAttention(is_causal=True), SlidingWindowAttention(4)):
        segments = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]])
        expected = mechanism(q, k, k, segment_ids=segments, q_offset=7)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
            assert torch.equal(mechanism(q, k, k, segment_ids=segments.to(dtype), q_offset=7), expected)


def test_a_mask_of_the_same_name_elsewhere_changes_nothing_here():
    @dataclass(frozen=True)
    class Window(Mask):
        size: int

        def allows(self, q, k):
            return q == k

        def row_spans(self, q, num_keys):
            return q[:, None], q[:, None] + 1

    q = normal(1, 1, 12, 4)
    mechanism = SlidingWindowAttention(4)
    torch.testing.assert_close(mechanism(q, q, q), mechanism.matrix(q, q) @ q)
    assert Mask.from_spec(Window(3).spec()) == Window(3)


def test_a_key_mask_costs_no_memory_in_the_pairs():
    length = 2048
    q = normal(1, 2, length, 8)
    mask = torch.rand(1, length) > 0.5
    for mechanism in (FullAttention(), FlashAttention()):
        out = mechanism(q, q, q, key_mask=mask)
        expected = F.scaled_dot_product_attention(
            q, q, q, attn_mask=mask[:, None, None].expand(1, 2, length, length)
        )
        torch.testing.assert_close(out, expected)
    counter = count(lambda: FlashAttention(backend="blocked")(q, q, q, key_mask=mask))
    assert counter.largest <= BATCH_SCORES < 2 * length**2 / 8


def test_the_family_puts_causality_on_top():
    class Anything(SoftmaxMechanism):
        complexity = FullAttention.complexity

        @classmethod
        def examples(cls, seq_len, num_heads, head_dim):
            return [cls(Everything(), is_causal=True)]

    assert Anything(Everything(), is_causal=True).mask == Causal()
    assert Anything(Window(3), is_causal=True).mask == Window(3) & Causal()


def test_autocast_gives_fp32_inputs_back_in_fp32():
    x = normal(1, 2, 8, 4)
    for mechanism in (
        FullAttention(),
        FlashAttention(),
        SlidingWindowAttention(3, is_causal=True),
        LinearAttention(),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert mechanism(x, x, x).dtype == torch.float32


@pytest.mark.parametrize(
    "mechanism",
    [
        PerformerAttention(16, is_causal=True),
        LinformerAttention(64, 3, rank=4, sharing="none"),
        LinformerAttention(40, 6, rank=4),
    ],
    ids=str,
)
def test_check_mechanism_takes_sizes_from_the_mechanism(mechanism: nn.Module):
    assert check_mechanism(mechanism).ok


def test_check_mechanism_says_when_a_mechanism_is_too_short_for_it():
    with pytest.raises(ValueError, match="at least 37 tokens, its max_seq_len is 16"):
        check_mechanism(LinformerAttention(16, 4, rank=4))


def test_an_offset_that_moves_on_changes_no_gradient():
    q, k, v = normal(1, 2, 4, 8), normal(1, 2, 12, 8), normal(1, 2, 12, 8)
    for mechanism in (SlidingWindowAttention(3, is_causal=True), LinearAttention(is_causal=True)):
        grads = []
        for offset in (5, torch.tensor(5)):
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out = mechanism(*inputs, q_offset=offset)
            if isinstance(offset, torch.Tensor):
                offset += 1  # as a cache does between forward and backward
            grads.append(torch.autograd.grad(out.sum(), inputs))
        for moved, fixed in zip(*reversed(grads), strict=True):
            torch.testing.assert_close(moved, fixed)


class Mine(SoftmaxMechanism):
    """Softmax attention over any mask."""

    examples = classmethod(lambda cls, *sizes: [])


@pytest.mark.parametrize(
    "mask",
    [
        Fixed(32, 1) | Strided(33) | Causal(),
        GlobalTokens.first(2) | Strided(33) | Window(65),
        Window(2) | Strided(1),  # with a band and one residue class of the same rows and keys
    ],
    ids=["fixed or strided or causal", "global or strided or window", "window or every stride"],
)
@pytest.mark.parametrize("length", [40, 300])
def test_tiles_of_one_shape_under_different_masks_stay_apart(mask: Mask, length: int):
    q, k, v = torch.randn(3, 1, 1, length, 8, dtype=torch.float64)
    m = Mine(mask, is_causal=False)
    torch.testing.assert_close(m(q, k, v), m.matrix(q, k) @ v)


def _tokens(steps: int) -> torch.Tensor:
    return torch.randn(2, 2, steps, 4, dtype=torch.float64)


def test_only_queries_need_a_gradient_through_steps():
    m, x = FullAttention(is_causal=True), _tokens(9)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    state, outputs = m.init_state(2, 2, 4, dtype=torch.float64), []
    for token in x.split(1, 2):
        out, state = m.step(token @ weight, token, token, state)
        outputs.append(out)
    actual = torch.autograd.grad(torch.cat(outputs, 2).square().sum(), weight)
    torch.testing.assert_close(actual, torch.autograd.grad(m(x @ weight, x, x).square().sum(), weight))


def test_a_view_put_into_a_state_is_what_the_next_step_reads():
    m, x = FullAttention(is_causal=True), _tokens(9)
    state = m.init_state(2, 2, 4, dtype=torch.float64)
    for token in x[:, :, :8].split(1, 2):
        _, state = m.step(token, token, token, state)
    state.k, state.v = (kv[:1].expand(2, -1, -1, -1) for kv in (state.k, state.v))
    _, state = m.step(*[x[:, :, 8:]] * 3, state)
    assert torch.equal(state.k[:, :, :8], x[:1, :, :8].expand(2, -1, -1, -1))


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad of queries"])
def test_steps_under_transforms(transform: str):
    m, x = FullAttention(is_causal=True, backend="reference"), _tokens(6)

    def last(queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        state = m.init_state(len(tokens), 2, 4, dtype=torch.float64)
        for q, token in zip(queries.split(1, 2), tokens.split(1, 2), strict=True):
            out, state = m.step(q, token, token, state)
        return out

    def whole(queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return m(queries, tokens, tokens)[:, :, -1:]

    def run(f):
        if transform == "vmap":
            return torch.func.vmap(lambda t: f(t[None], t[None])[0])(x)
        if transform == "jvp":
            return torch.func.jvp(lambda t: f(t, t), (x,), (x.cos(),))[1]
        return torch.func.grad(lambda t: f(t, x).sum())(x)

    torch.testing.assert_close(run(last), run(whole))


def test_dropout_is_the_same_for_all_vectors_of_a_vectorised_backward_pass():
    m = SlidingWindowAttention(4, is_causal=True, dropout_p=0.3).train()
    x = torch.randn(2, 4, 9, 4, dtype=torch.float64)
    _, pull = torch.func.vjp(lambda v: m(x, x, v), x)
    grads = torch.randn(5, *x.shape, dtype=torch.float64)
    expected = torch.stack([pull(grad)[0] for grad in grads])
    torch.testing.assert_close(torch.func.vmap(lambda grad: pull(grad)[0])(grads), expected)


def test_dropout_does_not_depend_on_the_default_dtype():
    m = SlidingWindowAttention(6, dropout_p=0.4).train()
    v = torch.randn(1, 1, 20, 4, requires_grad=True)
    out = m(v, v, v)
    (expected,) = torch.autograd.grad(out.sum(), v, retain_graph=True)
    torch.set_default_dtype(torch.float64)
    try:
        (actual,) = torch.autograd.grad(out.sum(), v)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual, expected)


def test_a_learnt_projection_has_a_gradient():
    m, x = PerformerAttention(4, is_causal=True), torch.randn(1, 2, 9, 4)
    m.feature_map.projection.requires_grad_()
    (grad,) = torch.autograd.grad(m(x, x, x).sum(), m.feature_map.projection)
    assert grad.abs().max() > 0


def test_values_of_no_width():
    q, v = torch.randn(1, 2, 9, 4, requires_grad=True), torch.randn(1, 2, 9, 0, requires_grad=True)
    out = LinearAttention(is_causal=True)(q, q, v)
    assert out.shape == v.shape
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, v))] == [q.shape, v.shape]
