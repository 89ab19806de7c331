"""Defects that let a query see its future, or stand in the wrong place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efficient_attn.masks import Everything
from efficient_attn.ops.problem import allowed_pairs
from efficient_attn.testing.sampling import expand_heads

from .defect import before_fast_path, broken, defect, everywhere, fast_path, kernel, preferred, with_mask


def favor_logarithms(p: Any) -> tuple[Tensor, Tensor]:
    """log phi(q) and log phi(k) of a Performer, without any stabiliser."""

    def log_phi(x: Tensor) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        return x @ p.feature_map.projection.to(x.dtype).mT - x.square().sum(-1, keepdim=True) / 2

    dtype = torch.float64 if p.q.dtype == torch.float64 else torch.float32
    return log_phi(p.q.to(dtype) * (p.scale * p.q.shape[3] ** 0.5)), log_phi(p.k.to(dtype))


@defect(
    "performer-pytorch 1.1.4, causal FAVOR+",
    "performer_causal",
    {"sees_no_future": r"outputs before \d+ with the future x1, torch.float32"},
    missed=("sends_no_gradient_to_the_future",),
)
def key_stabiliser_is_a_maximum_over_the_sequence(m):
    def run(p):
        log_q, log_k = favor_logarithms(p)
        phi_q = torch.exp(log_q - log_q.amax(-1, keepdim=True).detach()) + 1e-4
        return kernel(p, phi_q, torch.exp(log_k - log_k.amax((-1, -2), keepdim=True).detach()) + 1e-4)

    return fast_path(m, run)


@defect(
    "the usual repair of performer-pytorch's leak: a running maximum, taken chunk by chunk",
    "performer_causal",
    {"sees_no_future": r"x1, torch.float32: \d+ entries differ, by up to [\d.]+e-0[678]"},
    missed=("equals_its_matrix", "sends_no_gradient_to_the_future"),
)
def running_maximum_of_the_chunk_moves_the_past_by_an_ulp(m):
    def run(p):
        log_q, log_k = favor_logarithms(p)
        log_k = expand_heads(log_k, p.q.shape[1])
        position = torch.arange(log_k.shape[2]) + p.q_offset
        end_of_chunk = (position // 16 * 16 + 15).clamp(max=log_k.shape[2] - 1)[-log_q.shape[2] :]
        peak = log_k.detach().amax(-1).cummax(-1).values[:, :, end_of_chunk, None]
        phi_q = torch.exp(log_q - log_q.amax(-1, keepdim=True).detach())
        terms = phi_q[:, :, :, None] * torch.exp(log_k[:, :, None] - peak[..., None])
        weights = torch.where(allowed_pairs(p), terms.sum(-1), 0.0)
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
        return (weights @ expand_heads(p.v, p.q.shape[1]).to(weights.dtype)).to(p.q.dtype)

    return fast_path(m, lambda p: run(p) if p.q.shape[2] == p.k.shape[2] else m.backends[-1].run(p))


@defect(
    "linformer-pytorch 0.19.3, causal=True",
    "full_causal",
    {
        "matrix_is_lower_triangular": "above the diagonal",
        "sees_no_future": "outputs before",
        "sends_no_gradient_to_the_future": "gradient of",
        "prefix_equals_whole": "prefix of length",
        "equals_the_paper": "matrix",
    },
    missed=("equals_its_matrix",),
)
def causal_flag_is_ignored(m):
    return everywhere(m, lambda p: with_mask(Everything()))


@defect(
    "linformer-pytorch 0.19.3: compressed keys mix the sequence",
    "linformer",
    {
        "sees_no_future": "outputs before",
        "sends_no_gradient_to_the_future": "gradient of k",
        "prefix_equals_whole": "prefix",
    },
)
def linformer_claims_to_be_causal(m):
    m.is_causal = True
    return m


@defect(
    "contract: a query sees keys at or before its position",
    "window_causal",
    {"matrix_is_lower_triangular": "above the diagonal", "sees_no_future": "outputs before"},
    missed=("equals_its_matrix",),
)
def diagonal_is_off_by_one(m):
    return everywhere(m, lambda p: {"q_offset": p.q_offset + 1})


@defect(
    "contract: the gradient to the future is exactly zero",
    "linear_causal",
    {"sends_no_gradient_to_the_future": "gradient of v after 1"},
    missed=("sees_no_future",),
)
def gradient_reaches_the_future_through_a_straight_through_term(m):
    def run(p):
        mean = p.v.mean((1, 2), keepdim=True)
        return m_run(p) + (mean - mean.detach())

    m_run = preferred(m).run
    return fast_path(m, run)


@defect(
    "pytorch#108108: top-left causal alignment when L != S",
    "full_causal",
    {"equals_its_matrix": "output, 5 queries, 37 keys, q_offset None"},
    missed=("matrix_is_lower_triangular",),
)
def alignment_is_top_left_in_the_fast_path(m):
    def change(p):
        return {"q_offset": 0} if str(p.q_offset) == str(p.k.shape[2] - p.q.shape[2]) else {}

    return before_fast_path(m, change)


@defect(
    "pytorch#108108: top-left causal alignment when L != S",
    "linear_causal",
    {"some_queries_give_their_rows": "q_offset None"},
    missed=("equals_its_matrix", "matrix_is_lower_triangular", "stepping_equals_forward"),
)
def alignment_is_top_left_everywhere(m):
    cls = type(m)

    def _problem(self, q, k, v, key_mask, segment_ids, q_offset, attn_bias):
        q_offset = 0 if q_offset is None else q_offset
        return cls._problem(self, q, k, v, key_mask, segment_ids, q_offset, attn_bias)

    return broken(m, _problem=_problem)


@defect(
    "contract: q_offset says where the first query stands",
    "linear_causal",
    {"equals_its_matrix": "5 queries, 37 keys, q_offset 9"},
    missed=("prefix_equals_whole",),
)
def offset_is_ignored_in_the_fast_path(m):
    return before_fast_path(m, lambda p: {"q_offset": p.k.shape[2] - p.q.shape[2]})


@defect(
    "contract: q_offset says where the first query stands",
    "window",
    {"some_queries_give_their_rows": "q_offset 0", "equals_the_paper": "5 queries"},
    missed=("equals_its_matrix",),
)
def offset_is_ignored_everywhere(m):
    return everywhere(m, lambda p: {"q_offset": p.k.shape[2] - p.q.shape[2]})


@defect(
    "contract: q_offset may be a tensor, so that decoding does not recompile",
    "window",
    {"some_queries_give_their_rows": r"q_offset tensor"},
    missed=("stays_finite",),
)
def offset_tensor_is_taken_for_the_last_position(m):
    def change(p):
        return {"q_offset": p.k.shape[2] - p.q.shape[2]} if isinstance(p.q_offset, torch.Tensor) else {}

    return everywhere(m, change)
