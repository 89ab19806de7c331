"""The `Attention` layer: what it adds to a mechanism, which is projections, padding, positions and state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from efficient_attn import (
    Attention,
    FullAttention,
    LinearAttention,
    LinformerAttention,
    PerformerAttention,
    Shape,
    SlidingWindowAttention,
)
from efficient_attn.layers import LayerState

EMBED, HEADS, HEAD_DIM, BATCH, LENGTH = 24, 4, 6, 2, 9


def rope(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding over pairs of neighbouring features (Su et al. 2021, equation 34)."""

    def rotate(x: Tensor) -> Tensor:
        rates = 100.0 ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1])
        angles = positions[:, None] * rates
        even, odd = x[..., 0::2].float(), x[..., 1::2].float()
        turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
        return torch.stack(turned, dim=-1).flatten(-2)

    return rotate(q), rotate(k)


CAUSAL = {
    "full": lambda: FullAttention(is_causal=True),
    "window": lambda: SlidingWindowAttention(3, is_causal=True),
    "linear": lambda: LinearAttention(is_causal=True),
    "performer": lambda: PerformerAttention(HEAD_DIM, is_causal=True),
}
BIDIRECTIONAL = {
    "full": FullAttention,
    "window": lambda: SlidingWindowAttention(3),
    "linear": LinearAttention,
    "linformer": lambda: LinformerAttention(LENGTH, HEADS, rank=4),
}


def tokens(length: int = LENGTH, **options) -> Tensor:
    return torch.randn(BATCH, length, EMBED, **options)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"head_dim": 10}, {"bias": False}], ids=str)
