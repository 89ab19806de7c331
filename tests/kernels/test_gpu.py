"""The kernels on a GPU: their laws, and what the interpreter is too slow for or computes wrongly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import SlidingWindowAttention
from efficient_attn.mechanisms import MECHANISMS, Mechanism
from efficient_attn.testing import within_budget
from efficient_attn.testing.laws.law import expect_identical
from efficient_attn.testing.sampling import HEAD_DIM, HEADS, LENGTH, poisoned_allocations

from . import judging
from .judging import DEVICE, KERNEL, NAMES, by_matrix, judge, judge_masked, on_the_kernel, run
from .laws import LAWS

# Memory is poisoned by torch's deterministic mode, whose warnings of torch's own operators are not ours to mend.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic")]

GPU = "cuda"
HALF = (torch.bfloat16, torch.float16)
MILLION = 1 << 20

SERVED = [name for name, cls in MECHANISMS.items() if any(b.name == KERNEL for b in cls.backends)]


def examples(seq_len: int, num_heads: int, head_dim: int) -> Iterator[tuple[str, Mechanism]]:
    """What the kernels serve, built for sequences of `seq_len`."""
    for name in SERVED:
        for number, example in enumerate(MECHANISMS[name].examples(seq_len, num_heads, head_dim)):
            if example.backend == "auto":
                yield f"{name}{number}", example


def each(
    seq_len: int, num_heads: int, head_dim: int, wanted: Callable[[Mechanism], bool] = lambda m: True
) -> Any:
    cases = [pytest.param(m, id=label) for label, m in examples(seq_len, num_heads, head_dim) if wanted(m)]
    return pytest.mark.parametrize("mechanism", cases)


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws, and what judges them, make their tensors on the GPU."""
    monkeypatch.setattr(judging, "DEVICE", GPU)


def random_inputs(
    length: int, head_dim: int, dtype: torch.dtype, *, heads: tuple[int, int] = (4, 2), v_head_dim: int = 0
) -> list[Tensor]:
    """q, k and v (1, heads, length, head_dim) on the GPU."""
    torch.manual_seed(length)
    sizes = ((heads[0], head_dim), (heads[1], head_dim), (heads[1], v_head_dim or head_dim))
    return [torch.randn(1, h, length, size, device=GPU).to(dtype) for h, size in sizes]


def must_be_chosen(m: Mechanism, inputs: list[Tensor], **masks: Any) -> None:
    said = m.explain(*inputs, **masks)
    assert f"{KERNEL}: chosen" in said, said


@pytest.mark.parametrize(
    ("mechanism", "law"),
    [
        pytest.param(m, law, id=f"{label}-{law.name}")
        for label, m in examples(LENGTH, HEADS, HEAD_DIM)
        for law in LAWS.values()
        if law.applies(m)
    ],
)
def test_laws(law: Any, mechanism: Mechanism, record_property: Any) -> None:
    record_property("laws", {f"{law.name}_on_a_gpu": law.run(mechanism)})


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(64, 64), (128, 128), (80, 96), (256, 256), (16, 64)])
@each(1000, 4, 64)
def test_error_at_every_head_size(
    mechanism: Mechanism, head_dim: int, v_head_dim: int, dtype: torch.dtype
) -> None:
    m = on_the_kernel(rebuilt(mechanism, 1000, head_dim), dtype)
    inputs = random_inputs(1000, head_dim, dtype, v_head_dim=v_head_dim)
    must_be_chosen(m, inputs)
    judge_masked(m, inputs, {}, f"1,000 tokens, head size {head_dim}, {dtype}")


def rebuilt(mechanism: Mechanism, seq_len: int, head_dim: int) -> Mechanism:
    """The same example for another head size."""
    made = type(mechanism).examples(seq_len, 4, head_dim)
    index = [str(m) for m in type(mechanism).examples(seq_len, 4, 64)].index(str(mechanism))
    return made[index]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("masked", [False, True])
@each(4096, 4, 64)
def test_error_at_4096_tokens(mechanism: Mechanism, masked: bool, dtype: torch.dtype) -> None:
    """The whole output and all gradients, against fp64."""
    m = on_the_kernel(mechanism, dtype)
    inputs = random_inputs(4096, 64, dtype)
    masks = {}
    if masked:
        mask = torch.rand(1, 4096, device=GPU) > 0.1
        mask[:, :100] = False
        masks["key_mask"] = mask
    must_be_chosen(m, inputs, **masks)
    judge_masked(m, inputs, masks, f"4,096 tokens, {dtype}")


