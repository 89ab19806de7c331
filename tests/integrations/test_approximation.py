"""`measure_approximation` against attention written out densely, in fp64 and without the library's masks."""

from __future__ import annotations

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
    LongformerAttention,
    Mechanism,
    MultiheadAttention,
    PerformerAttention,
    SlidingWindowAttention,
    measure_approximation,
)
from efficient_attn.integrations import approximation
from efficient_attn.testing.counting import count

B, H, N, E = 2, 2, 13, 4
PADDED = {"left": slice(0, 4), "right": slice(9, 13)}


def layers(mechanism: Mechanism) -> nn.Module:
    torch.manual_seed(0)
    layer = Attention(H * E, H, mechanism)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    return layer


@torch.no_grad()
def dense(layer: Any, x: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax and uniform weights over `allowed` (B, N, N), and the values: fp64, from the parameters."""

    def heads(projection: nn.Linear) -> Tensor:
        y = x.double() @ projection.weight.double().T + projection.bias.double()
        return y.view(B, N, H, E).transpose(1, 2)

    q, k, v = heads(layer.q_proj), heads(layer.k_proj), heads(layer.v_proj)
    allowed = allowed[:, None].double()
    scores = torch.exp(q @ k.transpose(2, 3) / E**0.5) * allowed
    return (
        scores / scores.sum(-1, keepdim=True).clamp(min=1e-300),
        allowed / allowed.sum(-1, keepdim=True).clamp(min=1),
        v,
    )


def relative(x: Tensor, exact: Tensor, rows: Tensor) -> float:
    keep = rows[:, None, :, None].double()
    return float((keep * (x - exact)).norm() / (keep * exact).norm())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("pairs_at_once", [1 << 21, 4 * B * H * N, 1], ids=["whole", "chunks", "single rows"])
def test_a_window_has_the_errors_and_the_mass_of_the_dense_computation(
    is_causal: bool, padding: str, pairs_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approximation, "_PAIRS_AT_ONCE", pairs_at_once)
    layer = layers(SlidingWindowAttention(3, is_causal=is_causal))
    x = torch.randn(B, N, H * E)
    key_mask = torch.ones(B, N, dtype=torch.bool)
    if padding != "none":
        key_mask[0, PADDED[padding]] = False
    position = torch.arange(N)
    allowed = key_mask[:, None, :].expand(B, N, N)
    if is_causal:
        allowed = allowed & (position[None, :] <= position[:, None])
    window = (position[None, :] - position[:, None]).abs() < 3

    weights, uniform, v = dense(layer, torch.where(key_mask[..., None], x, 0), allowed)
    windowed = weights * window
    windowed = windowed / windowed.sum(-1, keepdim=True).clamp(min=1e-300)
    exact = weights @ v
    rows = key_mask
    kept = (weights * window).sum(-1)

    poisoned = torch.where(key_mask[..., None], x, torch.nan)
    (found,) = measure_approximation(layer, poisoned, key_mask=key_mask).layers
    assert found.name == "mechanism"
    assert found.mechanism == "SlidingWindowAttention"
    assert found.rows == H * int(rows.sum())
    assert found.error == pytest.approx(relative(windowed @ v, exact, rows), rel=1e-4)
    assert found.error_of_mean == pytest.approx(relative(uniform @ v, exact, rows), rel=1e-4)
    assert found.mass_kept == pytest.approx(float(kept.transpose(1, 2)[rows].mean()), rel=1e-5)
    assert found.error > 0.1
    assert found.mass_kept is not None
    assert found.mass_kept < 0.9


def test_a_mechanism_that_returns_the_mean_has_the_error_of_the_mean() -> None:
    class Mean(LinearAttention):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
            return v.mean(2, keepdim=True).expand(*q.shape[:3], -1)

    (found,) = measure_approximation(layers(Mean()), torch.randn(B, N, H * E)).layers
    assert found.error == pytest.approx(found.error_of_mean, rel=1e-5)
    assert found.error > 0.1


@pytest.mark.parametrize(
    "exact", [FullAttention(), FullAttention(is_causal=True, scale=0.3), FlashAttention()]
)
def test_exact_mechanisms_have_no_error_and_keep_all(exact: Mechanism) -> None:
    (found,) = measure_approximation(layers(exact), torch.randn(B, N, H * E)).layers
    assert found.error < 1e-5
    assert found.mass_kept == pytest.approx(1, abs=1e-5)
    assert found.error_of_mean > 0.1


@pytest.mark.parametrize(
    "mechanism", [LinearAttention(), PerformerAttention(E), LinformerAttention(N, H, rank=3)]
)
def test_mass_is_not_defined_where_there_is_no_pattern(mechanism: Mechanism) -> None:
    report = measure_approximation(layers(mechanism), torch.randn(B, N, H * E))
    assert report.layers[0].mass_kept is None
    assert report.layers[0].error > 0
    assert str(report).splitlines()[1].endswith(" -")


def test_packed_documents_are_measured_as_if_alone() -> None:
    layer = layers(SlidingWindowAttention(2, is_causal=True))
    x = torch.randn(1, N, H * E)
    segment_ids = torch.tensor([[0] * 6 + [1] * 7])
    (packed,) = measure_approximation(layer, x, segment_ids=segment_ids).layers
    alone = [measure_approximation(layer, part).layers[0] for part in (x[:, :6], x[:, 6:])]
    assert packed.rows == sum(each.rows for each in alone)
    mass = sum(each.rows * (each.mass_kept or 0) for each in alone) / packed.rows
    assert packed.mass_kept == pytest.approx(mass, rel=1e-5)


def test_a_bias_is_part_of_what_is_exact_and_hides_keys_from_the_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(approximation, "_PAIRS_AT_ONCE", 1)
    model = MultiheadAttention(H * E, H, batch_first=True, mechanism=FullAttention())
    nn.init.normal_(model.in_proj_weight)
    x = torch.randn(B, N, H * E)
    causal = torch.triu(torch.full((N, N), -torch.inf), 1)
    (biased,) = measure_approximation(model, x, x, x, need_weights=False, attn_mask=causal).layers
    model.mechanism = FullAttention(is_causal=True)
    (masked,) = measure_approximation(model, x, x, x, need_weights=False).layers
    assert biased.error < 1e-5
    assert biased.error_of_mean == pytest.approx(masked.error_of_mean, rel=1e-4)


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min])
def test_on_heads_a_bias_weighs_what_is_exact_and_not_the_mean(hidden: float) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, H, N, E)
    bias = torch.randn(B, H, N, N).masked_fill(torch.rand(B, H, N, N) < 0.3, hidden)
    allowed = (bias > hidden).double()
    weights = torch.exp(q.double() @ k.double().mT / E**0.5 + bias.double().clamp(min=-1e30)) * allowed
    exact = weights / weights.sum(-1, keepdim=True) @ v.double()
    mean = allowed / allowed.sum(-1, keepdim=True) @ v.double()
    (found,) = measure_approximation(FullAttention(), q, k, v, attn_bias=bias).layers
    assert found.error < 1e-5
    assert found.error_of_mean == pytest.approx(float((mean - exact).norm() / exact.norm()), rel=1e-5)


def test_on_heads_what_is_masked_is_never_read() -> None:
    q, k, v = torch.randn(3, B, H, N, E)
    key_mask = torch.ones(B, N, dtype=torch.bool)
    key_mask[1, 7:] = False
    results = []
    for fill in (0.0, torch.nan):
        hidden = [torch.where(key_mask[:, None, :, None], x, fill) for x in (q, k, v)]
        results.append(measure_approximation(SlidingWindowAttention(3), *hidden, key_mask=key_mask))
        segments = torch.where(key_mask, 0, -1)
        results.append(measure_approximation(SlidingWindowAttention(3), *hidden, segment_ids=segments))
    assert results[0] == results[2]
    assert results[1] == results[3]
    assert results[0].layers[0].rows == results[1].layers[0].rows == H * int(key_mask.sum())
    assert results[0].layers[0].error == pytest.approx(results[1].layers[0].error, rel=1e-5)


def test_queries_elsewhere_than_the_keys_all_count() -> None:
    layer = layers(LongformerAttention(2, global_tokens=1))
    x, context = torch.randn(B, 5, H * E), torch.randn(B, N, H * E)
    key_mask = torch.ones(B, N, dtype=torch.bool)
    key_mask[:, -5:] = False
    (found,) = measure_approximation(layer, x, context, key_mask=key_mask).layers
    assert found.rows == B * H * 5


def test_every_mechanism_has_its_row_and_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(H * E, H, 16, batch_first=True)
    encoder.self_attn = MultiheadAttention(  # type: ignore[assignment]
        H * E, H, batch_first=True, mechanism=SlidingWindowAttention(2)
    )
    layer = layers(LinearAttention())
    layer.eval()
    model = nn.Sequential(encoder, layer, nn.Dropout(0.5))
    modes = [module.training for module in model.modules()]
    x = torch.randn(B, N, H * E)
    report = measure_approximation(model, x)
    assert [each.name for each in report.layers] == ["0.self_attn.mechanism", "1.mechanism"]
    assert [each.mechanism for each in report.layers] == ["SlidingWindowAttention", "LinearAttention"]
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "mechanism", "error", "mean", "of", "v", "mass", "kept"]
    first = report.layers[0]
    assert lines[1].split()[2:] == [
        f"{first.error:.3f}",
        f"{first.error_of_mean:.3f}",
        f"{first.mass_kept:.3f}",
    ]


def test_several_calls_of_one_mechanism_are_taken_together() -> None:
    layer = layers(SlidingWindowAttention(3))
    x = torch.randn(B, N, H * E)
    (once,) = measure_approximation(layer, x).layers
    (twice,) = measure_approximation(nn.Sequential(layer, layer), x).layers
    assert twice.rows == 2 * once.rows


def test_a_model_without_mechanisms_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential holds none"):
        measure_approximation(nn.Sequential(nn.Linear(2, 2)), torch.randn(2, 2))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        measure_approximation(len, torch.randn(2, 2))  # type: ignore[arg-type]


def test_a_model_that_calls_none_is_refused_and_hooks_are_gone() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layers(LinearAttention())

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = Idle()
    with pytest.raises(ValueError, match="none of the 1 mechanisms in this Idle was called"):
        measure_approximation(model, torch.randn(B, N, H * E))
    assert not model.layer.mechanism._forward_hooks


def test_no_tensor_grows_with_the_square_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximation, "_PAIRS_AT_ONCE", 1 << 14)
    length, mechanism = 1024, SlidingWindowAttention(8, is_causal=True)
    q = torch.randn(1, 1, length, 4)
    counter = count(lambda: measure_approximation(mechanism, q, q, q))
    assert 0 < counter.largest < length**2 / 8
