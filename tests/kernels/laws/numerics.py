"""Determinism, range and dropout of a kernel."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from efficient_attn.mechanisms import Mechanism
from efficient_attn.testing.counting import untouched_rng
from efficient_attn.testing.laws.law import expect, expect_identical

from ..judging import NAMES, drawn, gaps, here, judge, judge_output, on_the_kernel, run
from .law import DTYPES, SHORT, law


@law()
def kernel_repeats_bit_for_bit(mechanism: Mechanism) -> int:
    """The same call gives the same bits from memory that held anything, whatever was called in between."""
    m, mask = on_the_kernel(mechanism, torch.float32), gaps(SHORT)
    inputs = drawn(m, torch.float32, SHORT)
    first = run(partial(m, key_mask=mask), inputs)
    m(*drawn(m, torch.float32, 9))
    for name, a, b in zip(NAMES, run(partial(m, key_mask=mask), inputs), first, strict=True):
        expect_identical(a, b, f"{name} again")
    return 1


@law()
def kernel_stays_finite(mechanism: Mechanism) -> int:
    """Inputs at 1000 times their scale, and at the largest that the mechanism declares, give finite results."""
    cases = 0
    for dtype in DTYPES:
        m = on_the_kernel(mechanism, dtype)
        for factor in (x for x in (1000.0, 65504.0) if x <= m.largest_input):
            inputs = [(x.clamp(-1, 1) * factor).to(dtype) for x in drawn(m, torch.float64, SHORT)]
            leaves = [x.requires_grad_() for x in inputs]
            out = m(*leaves)
            expect(bool(torch.isfinite(out).all()), f"output at scale {factor:g}, {dtype}")
            # Small, so that products of inputs and gradients fit the dtype that holds them.
            grads = torch.autograd.grad(out, leaves, torch.full_like(out, 1e-4))
            for name, grad in zip("qkv", grads, strict=True):
                expect(bool(torch.isfinite(grad).all()), f"gradient of {name} at scale {factor:g}, {dtype}")
            cases += 1
    return cases


@law()
def kernel_cancels_nothing_far_from_zero(mechanism: Mechanism) -> int:
    """With queries and keys around -6, where elu + 1 in half precision is 0, outputs err no more than plain torch."""
    m = on_the_kernel(mechanism, torch.float16)
    q, k, v = drawn(m, torch.float16)
    judge_output(m, m, [q - 6, k - 6, v], {}, "queries and keys around -6")
    return 1


@law()
def kernel_leaves_random_state_alone(mechanism: Mechanism) -> int:
    """Without dropout no random number is drawn; what is computed in inference mode has the same bits."""
    m = on_the_kernel(mechanism, torch.float32)
    inputs = drawn(m, torch.float32, SHORT)
    with untouched_rng("in evaluation"):
        first = m(*inputs)
    with torch.inference_mode():
        expect_identical(m(*inputs), first, "in inference mode")
    return 2


def _has_dropout(mechanism: Mechanism) -> bool:
    return mechanism.dropout_p is not None


def _dropping(mechanism: Mechanism, p: float) -> Mechanism:
    m = on_the_kernel(mechanism, torch.float32).train()
    m.dropout_p = p
    return m


@law(_has_dropout)
def kernel_drops_its_share(mechanism: Mechanism) -> int:
    """Dropout keeps a share of 1 - p within five standard deviations, each 1 / (1 - p) as large; a seed repeats it."""
    m = _dropping(mechanism, 0.3)
    q, k, _ = drawn(m, torch.float32, SHORT)
    weights = m.matrix(q, k)
    # With one-hot values the output is the matrix after dropout.
    v = here(torch.eye(SHORT)).expand(*k.shape[:2], -1, -1)
    pairs = kept = 0
    outputs = []
    for seed in (0, 0, 1, 2):
        torch.manual_seed(seed)
        outputs.append(m(q, k, v))
        alive = outputs[-1] != 0
        difference = (outputs[-1] - weights / 0.7)[alive].abs().max()
        expect(difference.item() < 1e-5, f"what was kept is off by {difference:.3g}")
        pairs += int((weights > 0).sum())
        kept += int(alive.sum())
    expect_identical(outputs[0], outputs[1], "the same seed")
    expect(not torch.equal(outputs[0], outputs[2]), "another seed dropped the same weights")
    spread = (0.3 * 0.7 / pairs) ** 0.5
    expect(
        abs(kept / pairs - 0.7) <= 5 * spread, f"kept {kept / pairs:.4f} of {pairs}, 5 sigma {5 * spread:.4f}"
    )
    return 4


@law(_has_dropout)
def kernel_drops_alike_backwards(mechanism: Mechanism) -> int:
    """The gradients under dropout are those of the weights that were kept, and the same under checkpointing."""
    m = _dropping(mechanism, 0.3)
    q, k, v = (x.requires_grad_() for x in drawn(m, torch.float32, SHORT))
    eye = here(torch.eye(SHORT)).expand(*k.shape[:2], -1, -1)
    torch.manual_seed(3)
    with torch.no_grad():
        kept = m(q, k, eye) != 0

    def dropped(m: Mechanism, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.where(kept, m.matrix(q, k) / 0.7, 0.0)
        return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    def seeded(m: Mechanism, *inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return m(*inputs)

    judge(m, seeded, dropped, [q.detach(), k.detach(), v.detach()], "dropout of 0.3")
    results = []
    for call in (m, partial(checkpoint, m, use_reentrant=False)):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(call(q, k, v).sum(), (q, k, v)))
    for name, a, b in zip("qkv", *results, strict=True):
        expect_identical(a, b, f"gradient of {name} under checkpointing")
    return 2
