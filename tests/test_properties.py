"""What single mechanisms promise beyond the laws."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from efficient_attn import (
    BackendError,
    BigBirdAttention,
    FlashAttention,
    FullAttention,
    LinearAttention,
    LinformerAttention,
    LongformerAttention,
    PerformerAttention,
    SlidingWindowAttention,
    SparseTransformerAttention,
)
from efficient_attn.feature_maps import Favor, orthogonal_gaussian


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visible(mechanism, length: int) -> torch.Tensor:
    """The support of the fast path, found by sending one-hot values through it."""
    q, k = normal(1, 1, length, 8), normal(1, 1, length, 8, seed=1)
    return (mechanism(q, k, torch.eye(length, dtype=torch.float64)[None, None]) > 0)[0, 0]


def test_a_causal_window_sees_exactly_window_size_keys():
    seen = visible(SlidingWindowAttention(5, is_causal=True), 40).sum(-1)
    assert seen.tolist() == [min(i + 1, 5) for i in range(40)]
    assert visible(SlidingWindowAttention(5), 40).sum(-1)[20] == 9


def test_sinks_come_beside_the_window():
    seen = visible(SlidingWindowAttention(4, num_sinks=2, is_causal=True), 30)
    assert seen.sum(-1).tolist() == [min(i + 1, 6) for i in range(30)]
    assert seen[:, :2].sum(-1).tolist() == [1, *[2] * 29]


def test_bigbird_draws_over_the_whole_sequence_whatever_the_batch():
    mechanism = BigBirdAttention(block_size=4, num_window_blocks=1, num_global_blocks=0, num_random_blocks=3)
    blocks = visible(mechanism, 1024).view(256, 4, 256, 4).any(3).any(1)
    drawn = blocks.nonzero()[:, 1].double()
    assert abs(drawn.mean() - 127.5) < 5 * (256**2 / 12 / len(drawn)) ** 0.5
    assert (drawn > 192).sum() > 100
    q, k, v = normal(3, 2, 64, 8), normal(3, 2, 64, 8, seed=1), normal(3, 2, 64, 8, seed=2)
    torch.testing.assert_close(mechanism(q, k, v)[1:2], mechanism(q[1:2], k[1:2], v[1:2]), rtol=0, atol=1e-14)


def test_orthogonal_features_are_orthogonal_and_gaussian():
    w = orthogonal_gaussian(64, 16, seed=3).double()
    for block in w.split(16):
        cosines = F.normalize(block, dim=1) @ F.normalize(block, dim=1).mT
        torch.testing.assert_close(cosines, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-6)
    norms = orthogonal_gaussian(4096, 16, seed=0).double().norm(dim=1).square()
    assert abs(norms.mean() - 16) < 5 * (32 / 4096) ** 0.5


def test_performer_kernel_error_falls_like_one_over_the_root_of_its_features():
    """Where theory says so: |q' + k'|^2 small enough that the estimator's tail is light."""
    q, k = normal(200, 16) * 0.4, normal(200, 16, seed=1) * 0.4
    exact = torch.exp((q * k).sum(-1) / 4)
    errors = []
    for features in (64, 256, 1024):
        square = torch.zeros(())
        for seed in range(40):
            favor = Favor(16, features, seed=seed).double()
            (phi_q, n_q), (phi_k, n_k) = favor(q), favor(k)
            estimate = (phi_q * phi_k).sum(-1) * torch.exp2(n_q + n_k)
            square = square + ((estimate - exact) / exact).square().mean()
        errors.append((square / 40).sqrt().item())
    for coarse, fine in itertools.pairwise(errors):
        assert 0.4 < fine / coarse < 0.6, errors  # 1/2 for four times the features


