"""`MultiheadAttention` against `torch.nn.MultiheadAttention`, which it replaces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from efficient_attn import FullAttention, LinformerAttention, MultiheadAttention, SlidingWindowAttention

EMBED, HEADS, BATCH, LENGTH, KEYS = 24, 3, 2, 5, 7
INFERENCE_FAST_PATHS = (torch.no_grad, torch.inference_mode)


def pair(dtype: torch.dtype = torch.float32, **options) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """PyTorch's module and ours with the same random parameters."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def inputs(module: nn.MultiheadAttention, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    lead = (lambda n: (BATCH, n)) if module.batch_first else (lambda n: (n, BATCH))
    sizes = [(LENGTH, EMBED), (KEYS, module.kdim), (KEYS, module.vdim)]
    return [torch.randn(*lead(n), features, dtype=dtype, requires_grad=True) for n, features in sizes]


def attn_mask(kind: str, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """A mask under which every query keeps its first key."""
    if kind == "none":
        return None
    lead = (BATCH * HEADS,) if kind.endswith("3d") else ()
    if kind.startswith("bool"):
        mask = torch.rand(*lead, LENGTH, KEYS) < 0.4
        mask[..., 0] = False
        return mask
    mask = torch.randn(*lead, LENGTH, KEYS, dtype=dtype)
    return mask.masked_fill(torch.rand_like(mask) < 0.2, -torch.inf).index_fill(-1, torch.tensor([0]), 0.5)


def padding(kind: str, dtype: torch.dtype = torch.float32) -> Tensor | None:
    if kind == "none":
        return None
    ignore = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    ignore[0, 4:] = True
    ignore[1, 1:3] = True
    if kind == "bool":
        return ignore
    finite = torch.randn(BATCH, KEYS, dtype=dtype) * (kind == "float")
    return finite.masked_fill(ignore, -torch.inf)


CONSTRUCTORS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"kdim": 10},
    {"kdim": 10, "vdim": 14, "bias": False, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "vdim": 14},
]
ATTN_MASKS, PADDINGS = ("none", "bool2d", "bool3d", "float2d", "float3d"), ("none", "bool", "float", "inf")


def run(module: nn.Module, tensors: list[Tensor], **call) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    out, weights = module(*tensors, **call)
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, generator=generator, dtype=weights.dtype)).sum()
    return out, weights, list(torch.autograd.grad(loss, [*tensors, *module.parameters()]))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("attn", ATTN_MASKS)
@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
def test_matches_torch(options: dict, attn: str, pad: str) -> None:
    for dtype, out_tolerance, grad_tolerance in ((torch.float32, 1e-6, None), (torch.float64, 1e-12, 1e-12)):
        theirs, ours = pair(dtype, **options)
        tensors = inputs(theirs, dtype)
        masks = {"attn_mask": attn_mask(attn, dtype), "key_padding_mask": padding(pad, dtype)}
        for need_weights, average in ((False, True), (True, True), (True, False)):
            call = {**masks, "need_weights": need_weights, "average_attn_weights": average}
            expected, expected_weights, expected_grads = run(theirs, tensors, **call)
            out, weights, grads = run(ours, tensors, **call)
            torch.testing.assert_close(out, expected, atol=out_tolerance, rtol=0)
            assert (weights is None) == (expected_weights is None)
            if weights is not None:
                torch.testing.assert_close(weights, expected_weights, atol=out_tolerance, rtol=0)
            if grad_tolerance is not None:
                torch.testing.assert_close(grads, expected_grads, atol=grad_tolerance, rtol=0)


@pytest.mark.parametrize("mask_gradient", ["attn_mask", "key_padding_mask"])
def test_float_masks_receive_the_gradient_torch_gives_them(mask_gradient: str) -> None:
    theirs, ours = pair(torch.float64)
    tensors = inputs(theirs, torch.float64)
    pairs, keys = attn_mask("float2d", torch.float64), padding("float", torch.float64)
    masks = {"attn_mask": pairs, "key_padding_mask": keys}
    mask = masks[mask_gradient].requires_grad_()
    gradients = []
    for module in (theirs, ours):
        out, _ = module(*tensors, need_weights=False, **masks)
        gradients.append(torch.autograd.grad(out.square().sum(), mask)[0])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("with_masks", [True, False])
