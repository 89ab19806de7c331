"""Operators whose tiles, parts, slabs, chunks and blocks are so small that short sequences have many of each.

Nothing here imports a budget by value: operators look them up when they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from efficient_attn.feature_maps import Exp, SquaredRelu
from efficient_attn.masks import tile_groups
from efficient_attn.mechanisms import (
    MECHANISMS,
    BigBirdAttention,
    LinearAttention,
    LinearMechanism,
    Mechanism,
    SoftmaxMechanism,
)
from efficient_attn.ops import scan, tiles
from efficient_attn.testing.laws.law import expect_close
from efficient_attn.testing.sampling import (
    HEAD_DIM,
    HEADS,
    expand_heads,
    holes,
    in_dtype,
    poisoned_allocations,
    sample,
)

LENGTH, BATCH = 53, 3

TILES = ((8, 16, 1000), (8, 12, 1), (5, 1024, 1 << 19), (5, 1024, 1 << 13), (64, 7, 2000))
"""Rows and keys of a tile, scores in flight: slabs of heads, single tiles of one head, several tiles at a time."""

CHUNKS = ((4, 1), (8, 400), (3, 72))
"""Rows of a chunk, rows in flight: a chunk at a time, all of them, some of them."""


class Squares(SquaredRelu):
    """A map of somebody else's, which operators do not know."""


class Exponentials(Exp):
    """Another."""


def mechanisms(family: type[Mechanism]) -> Iterator[tuple[str, Mechanism]]:
    for name, cls in MECHANISMS.items():
        for number, example in enumerate(cls.examples(LENGTH, HEADS, HEAD_DIM)):
            fast = any(backend.name in ("blocked", "chunked") for backend in example.backends)
            if isinstance(example, family) and fast and not (name == "flash" and example.backend == "auto"):
                yield f"{name}{number}", example
    if family is LinearMechanism:
        for number, phi in enumerate((Squares(), Exponentials())):
            for is_causal in (False, True):
                m = LinearAttention(is_causal=is_causal)
                m.feature_map = phi
                yield f"foreign{number}{'-causal' * is_causal}", m


def of(family: type[Mechanism]) -> list:
    return [pytest.param(m, id=label) for label, m in mechanisms(family)]


@pytest.fixture(params=TILES, ids=str)
def small_tiles(request, monkeypatch) -> None:
    for name, value in zip(("TILE_ROWS", "TILE_KEYS", "BATCH_SCORES"), request.param, strict=True):
        monkeypatch.setattr(tiles, name, value)


@pytest.fixture(params=CHUNKS, ids=str)
def small_chunks(request, monkeypatch) -> None:
    for name, value in zip(("CHUNK", "BLOCK_ROWS"), request.param, strict=True):
        monkeypatch.setattr(scan, name, value)


def inputs(m: Mechanism, q_len: int, kv_len: int) -> tuple[Tensor, ...]:
    """Queries, keys and values whose scores, and whose features' exponents, rise and fall along the sequence."""
    q, k, v = sample(m, q_len, kv_len, batch=BATCH)
    wave = 1.5 + torch.sin(torch.arange(kv_len) / 7)[:, None]
    if isinstance(m, SoftmaxMechanism):  # some scores beyond what exp2 can hold
        q = q * torch.where(torch.arange(q_len) % 5 == 2, 400.0, 1.0)[:, None]
    return tuple(x.detach().requires_grad_() for x in (q, k * wave, v))


