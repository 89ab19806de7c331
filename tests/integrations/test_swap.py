"""`swap_attention` on modules of torch and timm: what is found, reported, computed and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from efficient_attn import MECHANISMS, LinearAttention, SwapError, swap_attention
from efficient_attn.integrations.torch_mha import MultiheadAttention

EMBED, HEADS, LENGTH = 24, 4, 11
OPTIONS: dict[str, dict[str, Any]] = {
    "sliding_window": {"window_size": 3},
    "longformer": {"window_size": 3, "global_tokens": 2},
    "bigbird": {"block_size": 4},
    "sparse_transformer": {"pattern": "strided", "stride": 3},
    "linformer": {"rank": 8, "max_seq_len": 64},
}


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).double().eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and a mask in which True is padding."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, LENGTH, EMBED, generator=generator, dtype=torch.float64)
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[0, -4:] = True
    return x, padding


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("to", ["full", "flash"])
def test_exact_mechanisms_change_nothing_in_an_encoder(to: str, grad: bool) -> None:
    ours, theirs = encoder(), encoder()
    keys = list(ours.state_dict())
    parameters = [id(p) for p in ours.parameters()]
    swap_attention(ours, to)
    assert list(ours.state_dict()) == keys and {id(p) for p in ours.parameters()} == set(parameters)
    x, padding = batch()
    with torch.set_grad_enabled(grad):
        for mask in (None, padding):
            a, b = (model(x, src_key_padding_mask=mask) for model in (ours, theirs))
            rows = slice(None) if mask is None else ~mask
            assert (a - b)[rows].abs().max() < 1e-12


@pytest.mark.parametrize("to", MECHANISMS)
def test_the_inference_path_of_torch_does_not_go_round_the_mechanism(to: str) -> None:
    model = encoder()
    swap_attention(model, to, **OPTIONS.get(to, {}))
    calls = []
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            module.mechanism.register_forward_hook(lambda *_: calls.append(1))
    x, padding = batch()
    with torch.inference_mode():
        model(x, src_key_padding_mask=padding)
    assert len(calls) == 2


@pytest.mark.parametrize("to", MECHANISMS)
def test_padding_changes_nothing(to: str) -> None:
    model = encoder()
    swap_attention(model, to, **OPTIONS.get(to, {}))
    x, padding = batch()
    with torch.no_grad():
        together, alone = model(x, src_key_padding_mask=padding), model(x[:1, :-4])
    assert (together[0, :-4] - alone[0]).abs().max() < 1e-12


def test_restoring_gives_back_the_very_modules() -> None:
    model, (x, padding) = encoder(), batch()
    before, modules = model(x, src_key_padding_mask=padding), [id(m) for m in model.modules()]
    nested = model.use_nested_tensor
    report = swap_attention(model, "linear")
    assert model.use_nested_tensor is False
    assert not torch.equal(model(x, src_key_padding_mask=padding)[1], before[1])
    report.restore()
    assert [id(m) for m in model.modules()] == modules and model.use_nested_tensor == nested
    assert torch.equal(model(x, src_key_padding_mask=padding), before)


def test_restoring_keeps_what_was_learnt() -> None:
    model, (x, _) = encoder().train(), batch()
    report = swap_attention(model, "linear")
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().sum().backward()
    optimiser.step()
    trained = {name: p.clone() for name, p in model.named_parameters()}
    report.restore()
    assert model.training and model.layers[0].self_attn.training
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())


def test_a_dry_run_touches_nothing() -> None:
    model, modules = encoder(), [type(m) for m in encoder().modules()]
    report = swap_attention(model, "sliding_window", window_size=4, dry_run=True)
    assert report.dry_run and len(report.swapped) == 2
    assert [type(m) for m in model.modules()] == modules
    report.restore()


def test_the_report_says_what_it_costs() -> None:
    report = swap_attention(encoder(), "sliding_window", window_size=4, dry_run=True)
    mechanism = report.swapped[0].mechanism
    cost = report.costs(1024)[0]
    assert mechanism is not None and cost is not None
    pairs = 1024 * 7 - 2 * (1 + 2 + 3)
    assert cost.flops.forward == 4 * HEADS * pairs * (EMBED // HEADS)
    text = report.table(1024)
    assert "layers.0.self_attn" in text and "exact within a pattern" in text and "GFLOP at 1,024" in text
    assert report.costs(64)[1] == report.swapped[1].mechanism.cost(_shape(64))  # type: ignore[union-attr]


def _shape(length: int) -> Any:
    from efficient_attn import Shape

    return Shape(1, HEADS, length, length, EMBED // HEADS)


def test_layers_by_number_and_path() -> None:
    for layers in ([1], ["layers.1.*"], ["layers.1"], [-1, 1][1:]):
        model = encoder()
        report = swap_attention(model, "linear", layers=layers)
        assert [row.path for row in report.swapped] == ["layers.1.self_attn"]
        assert isinstance(model.layers[0].self_attn, nn.MultiheadAttention)


def test_a_function_of_the_site() -> None:
    seen = []

    def choose(site: Any) -> LinearAttention | None:
        seen.append((site.path, site.layer, site.num_heads, site.head_dim, site.is_causal, site.is_cross))
        return LinearAttention(is_causal=site.is_causal) if site.layer == 0 and not site.is_cross else None

    model = nn.Transformer(EMBED, HEADS, 1, 1, 32, dropout=0.0, batch_first=True).double().eval()
    report = swap_attention(model, choose)
    assert seen == [
        ("encoder.layers.0.self_attn", 0, HEADS, 6, False, False),
        ("decoder.layers.0.self_attn", 0, HEADS, 6, True, False),
        ("decoder.layers.0.multihead_attn", 0, HEADS, 6, False, True),
    ]
    assert [row.reason for row in report.rows] == [None, None, "cross-attention is left to the model"]


@pytest.mark.parametrize("to", ["full", "flash", "linear"])
def test_a_whole_transformer(to: str) -> None:
    ours, theirs = (
        (torch.manual_seed(0), nn.Transformer(EMBED, HEADS, 2, 2, 32, dropout=0.0, batch_first=True))[1]
        .double()
        .eval()
        for _ in range(2)
    )
    swap_attention(ours, to)
    x, padding = batch()
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    given = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": causal}
    with torch.no_grad():
        a, b = (model(x, x.flip(1), tgt_is_causal=True, **given) for model in (ours, theirs))
        cut = ours(x, x.flip(1)[:, :5], tgt_is_causal=True, **{**given, "tgt_mask": causal[:5, :5]})
    if to != "linear":
        assert (a - b).abs().max() < 1e-12
    assert (a[:, :5] - cut).abs().max() < 1e-12, "a token saw what comes after it"


def test_dropout_is_carried_over() -> None:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.25, batch_first=True)
    swap_attention(layer, "sliding_window", window_size=3)
    assert layer.self_attn.mechanism.dropout_p == 0.25
    fresh = nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.25, batch_first=True)
    with pytest.warns(UserWarning, match="attention dropout of 0.25 is left out"):
        swap_attention(fresh, "linear")


def test_keys_and_values_of_other_sizes() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, kdim=10, vdim=14, bias=False).double()
    holder = nn.ModuleDict({"attention": theirs})
    q, k, v = (torch.randn(5, 2, n, dtype=torch.float64) for n in (EMBED, 10, 14))
    expected = theirs(q, k, v)[0]
    swap_attention(holder, "full")
    assert (holder["attention"](q, k, v)[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_appended_keys_are_for_full_attention(option: str) -> None:
    holder = nn.ModuleDict({"attention": nn.MultiheadAttention(EMBED, HEADS, **{option: True})})
    with pytest.raises(SwapError, match="only full attention can append to the keys"):
        swap_attention(holder, "linear")
    swap_attention(holder, "full")


def test_bad_arguments() -> None:
    model = encoder()
    with pytest.raises(TypeError, match="to must be a name or a function of a Site, got int"):
        swap_attention(model, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="options go with a name; to is a function, and got window_size"):
        swap_attention(model, lambda site: None, window_size=3)
    with pytest.raises(TypeError, match="must return a Mechanism or None, got str"):
        swap_attention(model, lambda site: "linear")  # type: ignore[arg-type, return-value]
    with pytest.raises(SwapError, match="did you mean 'linear'"):
        swap_attention(model, "linaer")
    with pytest.raises(SwapError, match="sliding_window needs window_size"):
        swap_attention(model, "sliding_window")
    with pytest.raises(TypeError, match="linear has no option 'window_size'"):
        swap_attention(model, "linear", window_size=3)
    with pytest.raises(SwapError, match="has no attention module that can be swapped"):
        swap_attention(model, lambda site: None)
    assert not any(isinstance(m, MultiheadAttention) for m in model.modules())


def test_a_decoder_called_without_a_causal_mask() -> None:
    """DETR's is not causal: exact attention follows, and a causal mechanism says that it would not."""
    x, memory = torch.randn(2, 7, EMBED).double(), torch.randn(2, 9, EMBED).double()
    ours, theirs = (
        (torch.manual_seed(0), nn.TransformerDecoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True))[
            1
        ].double()
        for _ in range(2)
    )
    report = swap_attention(ours, "full")
    assert (ours(x, memory) - theirs(x, memory)).abs().max() < 1e-12
    report.restore()
    swap_attention(ours, "linear")
    with pytest.raises(ValueError, match="was swapped in where causality comes as attn_mask: none came"):
        ours(x, memory)


