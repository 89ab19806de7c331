"""`count_flops` counts what torch's counter leaves out, and says what it cannot count."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from efficient_attn import MECHANISMS, Attention, FullAttention, Shape, count_flops

BATCH, HEADS, LENGTH, SIZE = 2, 4, 33, 8
PAIRS = BATCH * HEADS * LENGTH**2


def heads(device: str = "cpu", count: int = HEADS) -> torch.Tensor:
    return torch.zeros(BATCH, count, LENGTH, SIZE, device=device, requires_grad=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [HEADS, 1])
def test_sdpa_counts_every_pair_on_a_cpu_too(device: str, is_causal: bool, kv_heads: int) -> None:
    q, k = heads(device), heads(device, kv_heads)

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, is_causal=is_causal, enable_gqa=kv_heads != HEADS)

    assert count_flops(forward).total == 4 * PAIRS * SIZE
    # torch's kernel on a CPU computes the scores once more, its products on meta tensors do not.
    recomputed = 2 * PAIRS * SIZE if device == "cpu" else 0
    assert count_flops(lambda: forward().sum().backward()).total == 12 * PAIRS * SIZE + recomputed


def test_torch_itself_counts_nothing_there() -> None:
    q = heads()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        F.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 0, "if torch counts now, its own formula is the one to use"


def test_counting_teaches_torch_nothing() -> None:
    before = set(flop_registry)
    count_flops(FullAttention(), heads(), heads(), heads())
    assert set(flop_registry) == before


def test_products_with_vectors_and_in_place_are_counted() -> None:
    a, b, x = torch.zeros(5, 7), torch.zeros(7, 3), torch.zeros(7)
    batch = torch.zeros(2, 5, 7)
    for run, flops in (
        (lambda: a @ x, 2 * 5 * 7),
        (lambda: x @ x, 2 * 7),
        (lambda: torch.vdot(x, x), 2 * 7),
        (lambda: torch.zeros(5).addmv_(a, x), 2 * 5 * 7),
        (lambda: torch.zeros(5, 3).addmm_(a, b, beta=0.5), 2 * 5 * 7 * 3),
        (lambda: torch.addr(torch.zeros(7, 5), x, torch.zeros(5)), 2 * 7 * 5),
        (lambda: torch.addbmm(torch.zeros(5, 5), batch, batch.mT), 2 * 2 * 5 * 7 * 5),
        (lambda: torch.einsum("bij,kj->bik", batch, a), 2 * 2 * 5 * 7 * 5),
        (lambda: torch.softmax(a, 0).cumsum(0) + F.layer_norm(a, (7,)) + F.silu(a) + F.gelu(a), 0),
    ):
        assert count_flops(run).total == flops, flops


@torch.library.custom_op("count_flops_test::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x @ x


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("count_flops_test::square", lambda: square(torch.zeros(3, 3))),
        ("aten::mkldnn_rnn_layer|aten::lstm", lambda: nn.LSTM(4, 5)(torch.zeros(3, 2, 4))),
        ("aten::_cdist_forward", lambda: torch.cdist(torch.zeros(2, 3), torch.zeros(2, 3))),
        ("aten::linalg_inv_ex", lambda: torch.linalg.inv(torch.eye(3))),
        ("aten::_fft_r2c", lambda: torch.fft.fft(torch.zeros(4))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_formula_is_named(name: str, run) -> None:
    with pytest.raises(NotImplementedError, match=name):
        count_flops(run)
    counted = count_flops(run, strict=False)
    assert list(counted.unknown.values()) == [1]
    assert counted.by_operator.get(next(iter(counted.unknown))) is None


def test_a_model_forward_and_backward() -> None:
    width, tokens = 16, BATCH * LENGTH
    layer = Attention(width, 2, FullAttention())
    model = nn.Sequential(layer, nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
    x = torch.zeros(BATCH, LENGTH, width)
    products = 2 * tokens * (4 + 6) * width**2
    attention = 4 * BATCH * LENGTH**2 * width
    assert count_flops(model, x).total == products + attention
    # Nobody asks for the gradient of x: three of the products have no backward pass of their own with respect to it.
    step = count_flops(lambda: model(x).sum().backward()).total
    assert step == 3 * products - 3 * 2 * tokens * width**2 + attention * 14 // 4
    with pytest.raises(TypeError, match="run must be a module or a function"):
        count_flops(x)


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_our_mechanisms_are_counted_as_declared(name: str, device: str) -> None:
    for mechanism in MECHANISMS[name].examples(LENGTH, HEADS, SIZE):
        mechanism = mechanism.to(device)
        q = [heads(device).detach().requires_grad_() for _ in range(3)]
        backend = mechanism._default_backend() if mechanism.backend == "auto" else mechanism.backend
        if name == "flash" and mechanism.backend == "auto":
            backend = "sdpa_flash" if device == "cpu" else "blocked"
        shape = Shape(BATCH, HEADS, LENGTH, LENGTH, SIZE, dtype=torch.float32)
        declared = mechanism.cost(shape, training=True, basis="torch", backend=backend).flops
        counted = count_flops(lambda m=mechanism, q=q: m(*q)).total
        assert counted == declared.forward, f"{mechanism} on {device}"
        step = count_flops(lambda m=mechanism, q=q: m(*q).sum().backward()).total
        recomputed = mechanism.cost(shape, training=True, basis="hardware", backend=backend).flops.recompute
        unfused = device == "meta" and backend == "sdpa"
        assert step == declared.total - unfused * recomputed, f"{mechanism} on {device}"