def test_unbatched_matches_torch(with_masks: bool, average: bool) -> None:
    theirs, ours = pair(batch_first=True)
    query, key = torch.randn(LENGTH, EMBED), torch.randn(KEYS, EMBED)
    masks = {}
    if with_masks:
        masks = {"attn_mask": attn_mask("bool3d")[:HEADS], "key_padding_mask": padding("bool")[0]}
    expected = theirs(query, key, key, average_attn_weights=average, **masks)
    out = ours(query, key, key, average_attn_weights=average, **masks)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pad", ["none", "bool"])
def test_self_attention_matches_torch_at_every_token_padded_or_not(pad: str) -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(BATCH, KEYS, EMBED)
    expected = theirs(x, x, x, key_padding_mask=padding(pad))
    torch.testing.assert_close(ours(x, x, x, key_padding_mask=padding(pad)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
def test_state_dict_loads_both_ways_and_one_seed_means_one_initialisation(options: dict) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options)
    torch.manual_seed(0)
    ours = MultiheadAttention(EMBED, HEADS, **options)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), atol=0, rtol=0)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_meta_device_then_reset_parameters() -> None:
    module = MultiheadAttention(EMBED, HEADS, add_bias_kv=True, device="meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    module.to_empty(device="cpu")
    module.reset_parameters()
    x = torch.randn(LENGTH, BATCH, EMBED)
    assert module(x, x, x)[0].isfinite().all()


def causal_mask(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


@pytest.mark.parametrize("context", INFERENCE_FAST_PATHS)
@pytest.mark.parametrize("pad", ["none", "bool"])
@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_never_bypasses_forward(context, pad: str, layers: int) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, 2, 32, batch_first=True)
    reference = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    encoder = copy.deepcopy(reference)
    calls = 0

    def count(*_) -> None:
        nonlocal calls
        calls += 1

    for mod in encoder.layers:
        ours = MultiheadAttention(EMBED, 2, 0.1, batch_first=True).eval()
        ours.load_state_dict(mod.self_attn.state_dict(), strict=True)
        forward = ours.forward
        ours.forward = lambda *args, _forward=forward, **call: (count(), _forward(*args, **call))[1]
        mod.self_attn = ours
    x = torch.randn(BATCH, KEYS, EMBED)
    with context():
        out = encoder(x, src_key_padding_mask=padding(pad))
        expected = reference(x, src_key_padding_mask=padding(pad))
    assert calls == layers
    valid = torch.ones(BATCH, KEYS, dtype=torch.bool) if pad == "none" else ~padding(pad)
    torch.testing.assert_close(out[valid], expected[valid], atol=2e-6, rtol=0)


def test_encoder_around_a_window_sees_the_window() -> None:
    """The padding arrives as 0 and -inf, which nn.TransformerEncoderLayer makes of a bool mask."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True)
    layer.self_attn = MultiheadAttention(EMBED, HEADS, batch_first=True, mechanism=SlidingWindowAttention(2))
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.randn(1, KEYS, EMBED)
    moved = x.clone()
    moved[:, 4] += 1
    for mask in (None, torch.arange(KEYS)[None] == 6):
        with torch.no_grad():
            before, after = (encoder(tokens, src_key_padding_mask=mask) for tokens in (x, moved))
        assert ((before - after)[0].abs().amax(-1) > 1e-4).nonzero().flatten().tolist() == [3, 4, 5]


def test_encoder_passes_the_causal_hint_to_a_causal_window() -> None:
    torch.manual_seed(0)
    window = SlidingWindowAttention(3, is_causal=True)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True)
    layer.self_attn = MultiheadAttention(EMBED, HEADS, batch_first=True, mechanism=window)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, KEYS, EMBED)
    changed = x.clone()
    changed[:, 4:] = torch.randn(2, KEYS - 4, EMBED)
    out, moved = encoder(x, causal_mask(KEYS)), encoder(changed, causal_mask(KEYS))
    assert torch.equal(out[:, :4], moved[:, :4])
    assert not torch.equal(out[:, 4:], moved[:, 4:])


def test_nested_tensors_are_refused_with_the_way_out() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, 2, 32, batch_first=True), 1).eval()
    encoder.layers[0].self_attn = MultiheadAttention(EMBED, 2, batch_first=True).eval()
    x, pad = torch.randn(BATCH, KEYS, EMBED), torch.arange(KEYS).expand(BATCH, -1) > 4
    with torch.no_grad(), pytest.raises(ValueError, match="use_nested_tensor"):
        encoder(x, src_key_padding_mask=pad)
    encoder.use_nested_tensor = False
    with torch.no_grad():
        assert encoder(x, src_key_padding_mask=pad).isfinite().all()


@pytest.mark.parametrize("hint", [True, False])
def test_transformer_with_every_attention_replaced(hint: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.Transformer(EMBED, 2, 2, 2, 32, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    for module in list(ours.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention):
                replacement = MultiheadAttention(EMBED, 2, batch_first=True)
                replacement.load_state_dict(child.state_dict(), strict=True)
                setattr(module, name, replacement)
    ours.encoder.use_nested_tensor = False
    source, target = torch.randn(BATCH, KEYS, EMBED), torch.randn(BATCH, LENGTH, EMBED)
    pad = padding("inf")
    call = {"tgt_mask": causal_mask(LENGTH), "src_key_padding_mask": pad, "memory_key_padding_mask": pad}
    if hint:
        call["tgt_is_causal"] = True
    for mode in (True, False):
        expected, out = theirs.train(mode)(source, target, **call), ours.train(mode)(source, target, **call)
        torch.testing.assert_close(out, expected, atol=5e-6, rtol=0)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


def test_causal_hint_replaces_the_mask_for_causal_full_attention() -> None:
    theirs, _ = pair(batch_first=True)
    ours = MultiheadAttention(EMBED, HEADS, batch_first=True, mechanism=FullAttention(is_causal=True))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(BATCH, KEYS, EMBED)
    for pad in (None, padding("inf").masked_fill_(torch.arange(KEYS) == 0, 0)):
        call = {"attn_mask": causal_mask(KEYS), "key_padding_mask": pad, "is_causal": True}
        torch.testing.assert_close(ours(x, x, x, **call), theirs(x, x, x, **call), atol=1e-6, rtol=0)


def test_a_query_with_nothing_to_attend_to_gives_the_output_bias() -> None:
    _, ours = pair(batch_first=True)
    query, key, value = inputs(ours)
    out, weights = ours(query, key, value, key_padding_mask=torch.ones(BATCH, KEYS, dtype=torch.bool))
    assert torch.equal(out, ours.out_proj.bias.expand_as(out))
    assert (weights == 0).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (query, key, value, *ours.parameters()))


@pytest.mark.parametrize("pad", ["bool", "inf"])
@pytest.mark.parametrize("mechanism", [None, SlidingWindowAttention(2)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("cross", [False, True])
def test_padding_never_reaches_outputs_or_gradients(cross: bool, poison: float, mechanism, pad: str) -> None:
    module = MultiheadAttention(EMBED, HEADS, batch_first=True, mechanism=mechanism)
    clean = torch.randn(3, BATCH, KEYS, EMBED)
    ignore, results = padding("bool"), []
    for content in (1.0, poison):
        key, value = clean[:2].masked_fill(ignore[..., None], content).requires_grad_()
        query = clean[2] if cross else key
        tokens = (query, key, value if cross else key)
        out = module(*tokens, key_padding_mask=padding(pad), need_weights=False)[0][~ignore]
        leaves = [key, value] if cross else [key]
        results.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, *module.parameters()])])
    for expected, poisoned in zip(*results, strict=True):
        assert poisoned.isfinite().all()
        assert torch.equal(expected, poisoned)


def test_dropout_is_the_mechanisms() -> None:
    module = MultiheadAttention(EMBED, HEADS, 0.5)
    assert module.dropout == module.mechanism.dropout_p == 0.5
    x = torch.randn(LENGTH, BATCH, EMBED)
    assert not torch.equal(module(x, x, x)[0], module(x, x, x)[0])
    module.eval()
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])


def test_dense_weights_of_a_window() -> None:
    window = SlidingWindowAttention(2)
    module = MultiheadAttention(EMBED, HEADS, batch_first=True, mechanism=window, dense_weights=True)
    x = torch.randn(BATCH, KEYS, EMBED)
    out, weights = module(x, x, x, average_attn_weights=False)
    assert weights.shape == (BATCH, HEADS, KEYS, KEYS)
    near = (torch.arange(KEYS)[:, None] - torch.arange(KEYS)).abs() < 2
    assert torch.equal(weights > 0, near.expand_as(weights))
    torch.testing.assert_close(out, module(x, x, x, need_weights=False)[0])


def test_parameters_of_the_mechanism_are_in_the_state_dict() -> None:
    mechanism = LinformerAttention(KEYS, HEADS, rank=4)
    module = MultiheadAttention(EMBED, HEADS, batch_first=True, mechanism=mechanism)
    own = {name for name in module.state_dict() if name.startswith("mechanism.")}
    assert own == {"mechanism.key_projection", "mechanism.value_projection"}
    assert set(module.state_dict()) - own == set(nn.MultiheadAttention(EMBED, HEADS).state_dict())


def test_autocast() -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(BATCH, KEYS, EMBED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for call in ({}, {"key_padding_mask": padding("bool")}, {"attn_mask": causal_mask(KEYS)}):
            out, expected = ours(x, x, x, **call)[0], theirs(x, x, x, **call)[0]
            assert out.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(out, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("pad", ["none", "bool", "inf"])
@pytest.mark.parametrize("mechanism", [None, SlidingWindowAttention(2)])
def test_compiles_to_one_graph(mechanism, pad: str) -> None:
    module = MultiheadAttention(EMBED, HEADS, batch_first=True, mechanism=mechanism)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, KEYS, EMBED)
    call = {"key_padding_mask": padding(pad), "need_weights": False}
    torch.testing.assert_close(compiled(x, x, x, **call)[0], module(x, x, x, **call)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_heads": 5}, ValueError, "num_heads"),
        ({"mechanism": "full"}, TypeError, "mechanism"),
        ({"mechanism": SlidingWindowAttention(2), "dropout": 0.1}, ValueError, "dropout=0.1"),
        ({"mechanism": SlidingWindowAttention(2), "add_bias_kv": True}, ValueError, "add_bias_kv"),
        ({"mechanism": SlidingWindowAttention(2), "add_zero_attn": True}, ValueError, "add_zero_attn"),
        ({"mechanism": FullAttention(is_causal=True), "add_zero_attn": True}, ValueError, "add_zero_attn"),
    ],
)
def test_constructor_refuses(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MultiheadAttention(EMBED, **{"num_heads": HEADS, **arguments})


WINDOW, CAUSAL_WINDOW = SlidingWindowAttention(2), SlidingWindowAttention(2, is_causal=True)
ONE_ROW = torch.randn(KEYS, 1, EMBED)
NO_PAIRS = torch.zeros(LENGTH, KEYS, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mechanism", "call", "error", "words"),
    [
        (None, {"is_causal": True}, RuntimeError, "attn_mask"),
        (CAUSAL_WINDOW, {"is_causal": True}, RuntimeError, "attn_mask"),
        (WINDOW, {"need_weights": True}, ValueError, "need_weights=True .*SlidingWindowAttention"),
        (WINDOW, {"attn_mask": NO_PAIRS}, ValueError, "attn_mask .*SlidingWindowAttention"),
        (CAUSAL_WINDOW, {"attn_mask": NO_PAIRS}, ValueError, "attn_mask .*pass is_causal=True"),
        (WINDOW, {"attn_mask": NO_PAIRS, "is_causal": True}, ValueError, "is_causal=True .*SlidingWindow"),
        (CAUSAL_WINDOW, {"attn_mask": NO_PAIRS, "is_causal": True}, ValueError, "as many queries as keys"),
        (WINDOW, {"key_padding_mask": torch.ones(BATCH, KEYS)}, ValueError, "key_padding_mask .*Sliding"),
        (None, {"key_padding_mask": torch.ones(BATCH, KEYS).long()}, TypeError, "key_padding_mask"),
        (None, {"key_padding_mask": torch.ones(BATCH, LENGTH)}, ValueError, "key_padding_mask"),
        (None, {"attn_mask": NO_PAIRS.int()}, TypeError, "attn_mask"),
        (None, {"attn_mask": NO_PAIRS.T}, ValueError, "attn_mask"),
        (None, {"key": torch.randn(KEYS, BATCH, 3)}, ValueError, "key must"),
        (None, {"key": ONE_ROW, "value": ONE_ROW}, ValueError, "key must have the batch size"),
        (None, {"value": torch.randn(LENGTH, BATCH, EMBED)}, ValueError, "value must"),
        (None, {"query": torch.randn(EMBED)}, ValueError, "query must"),
    ],
)
def test_forward_refuses(mechanism, call: dict, error: type[Exception], words: str) -> None:
    module = MultiheadAttention(EMBED, HEADS, mechanism=mechanism)
    query, key, value = inputs(module)
    with pytest.raises(error, match=words):
        module(**{"query": query, "key": key, "value": value, "need_weights": False, **call})