def test_performer_approaches_softmax_attention_and_beats_the_mean_of_v():
    q, k, v = normal(1, 4, 256, 16) * 0.5, normal(1, 4, 256, 16, seed=1) * 0.5, normal(1, 4, 256, 16, seed=2)
    exact = FullAttention()(q, k, v)

    def error(x: torch.Tensor) -> float:
        return ((x - exact).norm() / exact.norm()).item()

    baseline = error(v.mean(2, keepdim=True).expand_as(exact))
    errors = [error(PerformerAttention(16, num_features=m).double()(q, k, v)) for m in (64, 1024, 16384)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1 * baseline < baseline


def test_performer_past_is_bit_equal_under_any_future_at_any_scale():
    """performer-pytorch moved the past by 8 % here, and gradients did not show it."""
    for scale in (1.0, 5.0, 20.0, 1000.0):
        mechanism = PerformerAttention(64, num_features=128, is_causal=True)
        q, k, v = (normal(1, 2, 256, 64, seed=s).float() * scale for s in range(3))
        before = mechanism(q, k, v)
        assert torch.isfinite(before).all()
        k2, v2 = k.clone(), v.clone()
        k2[:, :, 200:] *= 1000
        v2[:, :, 200:] = 7
        assert torch.equal(mechanism(q, k2, v2)[:, :, :200], before[:, :, :200])


def test_linear_sums_stay_accurate_over_a_long_sequence():
    n = 1 << 16
    q, k, v = (normal(1, 1, n, 8, seed=s) for s in range(3))
    mechanism = LinearAttention(is_causal=True)
    exact, single = mechanism(q, k, v), mechanism(q.float(), k.float(), v.float())
    assert ((single.double() - exact).abs().max() / exact.abs().max()) < 1e-5


def test_elu_plus_one_keeps_its_small_features_in_half_precision():
    x = torch.full((1, 1, 4, 8), -12.0, dtype=torch.bfloat16)
    v = torch.randn(1, 1, 4, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        LinearAttention()(x, x, v)[0, 0, 0], v.float().mean(2)[0, 0].to(torch.bfloat16)
    )


def test_linformer_takes_any_length_up_to_its_maximum_and_says_why_it_is_not_causal():
    mechanism = LinformerAttention(32, 2, rank=8)
    for length in (1, 31, 32):
        assert mechanism(*[torch.randn(1, 2, length, 8)] * 3).shape == (1, 2, length, 8)
    with pytest.raises(ValueError, match="32 positions, got 33"):
        mechanism(*[torch.randn(1, 2, 33, 8)] * 3)
    with pytest.raises(ValueError, match="would see the future"):
        LinformerAttention(32, 2, is_causal=True)
    assert LinformerAttention(8, 2, rank=32)(*[torch.randn(1, 2, 8, 8)] * 3).isfinite().all()


def test_state_is_bounded_where_it_should_be():
    bounded = [
        SlidingWindowAttention(8, is_causal=True),
        SlidingWindowAttention(8, num_sinks=2, is_causal=True),
        LongformerAttention(8, global_tokens=3, is_causal=True),
        LinearAttention(is_causal=True),
        PerformerAttention(8, is_causal=True),
    ]
    for mechanism in bounded:
        state, sizes = mechanism.init_state(1, 2, 8), set()
        for length in (1, 9, 1000):
            x = torch.randn(1, 2, length, 8)
            _, state = mechanism.step(x, x, x, state)
            sizes.add(state.nbytes)
        assert len(sizes) == 1, mechanism


def test_explain_names_the_choice_and_every_refusal():
    q = torch.randn(1, 2, 8, 4)
    text = FlashAttention().explain(q, q, q)
    for name in (
        "sdpa_cudnn",
        "sdpa_flash",
        "sdpa_efficient",
        "xformers",
        "flash_attn",
        "blocked",
        "reference",
    ):
        assert f"  {name}: " in text
    assert "sdpa_flash: chosen" in text and "must be asked for by name" in text
    assert "backend: sdpa_flash\n" in text and "blocked: could run, comes after sdpa_flash" in text
    uneven = FlashAttention().explain(q, q, torch.randn(1, 2, 8, 6))
    assert "blocked: chosen" in uneven and "head sizes of k and v differ (4 and 6)" in uneven
    mask = torch.ones(1, 8, dtype=torch.bool)
    assert "dense (L, S) mask" in FlashAttention(is_causal=True).explain(q, q, q, key_mask=mask)
    with pytest.raises(BackendError, match="runs on cuda, not cpu"):
        FlashAttention(backend="sdpa_cudnn")(q, q, q)
    assert "backend: blocked" in SlidingWindowAttention(3).explain(q, q, q)


def test_full_attention_is_sdpa():
    q, k, v = (normal(2, 4, 33, 16, seed=s).float() for s in range(3))
    for causal in (False, True):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        assert torch.equal(FullAttention(is_causal=causal)(q, k, v), expected)


@pytest.mark.parametrize(
    "mechanism",
    [
        SlidingWindowAttention(64, is_causal=True),
        LongformerAttention(64, global_tokens=4),
        BigBirdAttention(block_size=32),
        SparseTransformerAttention("fixed", 128),
        SparseTransformerAttention("strided", 128, is_causal=True),
        PerformerAttention(16),
        LinearAttention(is_causal=True),
    ],
    ids=lambda m: type(m).__name__,
)
def test_long_sequences_run_forward_and_backward(mechanism):
    x = torch.randn(1, 1, 16384, 16, requires_grad=True)
    mechanism(x, x, x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_second_derivatives_work_or_refuse():
    q, k, v = (normal(1, 1, 6, 4, seed=s).requires_grad_() for s in range(3))
    assert torch.autograd.gradgradcheck(LinearAttention(is_causal=True), (q, k, v))
    assert torch.autograd.gradgradcheck(PerformerAttention(4, is_causal=True).double(), (q, k, v))
    out = SlidingWindowAttention(3)(q, q, q)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_meta_then_to_empty_then_reset_gives_the_same_module():
    with torch.device("meta"):
        lazy = PerformerAttention(8, seed=5, is_causal=True)
    lazy = lazy.to_empty(device="cpu")
    lazy.reset_parameters()
    assert torch.equal(lazy.feature_map.projection, PerformerAttention(8, seed=5).feature_map.projection)


def test_runs_from_source_where_nothing_is_installed():
    program = (
        "import efficient_attn, torch; x = torch.randn(1, 2, 8, 4)\n"
        "print(efficient_attn.FullAttention()(x, x, x).shape)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "torch.Size([1, 2, 8, 4])" in run.stdout, run.stderr