def test_a_subclass_with_code_of_its_own_is_left_alone() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    holder = nn.ModuleDict({"own": Own(EMBED, HEADS), "plain": nn.MultiheadAttention(EMBED, HEADS)})
    report = swap_attention(holder, "full")
    assert [row.path for row in report.swapped] == ["plain"] and type(holder["own"]) is Own
    assert "Own is a subclass of nn.MultiheadAttention" in str(report)


def test_cross_attention_that_has_another_name() -> None:
    holder = nn.ModuleDict({"perceive": nn.MultiheadAttention(EMBED, HEADS, batch_first=True)})
    latents, data = torch.randn(1, 4, EMBED), torch.randn(1, 50, EMBED)
    swap_attention(holder, "sliding_window", window_size=4)
    with pytest.raises(ValueError, match="is given keys of another sequence"):
        holder["perceive"](latents, data, data, need_weights=False)
    other = nn.ModuleDict({"perceive": nn.MultiheadAttention(EMBED, HEADS, batch_first=True)})
    swap_attention(other, "linear")
    assert other["perceive"](latents, data, data, need_weights=False)[0].shape == latents.shape


def test_a_swap_that_fails_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from efficient_attn.integrations import swap, torch_modules

    class Failing:
        find, refuse = staticmethod(torch_modules.find), staticmethod(torch_modules.refuse)

        @staticmethod
        def install(model: nn.Module, chosen: Any) -> Any:
            raise RuntimeError("out of memory")

    model, modules = encoder(), [type(m) for m in encoder().modules()]
    monkeypatch.setattr(swap, "_adapters", lambda: [torch_modules, Failing])
    with pytest.raises(RuntimeError, match="out of memory"):
        swap_attention(model, "linear")
    assert [type(m) for m in model.modules()] == modules
