"""A kernel is an operator like torch's own: compiled, checkpointed, under autocast, in steps, over any memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from efficient_attn.mechanisms import Mechanism
from efficient_attn.testing.laws.law import expect, expect_identical
from efficient_attn.testing.sampling import EQUAL, LENGTH

from ..judging import NAMES, by_matrix, drawn, gaps, here, judge, judge_output, on_the_kernel, run
from .law import DTYPES, SHORT, law


@law(lambda m: m.is_causal)
def kernel_steps_like_forward(mechanism: Mechanism) -> int:
    """Tokens given one by one or a few at a time have the outputs of the whole, padding and holes included."""
    cases = 0
    for dtype in DTYPES:
        m = on_the_kernel(mechanism, dtype)
        for mask in (None, gaps(LENGTH)):
            inputs = drawn(m, dtype)

            def decoded(
                q: Tensor, k: Tensor, v: Tensor, m: Mechanism = m, mask: Tensor | None = mask
            ) -> Tensor:
                return _decoded(m, q, k, v, mask, (1, 1, 14, 1, 1, 5, 1, 13))

            judge_output(m, decoded, inputs, {"key_mask": mask}, f"in steps, {dtype}")
            cases += 1
    return cases


@law(lambda m: m.is_causal)
def kernel_sends_gradients_through_steps(mechanism: Mechanism) -> int:
    """Outputs and gradients of tokens given a few at a time are those of the whole, through every state between."""
    m, mask = on_the_kernel(mechanism, torch.float32), gaps(LENGTH)

    def stepped(m: Mechanism, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _decoded(m, q, k, v, mask, (9, 1, 20, 7))

    def whole(m: Mechanism, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_matrix(m, q, k, v, {"key_mask": mask})

    judge(m, stepped, whole, drawn(m, torch.float32), "in steps")
    return 1


def _decoded(
    m: Mechanism, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sizes: tuple[int, ...]
) -> Tensor:
    state = m.init_state(
        k.shape[0], k.shape[1], k.shape[3], v_head_dim=v.shape[3], dtype=k.dtype, device=k.device
    )
    outputs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        key_mask = None if mask is None else mask[:, part]
        out, state = m.step(*(x[:, :, part] for x in (q, k, v)), state, key_mask=key_mask)
        outputs.append(out)
        start += size
    return torch.cat(outputs, 2)


@law()
def kernel_respects_autocast(mechanism: Mechanism) -> int:
    """Under autocast, inputs of either precision give the result, and the dtype, that they give outside it."""
    for dtype in DTYPES:
        m = on_the_kernel(mechanism, torch.float32)
        inputs = drawn(m, dtype, SHORT)
        outside = run(m, inputs)
        with torch.autocast(inputs[0].device.type, dtype=torch.float16):
            inside = run(m, inputs)
        for name, a, b in zip(NAMES, inside, outside, strict=True):
            expect(a.dtype in (dtype, torch.float16), f"{name} of {dtype} is {a.dtype}")
            error, bound = (a.double() - b.double()).abs().max(), 0.03 * b.double().abs().max()
            expect(
                bool(error <= bound), f"autocast moved {name} of {dtype} by {error:.3g}, allowed {bound:.3g}"
            )
    return len(DTYPES)


@law()
def kernel_compiles_to_one_graph(mechanism: Mechanism) -> int:
    """torch.compile(fullgraph=True, dynamic=True) gives every length the same bits from one graph."""
    m = on_the_kernel(mechanism, torch.float32)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled: Any = torch.compile(m, backend=counter, fullgraph=True, dynamic=True)
    for length in (SHORT, 17):
        inputs, mask = drawn(m, torch.float32, length), gaps(length)
        expected = run(lambda *x, mask=mask: m(*x, key_mask=mask), inputs)
        for name, a, b in zip(
            NAMES, run(lambda *x, mask=mask: compiled(*x, key_mask=mask), inputs), expected, strict=True
        ):
            expect_identical(a, b, f"{name}, length {length}")
    expect(counter.frame_count == 1, f"{counter.frame_count} graphs for two lengths")
    torch._dynamo.reset()
    return 2


@law()
def kernel_runs_again_under_checkpointing(mechanism: Mechanism) -> int:
    """Activation checkpointing changes no bit of outputs and gradients."""
    m = on_the_kernel(mechanism, torch.float32)
    inputs = drawn(m, torch.float32, SHORT)
    again = run(lambda *x: checkpoint(m, *x, use_reentrant=False), inputs)
    for name, a, b in zip(NAMES, again, run(m, inputs), strict=True):
        expect_identical(a, b, f"{name} under checkpointing")
    return 1


class _Calls(TorchDispatchMode):
    """The package's own operators that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "efficient_attn":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


@law()
def kernel_passes_opcheck(mechanism: Mechanism) -> int:
    """torch's own checks of an operator's schema, fake implementation and autograd hold for all that are called."""
    m, checked = on_the_kernel(mechanism, torch.float32), set()
    with _Calls() as calls:
        run(lambda *x: m(*x, key_mask=gaps(9)), drawn(m, torch.float32, 9))
        if m.is_causal:
            run(lambda *x: _decoded(m, *x, gaps(9), (4, 5)), drawn(m, torch.float32, 9))
    for operator, arguments in calls.made:
        if operator not in checked:
            checked.add(operator)
            torch.library.opcheck(operator, tuple(_fresh(a, operator) for a in arguments))
    expect(len(checked) >= 2, "no forward and backward operator was called")
    return len(checked)


def _fresh(argument: Any, operator: Any) -> Any:
    """A copy of an argument; the queries, keys and values of a forward operator ask for gradients."""
    if not isinstance(argument, Tensor):
        return argument
    heads = argument.is_floating_point() and argument.dim() == 4
    return argument.detach().clone().requires_grad_(heads and "backward" not in str(operator))


@law()
def kernel_reaches_far_memory(mechanism: Mechanism) -> int:
    """Rows more than 2^31 elements apart give, to the bit, what they give side by side: addresses are 64 bits wide."""
    m = on_the_kernel(mechanism, torch.float16)
    inputs = [x.contiguous() for x in drawn(m, torch.float16, SHORT, v_head_dim=EQUAL)]
    tensors = [*inputs, here(torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(8)).half())]
    apart, sizes = (1 << 31) + 8, [x[0].numel() for x in tensors]
    # Most of it is never touched, so that it takes addresses, not memory.
    memory = torch.empty(apart + sum(sizes), dtype=torch.float16, device=tensors[0].device)
    far = [
        memory.as_strided(x.shape, (apart, *x.stride()[1:]), sum(sizes[:number])).copy_(x)
        for number, x in enumerate(tensors)
    ]
    results = []
    for *qkv, grad in (far, tensors):
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = m(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for name, a, b in zip(NAMES, *results, strict=True):
        expect_identical(a, b, f"{name}, rows 2^31 elements apart")
    return 1
