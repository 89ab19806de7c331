"""Defects in low precision, in range, in memory that nobody wrote, and in gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from efficient_attn.ops.dense import safe_softmax
from efficient_attn.ops.problem import allowed_pairs
from efficient_attn.testing.sampling import expand_heads

from .defect import apply, before_fast_path, defect, dense, everywhere, fast_path, kernel, masked_scores


@defect(
    "fla#1261: elu(x) + 1 cancels to 0 in bf16",
    "linear",
    {"cancels_nothing_far_from_zero": "output, torch.bfloat16: largest error"},
    missed=("equals_its_matrix", "passes_gradcheck"),
)
def elu_plus_one_cancels_in_bf16(m):
    def run(p):
        q, k = (torch.nn.functional.elu(x) + 1 for x in (p.q, p.k))
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
        k = k if p.key_mask is None else torch.where(p.key_mask[:, None, :, None], k, 0.0)
        return kernel(p, q, k)

    return fast_path(m, run)


@defect(
    "fast-transformers 0.4.0: bf16 and fp16 raise",
    "window",
    {"error_is_within_budget": "RuntimeError: expected", "padding_content_is_invisible": "RuntimeError"},
    missed=("equals_its_matrix",),
)
def half_precision_raises(m):
    return fast_path(
        m, lambda p: (safe_softmax(masked_scores(p)) @ expand_heads(p.v, p.q.shape[1])).to(p.q.dtype)
    )


@defect(
    "scores and weights kept in the dtype of the inputs",
    "full",
    {"error_is_within_budget": r"output, length \d+, torch.bfloat16"},
    missed=("equals_its_matrix",),
)
def scores_are_rounded(m):
    return fast_path(m, lambda p: apply(safe_softmax(masked_scores(p).to(p.q.dtype)), p))


@defect(
    "linear-attention-transformer 0.19.1: not finite at x1000",
    "linear_exp",
    {"stays_finite": "scale 30|scale 1000"},
    missed=("equals_its_matrix",),
)
def exponential_features_overflow(m):
    def run(p):
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (p.q, p.k))
        return kernel(p, torch.exp(q), torch.exp(k))

    return fast_path(m, run)


@defect(
    "performer-pytorch 1.1.4: fp16 gradients not finite",
    "full",
    {"stays_finite": "at scale 30.*float16|at scale 1000.*float16"},
    missed=("equals_its_matrix",),
)
def scores_overflow_fp16(m):
    def run(p):
        scores = (p.q @ expand_heads(p.k, p.q.shape[1]).mT) * p.scale
        return apply(safe_softmax(scores.masked_fill(~allowed_pairs(p), -torch.inf).float().to(p.q.dtype)), p)

    return fast_path(m, lambda p: run(p) if p.q.dtype == torch.float16 else dense(p))


@defect(
    "the practice of poisoning torch.empty (fla): rows that no block reached",
    "window",
    {"equals_its_matrix": "output, length 1: not finite"},
)
def last_rows_are_never_written(m):
    def run(p):
        out = torch.empty(*p.q.shape[:3], p.v.shape[3], dtype=p.q.dtype)
        whole = p.q.shape[2] // 16 * 16
        out[:, :, :whole] = dense(p)[:, :, :whole]
        return out

    return fast_path(m, run)


@defect(
    "a backward pass that forgets the normaliser",
    "linear_causal",
    {"equals_its_matrix": "gradient of k, length", "passes_gradcheck": "gradcheck failed"},
    missed=("sends_no_gradient_to_the_future", "repeats_bit_for_bit"),
)
def gradient_of_k_misses_the_normaliser(m):
    def run(p):
        q, k = (torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0))) for x in (p.q, p.k))
        weights = torch.where(allowed_pairs(p), q @ expand_heads(k, p.q.shape[1]).mT, 0.0)
        total = torch.where(allowed_pairs(p), q @ expand_heads(k.detach(), p.q.shape[1]).mT, 0.0).sum(
            -1, True
        )
        return apply(weights / torch.where(total == 0, 1.0, total), p)

    return fast_path(m, run)


@defect(
    "a detached tensor in code that every path shares",
    "full",
    {"passes_gradcheck": "gradcheck failed"},
    missed=("equals_its_matrix",),
)
def gradient_of_k_is_halved_everywhere(m):
    return everywhere(m, lambda p: {"k": (p.k + p.k.detach()) / 2})


@defect(
    "flash-attention#2244: deterministic=True is not",
    "full",
    {"repeats_bit_for_bit": r"output: \d+ entries differ, by up to \d\.?\d*e-0[678]"},
    missed=("equals_its_matrix", "error_is_within_budget"),
)
def sums_are_taken_in_any_order(m):
    calls = []

    def run(p):
        calls.append(None)
        shift = len(calls) % 7
        return apply(safe_softmax(masked_scores(p)).roll(shift, -1), replace(p, v=p.v.roll(shift, 2)))

    return fast_path(m, run)


@defect(
    "non-contiguous inputs read as if they were contiguous",
    "window",
    {"layout_does_not_matter": "output"},
    missed=("equals_its_matrix",),
)
def strides_are_ignored(m):
    def change(p):
        return {
            name: torch.as_strided(x, x.shape, _contiguous(x.shape)) for name, x in (("q", p.q), ("k", p.k))
        }

    return before_fast_path(m, change)


def _contiguous(shape: torch.Size) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return strides


@defect(
    "contract: addresses are 64 bits wide; a kernel with 32-bit offsets",
    "full",
    {"reaches_far_memory": r"output, rows 2\^31 elements apart"},
    missed=("layout_does_not_matter",),
)
def strides_wrap_at_31_bits(m):
    def wrapped(x: Tensor) -> Tensor:
        read = x.detach().as_strided(x.shape, [stride % (1 << 31) for stride in x.stride()])
        return x + (read - x.detach())

    return before_fast_path(m, lambda p: {"q": wrapped(p.q), "k": wrapped(p.k), "v": wrapped(p.v)})


class _TripledWithGraph(torch.autograd.Function):
    """The identity, whose gradient is three times too large if somebody will differentiate it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 3 if torch.is_grad_enabled() else grad


@defect(
    "a backward pass of its own for create_graph=True, which counted one tensor given as q, k and v three times",
    "full",
    {"gradients_do_not_depend_on_who_asks": "gradient of q with create_graph"},
    missed=("passes_gradcheck", "equals_its_matrix", "second_derivatives_are_right_or_refused"),
)
def gradients_are_others_with_create_graph(m):
    return before_fast_path(m, lambda p: {"q": _TripledWithGraph.apply(p.q)})


class _Exp(torch.autograd.Function):
    """exp, with a first derivative that has none itself."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.y = x.exp()
        return ctx.y.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.y


@defect(
    "contract: a second derivative is right or refused; here it is cut off inside",
    "full",
    {"second_derivatives_are_right_or_refused": "gradgradcheck failed"},
    missed=("passes_gradcheck", "equals_its_matrix"),
)
def second_derivative_is_cut_off(m):
    return before_fast_path(m, lambda p: {"q": _Exp.apply(p.q).log()})