@pytest.mark.parametrize("cross", [False, True])
def test_equals_the_formula_written_out(options: dict, cross: bool) -> None:
    layer = Attention(EMBED, HEADS, SlidingWindowAttention(3), dtype=torch.float64, **options)
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
        if projection.bias is not None:
            nn.init.normal_(projection.bias)
    x, context = tokens(dtype=torch.float64), tokens(5, dtype=torch.float64) if cross else None
    source = x if context is None else context
    q, k, v = (
        proj(inputs).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for proj, inputs in ((layer.q_proj, x), (layer.k_proj, source), (layer.v_proj, source))
    )
    heads = layer.mechanism.matrix(q, k) @ v.repeat_interleave(HEADS // layer.num_kv_heads, dim=1)
    torch.testing.assert_close(layer(x, context), layer.out_proj(heads.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("cross", [False, True])
def test_full_attention_equals_torch(cross: bool) -> None:
    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    layer = Attention(EMBED, HEADS, FullAttention())
    with torch.no_grad():
        for name, weight in zip("qkv", theirs.in_proj_weight.chunk(3), strict=True):
            getattr(layer, f"{name}_proj").weight.copy_(weight)
    layer.out_proj.load_state_dict(theirs.out_proj.state_dict())
    x, context = tokens(), tokens(5) if cross else None
    source = x if context is None else context
    keep = torch.rand(source.shape[:2]) < 0.7
    keep[:, 0] = True
    expected, _ = theirs(x, source, source, key_padding_mask=~keep)
    out = layer(x, context, key_mask=keep)
    rows = slice(None) if cross else keep
    torch.testing.assert_close(out[rows], expected[rows], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_padding_reaches_neither_outputs_nor_gradients(name: str, cross: bool, poison: float) -> None:
    layer = Attention(EMBED, HEADS, BIDIRECTIONAL[name]())
    keep = torch.arange(LENGTH)[None] >= torch.tensor([[0], [3]])
    source = tokens()
    results = []
    for content in (1.0, poison):
        padded = source.masked_fill(~keep[..., None], content).requires_grad_()
        inputs = (torch.ones(BATCH, 4, EMBED), padded) if cross else (padded,)
        out = layer(*inputs, key_mask=keep)
        grads = torch.autograd.grad(out.square().sum(), [padded, *layer.parameters()])
        results.append([out, *grads])
    for clean, poisoned in zip(*results, strict=True):
        assert poisoned.isfinite().all()
        assert torch.equal(clean, poisoned)


def test_negative_segments_are_padding_too() -> None:
    layer = Attention(EMBED, HEADS, SlidingWindowAttention(3))
    segments = torch.tensor([[0] * 4 + [1] * 3 + [-1] * 2] * BATCH)
    x = tokens().masked_fill((segments < 0)[..., None], float("nan"))
    out = layer(x, segment_ids=segments)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, :4], layer(x[:, :4]))
    torch.testing.assert_close(out[:, 4:7], layer(x[:, 4:7]))
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


# A feature map comes between the rotation and the product, so it sees more of a position than the distance.
LEFT_PADDED = [(name, None) for name in CAUSAL] + [("full", rope), ("window", rope)]


@pytest.mark.parametrize(("name", "rotary"), LEFT_PADDED)
def test_left_padded_equals_unpadded(name: str, rotary) -> None:
    layer = Attention(EMBED, HEADS, CAUSAL[name](), rotary=rotary)
    x = tokens()
    keep = (torch.arange(LENGTH) >= 3).expand(BATCH, -1)
    torch.testing.assert_close(layer(x, key_mask=keep)[:, 3:], layer(x[:, 3:]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rotary", [None, rope])
@pytest.mark.parametrize("num_kv_heads", [HEADS, 2])
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [4, 1, 4], [LENGTH]])
@pytest.mark.parametrize("name", CAUSAL)
def test_steps_equal_forward(name: str, chunks: list[int], num_kv_heads: int, rotary) -> None:
    layer = Attention(EMBED, HEADS, CAUSAL[name](), num_kv_heads=num_kv_heads, rotary=rotary)
    x, keep = tokens(), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    keep[1, :2] = False
    for key_mask in (None, keep):
        state, outs = layer.init_state(BATCH), []
        for piece in torch.arange(LENGTH).split(chunks):
            mask = None if key_mask is None else key_mask[:, piece]
            out, state = layer.step(x[:, piece], state, key_mask=mask)
            outs.append(out)
        assert state.position == LENGTH
        torch.testing.assert_close(torch.cat(outs, dim=1), layer(x, key_mask=key_mask), atol=1e-6, rtol=1e-5)


def test_state_clones_reorders_pickles_and_counts_bytes() -> None:
    layer = Attention(EMBED, HEADS, SlidingWindowAttention(3, is_causal=True), rotary=rope)
    x, new = tokens(), tokens(2)
    _, state = layer.step(x, layer.init_state(BATCH))
    assert isinstance(state, LayerState)
    assert state.nbytes == state.mechanism.nbytes > 0
    expected, _ = layer.step(new, state.clone())
    unpickled, _ = layer.step(new, pickle.loads(pickle.dumps(state)))
    swapped, _ = layer.step(new.flip(0), state.clone().reorder(torch.tensor([1, 0])))
    torch.testing.assert_close(unpickled, expected, atol=0, rtol=0)
    torch.testing.assert_close(swapped.flip(0), expected)
    torch.testing.assert_close(layer.step(new, state)[0], expected, atol=0, rtol=0)


def test_non_causal_mechanisms_do_not_step() -> None:
    layer = Attention(EMBED, HEADS, FullAttention())
    with pytest.raises(ValueError, match="causal"):
        layer.init_state(BATCH)
    causal = Attention(EMBED, HEADS, FullAttention(is_causal=True))
    with pytest.raises(ValueError, match="causal"):
        layer.step(tokens(), causal.init_state(BATCH))


@pytest.mark.parametrize("name", CAUSAL)
def test_autocast(name: str) -> None:
    layer = Attention(EMBED, HEADS, CAUSAL[name](), rotary=rope)
    x = tokens()
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        stepped, _ = layer.step(x, layer.init_state(BATCH))
    assert out.dtype == stepped.dtype == torch.bfloat16
    for approximate in (out, stepped):
        torch.testing.assert_close(approximate.float(), exact, atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    layer = Attention(EMBED, HEADS, SlidingWindowAttention(3, is_causal=True), rotary=rope, dtype=dtype)
    assert layer(tokens(dtype=dtype)).dtype == dtype
    assert layer.step(tokens(dtype=dtype), layer.init_state(BATCH))[0].dtype == dtype


@pytest.mark.parametrize("shape", [(0, LENGTH), (BATCH, 1), (1, 2)])
def test_small_shapes(shape: tuple[int, int]) -> None:
    layer = Attention(EMBED, HEADS, FullAttention(is_causal=True), rotary=rope)
    assert layer(torch.randn(*shape, EMBED)).shape == (*shape, EMBED)


def test_meta_device_then_reset_parameters() -> None:
    layer = Attention(EMBED, HEADS, FullAttention(), device="meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(tokens(device="meta")).shape == (BATCH, LENGTH, EMBED)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    bound = (6 / (EMBED + EMBED)) ** 0.5
    assert 0.9 * bound < layer.q_proj.weight.abs().max() <= bound
    assert (layer.q_proj.bias == 0).all()
    assert layer(tokens()).isfinite().all()


def test_construction_leaves_the_mechanism_as_it_came() -> None:
    mechanism = LinformerAttention(LENGTH, HEADS, rank=4)
    before = copy.deepcopy(mechanism.state_dict())
    Attention(EMBED, HEADS, mechanism)
    torch.testing.assert_close(dict(mechanism.state_dict()), dict(before), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["full", "linear"])
def test_compiles_to_one_graph_for_all_lengths(name: str) -> None:
    torch._dynamo.reset()
    layer = Attention(EMBED, HEADS, CAUSAL[name](), rotary=rope)
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(
        layer, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for length in (LENGTH, 13, 16):
        x, keep = tokens(length), torch.rand(BATCH, length) < 0.8
        torch.testing.assert_close(compiled(x, key_mask=keep), layer(x, key_mask=keep), atol=1e-6, rtol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("context_len", [None, 5])
@pytest.mark.parametrize("num_kv_heads", [HEADS, 2])
def test_cost_of_the_projections_is_what_runs(num_kv_heads: int, context_len: int | None) -> None:
    layer = Attention(EMBED, HEADS, FullAttention(), num_kv_heads=num_kv_heads, head_dim=10)
    keys = LENGTH if context_len is None else context_len
    cost = layer.cost(BATCH, LENGTH, context_len=context_len, training=True, dtype=torch.float32)
    shape = Shape(BATCH, HEADS, LENGTH, keys, 10, num_kv_heads=num_kv_heads, dtype=torch.float32)
    inner = layer.mechanism.cost(shape, training=True)

    x = tokens(requires_grad=True)
    context = None if context_len is None else tokens(context_len, requires_grad=True)
    source = x if context is None else context
    with FlopCounterMode(display=False) as forward:
        q, k, v = layer.q_proj(x), layer.k_proj(source), layer.v_proj(source)
        out = layer.out_proj(q)
    with FlopCounterMode(display=False) as backward:
        (out.sum() + k.sum() + v.sum()).backward()
    assert cost.flops.forward - inner.flops.forward == forward.get_total_flops()
    assert cost.flops.backward - inner.flops.backward == backward.get_total_flops()
    assert cost.flops.recompute == inner.flops.recompute
    assert cost.params - inner.params == sum(parameter.numel() for parameter in layer.parameters())
    assert sum(cost.terms.values()) == cost.flops.forward
    assert {"q_proj", "k_proj", "v_proj", "out_proj"} <= set(cost.terms)


def test_cost_of_a_decoded_token() -> None:
    layer = Attention(EMBED, HEADS, SlidingWindowAttention(3, is_causal=True), num_kv_heads=2)
    cost = layer.cost(BATCH, LENGTH, phase="decode", dtype=torch.float32)
    _, state = layer.step(tokens(), layer.init_state(BATCH))
    projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj)
    with FlopCounterMode(display=False) as counter:
        for projection in projections:
            projection(tokens(1))
    assert (
        sum(flops for name, flops in cost.terms.items() if name.endswith("_proj"))
        == counter.get_total_flops()
    )
    assert cost.state_bytes == state.nbytes
    with pytest.raises(ValueError, match="context_len"):
        layer.cost(BATCH, 1, context_len=LENGTH, phase="decode")


def saved_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """What autograd keeps of a call, parameters left out, each storage counted once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*inputs)
    return sum(storages.values())


@pytest.mark.parametrize("context_len", [None, 5])
def test_the_layer_saves_its_inputs_and_the_merged_heads(context_len: int | None) -> None:
    layer = Attention(EMBED, HEADS, SlidingWindowAttention(3), num_kv_heads=2)
    keys = LENGTH if context_len is None else context_len
    cost = layer.cost(BATCH, LENGTH, context_len=context_len, training=True, dtype=torch.float32)
    shape = Shape(BATCH, HEADS, LENGTH, keys, HEAD_DIM, num_kv_heads=2, dtype=torch.float32)
    inner = layer.mechanism.cost(shape, training=True)

    x = tokens()
    context = () if context_len is None else (tokens(context_len),)
    q, k, v = (torch.randn(BATCH, h, n, HEAD_DIM) for h, n in ((HEADS, LENGTH), (2, keys), (2, keys)))
    alone = saved_bytes(layer.mechanism, *(heads.requires_grad_() for heads in (q, k, v)))
    assert cost.saved_bytes - inner.saved_bytes == saved_bytes(layer, x, *context) - alone
    assert cost.peak_bytes >= inner.peak_bytes + shape.input_bytes


def test_cost_of_inference_has_no_backward() -> None:
    layer = Attention(EMBED, HEADS, FullAttention())
    cost = layer.cost(BATCH, LENGTH)
    assert cost.flops.backward == 0
    assert cost.saved_bytes == 0


def test_repr_says_the_sizes() -> None:
    layer = Attention(EMBED, HEADS, FullAttention(), num_kv_heads=2, rotary=rope)
    assert layer.extra_repr() == "24, num_heads=4, num_kv_heads=2, head_dim=6, rotary=rope"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"embed_dim": 0}, ValueError, "embed_dim"),
        ({"num_heads": 5}, ValueError, "num_heads must divide embed_dim = 24 .* got 5"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads = 4, got 3"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads"),
        ({"head_dim": 0}, ValueError, "head_dim"),
        ({"mechanism": FullAttention}, TypeError, "mechanism must be a Mechanism instance"),
        ({"rotary": 10000}, TypeError, "rotary"),
    ],
)
def test_constructor_refuses(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Attention(**{"embed_dim": EMBED, "num_heads": HEADS, "mechanism": FullAttention(), **arguments})


MASK, SEGMENTS = torch.ones(BATCH, LENGTH, dtype=torch.bool), torch.zeros(BATCH, LENGTH, dtype=torch.long)
LINFORMER = LinformerAttention(LENGTH, HEADS, rank=4)
SHORT, WIDE = torch.randn(BATCH, 5, EMBED), torch.randn(BATCH, LENGTH, EMBED + 1)


@pytest.mark.parametrize(
    ("layer", "arguments", "error", "words"),
    [
        ({}, {"x": WIDE}, ValueError, r"x must have shape \(batch, length, 24\)"),
        ({}, {"context": WIDE}, ValueError, "context must have shape"),
        ({}, {"context": SHORT[:1]}, ValueError, "context must have the batch size of x"),
        ({}, {"context": SHORT, "key_mask": MASK}, ValueError, r"key_mask must have shape .*\(2, 5\)"),
        ({}, {"context": SHORT, "segment_ids": SEGMENTS}, ValueError, "context .*segment_ids"),
        ({"rotary": rope}, {"context": SHORT}, ValueError, "context .*rotary"),
        ({"mechanism": FullAttention(is_causal=True)}, {"context": SHORT}, ValueError, "context .*causal"),
        ({}, {"key_mask": MASK.long()}, TypeError, "key_mask must be bool"),
        ({}, {"key_mask": MASK[:, 1:]}, ValueError, "key_mask must have shape"),
        ({}, {"segment_ids": SEGMENTS.float()}, TypeError, "segment_ids must be an integer"),
        ({}, {"segment_ids": SEGMENTS[:, 1:]}, ValueError, "segment_ids must have shape"),
        ({"mechanism": LINFORMER}, {"segment_ids": SEGMENTS}, ValueError, "segment_ids"),
    ],
)
def test_forward_refuses(layer: dict, arguments: dict, error: type[Exception], words: str) -> None:
    module = Attention(EMBED, HEADS, **{"mechanism": FullAttention(), **layer})
    with pytest.raises(error, match=words):
        module(**{"x": torch.randn(BATCH, LENGTH, EMBED), **arguments})


def test_step_refuses_a_state_that_is_not_the_layers() -> None:
    layer = Attention(EMBED, HEADS, FullAttention(is_causal=True))
    inner = layer.mechanism.init_state(BATCH, HEADS, HEAD_DIM)
    with pytest.raises(TypeError, match="state must be a LayerState"):
        layer.step(tokens(), inner)


@pytest.mark.parametrize("name", ["window", "linear"])
def test_decoding_compiles_once(name: str) -> None:
    torch._dynamo.reset()
    layer = Attention(EMBED, HEADS, CAUSAL[name](), rotary=rope)
    graphs: list[torch.fx.GraphModule] = []
    step = torch.compile(layer.step, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    x, state, outs = tokens(), layer.init_state(BATCH), []
    for token in x.split(1, dim=1):
        out, state = step(token, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), layer(x), atol=1e-6, rtol=1e-5)
    # The first is for position 0, the second for every later one.
    assert len(graphs) == 2
