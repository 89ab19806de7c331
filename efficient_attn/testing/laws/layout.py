"""Where tensors lie in memory changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...mechanisms import Mechanism
from ..sampling import EQUAL, in_dtype, sample
from .law import expect_close, law

_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimension outside": lambda x: x.mT.contiguous().mT,
    "with gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "rows expanded from one": lambda x: x[:1].expand(x.shape),
    "all expanded from one number": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}
_FAR = (1 << 31) + 8


def _run(m: Mechanism, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = m(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def _compare(actual: list[Tensor], expected: list[Tensor], what: str, tolerance: float = 1e-9) -> None:
    for name, a, b in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
        expect_close(a, b, f"{name}, {what}", tolerance)


@law()
def layout_does_not_matter(mechanism: Mechanism) -> int:
    """Transposed, sliced and expanded inputs and output gradients give the same as contiguous ones."""
    m, cases = in_dtype(mechanism, torch.float64), 0
    inputs = sample(m)
    grad = torch.randn(m(*inputs).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    for what, layout in _LAYOUTS.items():
        strange = [layout(x) for x in inputs]
        plain = [x.clone(memory_format=torch.contiguous_format) for x in strange]
        _compare(_run(m, strange, grad), _run(m, plain, grad), f"inputs {what}")
        strange_grad = layout(grad)
        _compare(
            _run(m, list(inputs), strange_grad),
            _run(m, list(inputs), strange_grad.clone(memory_format=torch.contiguous_format)),
            f"output gradient {what}",
        )
        cases += 2
    return cases


@law()
def reaches_far_memory(mechanism: Mechanism) -> int:
    """Rows more than 2^31 elements apart give what they give side by side: addresses are 64 bits wide."""
    m = in_dtype(mechanism, torch.bfloat16)
    # Equal head sizes, so that fused kernels take part.
    inputs = [x.contiguous() for x in sample(m, dtype=torch.bfloat16, v_head_dim=EQUAL)]
    tensors = [*inputs, torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(8)).bfloat16()]
    sizes = [x[0].numel() for x in tensors]
    # Most of it is never touched, so that it takes addresses, not memory.
    memory = torch.empty(_FAR + sum(sizes), dtype=torch.bfloat16)
    far = []
    for number, x in enumerate(tensors):
        far.append(memory.as_strided(x.shape, (_FAR, *x.stride()[1:]), sum(sizes[:number])).copy_(x))
    _compare(_run(m, far[:3], far[3]), _run(m, inputs, tensors[3]), "rows 2^31 elements apart", 0.02)
    return 1
