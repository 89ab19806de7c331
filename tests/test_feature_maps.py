"""Feature maps are the formulas of their docstrings, at any scale, whatever the exponent that they come with."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from efficient_attn import PerformerAttention
from efficient_attn.feature_maps import FEATURE_MAPS, Favor, FeatureMap, orthogonal_gaussian

HEAD_DIM, FEATURES = 6, 11


def favor_logarithm(favor: Favor, x: Tensor) -> Tensor:
    scaled = x / HEAD_DIM**0.25
    return scaled @ favor.projection.mT - (scaled**2).sum(-1, keepdim=True) / 2 - math.log(FEATURES) / 2


LOGARITHMS: dict[str, Callable[[Favor, Tensor], Tensor]] = {
    "elu": lambda phi, x: torch.where(x > 0, torch.log(x + 1), x),
    "relu": lambda phi, x: torch.relu(x).log(),
    "squared_relu": lambda phi, x: 2 * torch.relu(x).log(),
    "exp": lambda phi, x: x,
    "favor_softmax": favor_logarithm,
    "favor_relu": lambda phi, x: torch.relu(x @ phi.projection.mT / HEAD_DIM**0.25 / FEATURES**0.5).log(),
}


def build(name: str) -> FeatureMap:
    if name in FEATURE_MAPS:
        return FEATURE_MAPS[name]()
    return Favor(HEAD_DIM, FEATURES, seed=3, kernel=name.removeprefix("favor_")).double()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("name", LOGARITHMS)
def test_features_are_the_formula(name: str, scale: float) -> None:
    phi, x = build(name), torch.randn(2, 3, 7, HEAD_DIM, dtype=torch.float64) * scale
    values, exponent = phi(x)
    assert bool((values >= 0).all()) and bool(torch.isfinite(values).all())
    assert (exponent is not None) == phi.has_exponent
    actual = values.log() + (0 if exponent is None else exponent[..., None] * math.log(2))
    # A feature may underflow beside the largest of its token, never by itself.
    seen = values > torch.finfo(values.dtype).tiny
    assert bool(seen.any())
    torch.testing.assert_close(actual[seen], LOGARITHMS[name](phi, x)[seen], rtol=1e-9, atol=1e-9)
    if exponent is not None:
        # Only multiplying by a power of two rounds nothing.
        assert torch.equal(exponent, exponent.round())
        largest = values.amax(-1)[torch.isfinite(exponent) & seen.any(-1)]
        assert bool((largest > 0.2).all()) and bool((largest <= 1 + 1e-9).all())


def test_rotations_are_uniform() -> None:
    """Householder's QR makes the first entry negative always, which biases the kernel that features estimate."""
    first = torch.stack([orthogonal_gaussian(4, 4, seed)[:, 0] for seed in range(400)])
    # Each is a standard normal number.
    assert bool((first.mean(0).abs() < 5 / 400**0.5).all())
    assert bool(((first**2).mean(0) - 1).abs().max() < 5 * (2 / 400) ** 0.5)


def test_features_of_one_seed_are_drawn_without_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    PerformerAttention(HEAD_DIM, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.initial_seed() == 5


def test_fp32_features_keep_their_weights_at_five_times_the_scale() -> None:
    """A stabiliser shared by tokens or heads would let the features of the smaller ones underflow."""
    for is_causal in (False, True):
        mechanism = PerformerAttention(16, num_features=32, is_causal=is_causal)
        scale = torch.logspace(-1, 0.7, 48, dtype=torch.float64)[:, None]
        q, k, v = (torch.randn(1, 2, 48, 16, dtype=torch.float64) * scale for _ in range(3))
        exact = mechanism.double()(q, k, v)
        single = mechanism.float()(q.float(), k.float(), v.float())
        torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-4)
