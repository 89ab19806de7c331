"""What a declared peak leaves out: the scratch of torch's fused CPU kernel, and nothing else."""

from __future__ import annotations

import pytest
import torch

from efficient_attn import FullAttention, Shape
from efficient_attn.benchmarking.allocations import peak_allocated
from efficient_attn.ops.workspaces import FUSED_SCRATCH_BYTES


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_all_that_is_allocated_is_declared_but_for_the_scratch(length: int, training: bool) -> None:
    mechanism = FullAttention(is_causal=True)
    q, k, v = (torch.randn(1, 4, length, 64, requires_grad=training) for _ in range(3))
    grad = torch.randn(1, 4, length, 64)

    def work() -> None:
        with torch.set_grad_enabled(training):
            out = mechanism(q, k, v)
            if training:
                torch.autograd.grad(out, (q, k, v), grad)

    work()
    declared = mechanism.cost(
        Shape(1, 4, length, length, 64, dtype=torch.float32), training=training
    ).peak_bytes
    measured = peak_allocated(work)
    assert measured <= declared + torch.get_num_threads() * FUSED_SCRATCH_BYTES
    assert declared < 1.5 * measured