def sampled(length: int, count: int) -> list[int]:
    """Rows: the first and the last ones, and some between."""
    between = torch.randint(0, length, (count - 4,), generator=torch.Generator().manual_seed(7)).tolist()
    return sorted({0, 1, length - 2, length - 1, *between})


def judge_rows(m: Mechanism, inputs: list[Tensor], rows: list[int], what: str) -> None:
    """Outputs at these rows, and the gradients of their sum alone, as `judge` would judge the whole."""

    def some_rows(m: Mechanism, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return m(q, k, v)[:, :, rows]

    def their_definition(m: Mechanism, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [by_matrix(m, q[:, :, row : row + 1], k, v, {"q_offset": row}) for row in rows]
        return torch.cat(parts, 2)

    judge(m, some_rows, their_definition, inputs, what)


@pytest.mark.parametrize("dtype", HALF)
@each(65_536, 2, 64)
def test_error_at_65536_tokens(mechanism: Mechanism, dtype: torch.dtype) -> None:
    m = on_the_kernel(mechanism, dtype)
    inputs = random_inputs(65_536, 64, dtype, heads=(2, 1))
    must_be_chosen(m, inputs)
    judge_rows(m, inputs, sampled(65_536, 24), f"65,536 tokens, {dtype}")


def of_a_million() -> Iterator[Any]:
    """What costs O(N): the patterns of fixed width, and linear attention."""
    built = {
        "sliding_window": {"window_size": 1024},
        "longformer": {"window_size": 256, "global_tokens": 2},
        "bigbird": {},
        "linear": {},
        "performer": {"head_dim": 64, "num_features": 128},
    }
    for name, options in built.items():
        yield pytest.param(MECHANISMS[name](**options, is_causal=True), id=name)


@pytest.mark.parametrize("mechanism", list(of_a_million()))
def test_a_million_tokens(mechanism: Mechanism) -> None:
    """Forward and backward within memory O(N); sampled rows err as little as plain torch."""
    m = on_the_kernel(mechanism, torch.bfloat16)
    inputs = [x.requires_grad_() for x in random_inputs(MILLION, 64, torch.bfloat16, heads=(4, 4))]
    must_be_chosen(m, inputs)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = m(*inputs)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    peak = torch.cuda.max_memory_allocated() - held
    made = sum(x.nbytes for x in (out, *grads))
    assert all(bool(torch.isfinite(x).all()) for x in (out, *grads))
    # Outputs, gradients, and at most as much again on the way.
    assert peak <= 2 * made, f"{peak / made:.2f} times the outputs and gradients"
    exact = copy.deepcopy(m).to(torch.float64)
    k, v = (x.detach() for x in inputs[1:])
    for row in sampled(MILLION, 8):
        q = inputs[0].detach()[:, :, row : row + 1]
        # The sum of all that came before is in fp32 here: no row is more than a million additions deep.
        seen = slice(0, row + 1)
        parts = q, k[:, :, seen], v[:, :, seen]
        truth = by_matrix(exact, *(x.double() for x in parts), {"q_offset": row})
        plain = by_matrix(m, *parts, {"q_offset": row})
        within_budget(out[:, :, row : row + 1].detach(), plain, truth, f"row {row}", mean=False)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@each(2048, 4, 64)
def test_bits_repeat(mechanism: Mechanism, dtype: torch.dtype) -> None:
    """Whatever the memory held and whatever ran in between, the same bits come out; so does every row of a batch."""
    m = on_the_kernel(mechanism, dtype)
    inputs = [x.expand(3, -1, -1, -1).contiguous() for x in random_inputs(2048, 64, dtype)]
    first = run(m, inputs)
    for length in (100, 2048, 3000):
        m(*random_inputs(length, 64, dtype))
    for _ in range(10):
        for name, a, b in zip(NAMES, run(m, inputs), first, strict=True):
            expect_identical(a, b, f"{name} again, {dtype}")
    for name, x in zip(NAMES, first, strict=True):
        expect_identical(x[1:], x[:1].expand_as(x[1:]), f"{name} of equal rows, {dtype}")


@each(2048, 4, 64, lambda m: m.is_causal)
def test_the_past_is_bit_identical(mechanism: Mechanism) -> None:
    for dtype in (torch.float32, *HALF):
        m = on_the_kernel(mechanism, dtype)
        inputs = random_inputs(2048, 64, dtype)
        before = m(*inputs)
        for cut in (1, 64, 1000, 2047):
            changed = [x.clone() for x in inputs]
            for x in changed:
                x[:, :, cut:] *= 100
            what = f"outputs before {cut}, {dtype}"
            expect_identical(m(*changed)[:, :, :cut], before[:, :, :cut], what)


@pytest.mark.parametrize("dtype", HALF)
@each(777, 4, 64)
def test_compiled_by_inductor(mechanism: Mechanism, dtype: torch.dtype) -> None:
    """torch.compile with its real backend gives the bits of eager, for several lengths."""
    m = on_the_kernel(mechanism, dtype)
    torch._dynamo.reset()
    compiled: Callable = torch.compile(m, fullgraph=True, dynamic=True)
    for length in (777, 1024):
        inputs = random_inputs(length, 64, dtype)
        # Without poisoned memory, for which compiled code would pay with other kernels.
        results = []
        for call in (compiled, m):
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = call(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        for name, a, b in zip(NAMES, *results, strict=True):
            expect_identical(a, b, f"{name} compiled, length {length}")


@each(512, 4, 64)
def test_autocast_to_bfloat16(mechanism: Mechanism) -> None:
    m = on_the_kernel(mechanism, torch.float32)
    inputs = random_inputs(512, 64, torch.float32)
    outside = run(m, inputs)
    with torch.autocast(GPU, dtype=torch.bfloat16):
        inside = run(m, inputs)
    for name, a, b in zip(NAMES, inside, outside, strict=True):
        assert a.dtype in (torch.float32, torch.bfloat16)
        assert (a.float() - b.float()).abs().max() <= 0.03 * b.abs().max(), name


def test_decoding_in_a_cuda_graph() -> None:
    """One token of linear attention is captured once and replayed: no step reads anything back to the host."""
    for name in ("linear", "performer"):
        for example in MECHANISMS[name].examples(LENGTH, HEADS, 64):
            if example.is_causal:
                replay_steps(on_the_kernel(example, torch.bfloat16))


def replay_steps(m: Mechanism) -> None:
    q, k, v = random_inputs(40, 64, torch.bfloat16)
    start = partial(m.init_state, 1, 2, 64, dtype=torch.bfloat16, device=GPU)
    token = [x[:, :, :1].clone() for x in (q, k, v)]
    with torch.no_grad():
        state, expected = start(), []
        for t in range(40):
            out, state = m.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
            expected.append(out)
        held: Any = start()
        tensors = [x for x in (held.kv, held.exponent) if x is not None]
        empty = [x.clone() for x in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                m.step(*token, copy.deepcopy(held))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, after = m.step(*token, held)
            for old, new in zip(
                tensors, (x for x in (after.kv, after.exponent) if x is not None), strict=True
            ):
                old.copy_(new)
        for old, zero in zip(tensors, empty, strict=True):
            old.copy_(zero)
        for t in range(40):
            for slot, x in zip(token, (q, k, v), strict=True):
                slot.copy_(x[:, :, t : t + 1])
            graph.replay()
            expect_identical(out, expected[t], f"token {t} in a graph")


@each(1000, 4, 64)
def test_a_call_in_a_cuda_graph(mechanism: Mechanism) -> None:
    """After one call of the same lengths, a call is captured and replayed with other inputs; its tables stay."""
    m = on_the_kernel(mechanism, torch.bfloat16)
    inputs, others = (random_inputs(1000, 64, torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        expected = m(*[x.mul_(-1) for x in others])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            m(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = m(*inputs)
        for length in range(100, 1000, 10):
            m(*random_inputs(length, 64, torch.bfloat16))
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
        graph.replay()
        expect_identical(out, expected, "output in a graph")


def test_the_default_device_changes_nothing() -> None:
    """Numbers for the host stay there, so that no call waits for the device."""
    m = on_the_kernel(SlidingWindowAttention(100, is_causal=True), torch.bfloat16)
    inputs = random_inputs(1000, 64, torch.bfloat16)
    expected = m(*inputs)
    with torch.device(GPU):
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = m(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    expect_identical(out, expected, "output under a default device")


def test_nothing_is_left_unwritten() -> None:
    """The fixture that poisons memory does so here: otherwise the tests above would prove less than they say."""
    with poisoned_allocations():
        assert bool(torch.empty(1000, device=GPU).isnan().all())
    assert DEVICE == "cpu" and judging.DEVICE == GPU