def far_apart(m: Mechanism, q_len: int, kv_len: int) -> tuple[Tensor, ...]:
    """The same, but stretches of keys are so large that the weights of the others vanish beside theirs."""
    q, k, v = inputs(m, q_len, kv_len)
    factors = torch.where(torch.arange(kv_len) // 10 % 2 == 1, 1.0, 100.0)[:, None]
    return q, (k * factors).detach().requires_grad_(), v


def situations(m: Mechanism) -> Iterator[tuple[int, int, dict]]:
    mask = holes(LENGTH, batch=BATCH)
    mask[1] = False  # one row has nothing to attend to
    yield LENGTH, LENGTH, {}
    yield LENGTH, LENGTH, {"key_mask": mask}
    yield 21, LENGTH, {"q_offset": 19}
    yield LENGTH, 23, {"q_offset": -4}
    yield 9, LENGTH, {"q_offset": LENGTH - 4, "key_mask": mask}
    if m.supports_segments:
        ids = (holes(LENGTH, 2, BATCH).cumsum(1) // 9) - holes(LENGTH, 3, BATCH).logical_not().long()
        yield LENGTH, LENGTH, {"segment_ids": ids, "key_mask": mask}
        yield 30, LENGTH, {"segment_ids": ids % 3, "q_offset": 11}


def compare(
    m: Mechanism,
    q_len: int,
    kv_len: int,
    masks: dict,
    *,
    make: Callable[..., tuple[Tensor, ...]] = inputs,
    create_graph: bool = False,
) -> None:
    q, k, v = make(m, q_len, kv_len)
    what = f"{q_len} queries, {kv_len} keys, {list(masks)}"
    with poisoned_allocations():
        out = m(q, k, v, **masks)
        expected = m.matrix(q, k, **masks) @ expand_heads(v, q.shape[1])
        expect_close(out, expected, f"output, {what}")
        weight = torch.randn(out.shape, dtype=out.dtype)
        actual = torch.autograd.grad(out, (q, k, v), weight, create_graph=create_graph)
        wanted = torch.autograd.grad(expected, (q, k, v), weight)
    for name, a, b in zip("qkv", actual, wanted, strict=True):
        expect_close(a, b, f"gradient of {name}, {what}", 1e-8)


def compare_all(mechanism: Mechanism, make: Callable[..., tuple[Tensor, ...]] = inputs) -> None:
    m = in_dtype(mechanism, torch.float64)
    for q_len, kv_len, masks in situations(m):
        compare(m, q_len, kv_len, masks, make=make)


def test_aligned_blocks_in_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TILE_ROWS", 8), ("BATCH_SCORES", 1 << 13)):
        monkeypatch.setattr(tiles, name, value)
    m = BigBirdAttention(block_size=8, num_random_blocks=2)
    walked = tile_groups(m.mask, 0, 200, 200, tiles.TILE_ROWS, tiles.TILE_KEYS)
    assert any(group.key_blocks and len(group.tiles) > 12 for group in walked)
    compare(in_dtype(m, torch.float64), 200, 200, {})


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mechanism", of(SoftmaxMechanism))
def test_tiles(mechanism):
    compare_all(mechanism)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("mechanism", of(LinearMechanism))
def test_chunks(mechanism):
    compare_all(mechanism)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "mechanism", [m for m in of(LinearMechanism) if m.values[0].feature_map.has_exponent]
)
def test_exponents_far_apart(mechanism):
    compare_all(mechanism, far_apart)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("mechanism", of(LinearMechanism))
def test_gradients_with_a_graph(mechanism):
    m = in_dtype(mechanism, torch.float64)
    compare(m, LENGTH, LENGTH, {"key_mask": holes(LENGTH, batch=BATCH)}, create_graph=True)
    compare(m, 21, LENGTH, {"q_offset": 19}, create_graph=True)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("mechanism", [m for m in of(LinearMechanism) if m.values[0].is_causal])
@pytest.mark.parametrize("make", [inputs, far_apart])
def test_steps(make, mechanism):
    m, mask = in_dtype(mechanism, torch.float64), holes(LENGTH, batch=BATCH)
    q, k, v = (x.detach() for x in make(m, LENGTH, LENGTH))
    state = m.init_state(BATCH, k.shape[1], k.shape[3], v_head_dim=v.shape[3], dtype=k.dtype)
    outputs = []
    for part in torch.arange(LENGTH).split([1, 17, 9, 1, 25]):
        out, state = m.step(q[:, :, part], k[:, :, part], v[:, :, part], state, key_mask=mask[:, part])
        outputs.append(out)
    expect_close(torch.cat(outputs, 2), m(q, k, v, key_mask=mask), "steps")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mechanism", of(SoftmaxMechanism)[::4])
def test_dropout_is_the_same_in_the_backward_pass(mechanism):
    m = in_dtype(mechanism, torch.float64).train()
    m.dropout_p = 0.4
    q, k, v = (x.detach().requires_grad_() for x in sample(m, 23, batch=2))
    mask = holes(23)

    def seeded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        return m(q, k, v, key_mask=mask)

    # Without an exception, because its message takes a slow check of every entry.
    assert torch.autograd.gradcheck(seeded, (q, k, v), fast_mode=True, raise_exception=False)


def scan_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    segment: Tensor | None,
    reverse: bool,
) -> Tensor:
    length = q.shape[3]
    see = torch.ones(length, length, dtype=torch.bool).tril()
    see = (see.mT if reverse else see).expand(q.shape[0], 1, length, length)
    if segment is not None:
        see = see & (segment[:, None, :, None] == segment[:, None, None, :])
    weights = torch.zeros(1, dtype=q.dtype)
    if a is not None and b is not None:
        weights = a[..., :, None] + b[..., None, :]
    weights = torch.exp2(weights).where(see, 0.0)
    return torch.einsum("bhgim,bhcjm,bhij,bhcje->bhgie", q, k, weights.expand(*q.shape[:2], -1, -1), v)


def running_maximum(b: Tensor, segment: Tensor | None, reverse: bool) -> Tensor:
    if reverse:
        flipped = None if segment is None else segment.flip(1)
        return running_maximum(b.flip(2), flipped, False).flip(2)
    rows = []
    for i in range(b.shape[2]):
        own = (
            torch.ones(len(b), i + 1).bool()
            if segment is None
            else segment[:, : i + 1] == segment[:, i, None]
        )
        rows.append(b[:, :, : i + 1].where(own[:, None], -torch.inf).amax(2))
    return torch.stack(rows, 2)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("segmented", [False, True], ids=["one", "segments"])
@pytest.mark.parametrize("exponents", [False, True], ids=["plain", "exponents"])
def test_scan_is_its_definition(exponents, segmented, reverse):
    for groups, copies, (size, values) in product((1, 3), (1, 2), ((3, 5), (6, 2))):
        if groups > 1 and copies > 1:
            continue
        q, k, v = (
            torch.randn(BATCH, 2, g, LENGTH, n, dtype=torch.float64, requires_grad=True)
            for g, n in ((groups, size), (copies, size), (copies, values))
        )
        segment = torch.randint(2, (BATCH, LENGTH)).mul(torch.rand(BATCH, LENGTH) < 0.3).cumsum(1)
        segment = segment if segmented else None
        b = torch.randint(-40, 40, (BATCH, 2, LENGTH)).double() if exponents else None
        a = None if b is None else -running_maximum(b, segment, reverse)
        with poisoned_allocations():
            actual = scan.scan(q, k, v, a, b, segment, reverse)
            expected = scan_by_definition(q, k, v, a, b, segment, reverse)
            expect_close(actual, expected, f"scan, {groups} groups, {copies} copies")
            weight = torch.randn_like(actual)
            pairs = (torch.autograd.grad(x, (q, k, v), weight) for x in (actual, expected))
            for name, x, y in zip("qkv", *pairs, strict=True):
                expect_close(x, y, f"gradient of {name}, {groups} groups, {copies} copies")
