"""Defects in padding, packing and the independence of batch rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from efficient_attn import Mechanism
from efficient_attn.ops.dense import safe_softmax
from efficient_attn.testing.sampling import expand_heads

from .defect import (
    apply,
    before_fast_path,
    broken,
    defect,
    everywhere,
    fast_path,
    kernel,
    masked_scores,
    preferred,
)


def without(mechanism: Mechanism, *names: str) -> Mechanism:
    """`mechanism` that takes these masks and never looks at them."""
    cls = type(mechanism)

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
        return cls.forward(self, q, k, v, **{n: mask for n, mask in masks.items() if n not in names})

    def matrix(self: Any, q: Tensor, k: Tensor, **masks: Any) -> Tensor:
        return cls.matrix(self, q, k, **{n: mask for n, mask in masks.items() if n not in names})

    return broken(mechanism, forward=forward, matrix=matrix)


@defect(
    "lucidrains/linformer 0.2.3: mask= disappears in **kwargs",
    "linformer",
    {
        "padding_content_is_invisible": "output with x1 at masked keys",
        "masked_keys_have_no_weight": "weight on a masked key",
        "padded_equals_unpadded": "output of 31 tokens",
        "nothing_to_attend_to_gives_zero": "not zero",
        "equals_the_paper": "key_mask",
    },
    missed=("equals_its_matrix",),
)
def key_mask_is_swallowed(m):
    return without(m, "key_mask")


@defect(
    "fla#1263, performer-pytorch 1.1.4: padding masks v, not k",
    "linear",
    {
        "masked_keys_have_no_weight": "weight on a masked key",
        "padded_equals_unpadded": "output of 31 tokens",
        "nothing_to_attend_to_gives_zero": "matrix of a fully masked row",
    },
    missed=("padding_content_is_invisible",),
)
def normaliser_counts_masked_keys(m):
    # The contract zeroes k and v at masked keys; elu(0) + 1 = 1 stays in the normaliser.
    return everywhere(m, lambda p: {"key_mask": None})


@defect(
    "fla#1263, in the fast path alone",
    "linear_causal",
    {"equals_its_matrix": "output, length 2, key_mask", "padded_equals_unpadded": "output of 31 tokens"},
    missed=("masked_keys_have_no_weight",),
)
def normaliser_of_the_fast_path_counts_masked_keys(m):
    return before_fast_path(m, lambda p: {"key_mask": None})


@defect(
    "the converse of fla#1263: padding masks the normaliser, not the sum",
    "linear",
    {"equals_its_matrix": "key_mask", "padding_content_is_invisible": "output with x1 at masked keys"},
)
def sum_counts_masked_keys(m):
    cls = type(m)

    def forward(self, q, k, v, *, key_mask=None, **masks):
        out = cls.forward(self, q, k, v, **masks)
        if key_mask is None:
            return out
        present = key_mask[:, None, :, None].expand(*k.shape[:3], 1).to(v.dtype)
        share = cls.forward(self, q, k, present, **masks)
        return torch.where(share == 0, 0.0, out / torch.where(share == 0, 1.0, share))

    return broken(m, forward=forward)


@defect(
    "torch.nn.MultiheadAttention's key_padding_mask: True = may NOT be attended",
    "window",
    {"masked_keys_have_no_weight": "weight on a masked key", "padded_equals_unpadded": "output"},
    missed=("rows_sum_to_one",),
)
def key_mask_has_the_opposite_polarity(m):
    return everywhere(m, lambda p: {} if p.key_mask is None else {"key_mask": ~p.key_mask})


@defect(
    "SDPA, HF Longformer: NaN padding spreads, because 0 * NaN is NaN",
    "window",
    {"padding_content_is_invisible": "output with NaN at masked keys, torch.float32: not finite"},
    missed=("equals_its_matrix", "padded_equals_unpadded"),
)
def nan_padding_spreads(m):
    def forward(self, q, k, v, **masks):
        return (self.matrix(q, k, **masks).to(v.dtype) @ expand_heads(v, q.shape[1])).to(q.dtype)

    return broken(m, forward=forward)


@defect(
    "contract: gradients too are those of the row without padding",
    "full",
    {"padding_content_is_invisible": "gradient of a masked v is not zero"},
    missed=("masked_keys_have_no_weight",),
)
def masked_values_get_a_gradient(m):
    cls = type(m)

    def forward(self, q, k, v, **masks):
        v = v.view_as(v)
        if v.requires_grad:
            v.register_hook(lambda grad: grad + 1)
        return cls.forward(self, q, k, v, **masks)

    return broken(m, forward=forward)


@defect(
    "torch.nn.MultiheadAttention, fast-transformers 0.4.0, pytorch#41508: NaN where everything is masked",
    "window",
    {"nothing_to_attend_to_gives_zero": "not zero", "equals_its_matrix": "not finite"},
)
def fully_masked_row_is_nan(m):
    return fast_path(m, lambda p: apply(masked_scores(p).softmax(-1), p))


@defect(
    "HF Longformer, SDPA under finfo.min masks: a fully masked sample returns content",
    "linformer",
    {"nothing_to_attend_to_gives_zero": "output of a fully masked row is not zero"},
)
def fully_masked_row_returns_content(m):
    cls = type(m)

    def forward(self, q, k, v, *, key_mask=None, **masks):
        if key_mask is not None:
            key_mask = key_mask | ~key_mask.any(1, keepdim=True)
        return cls.forward(self, q, k, v, key_mask=key_mask, **masks)

    return broken(m, forward=forward)


@defect(
    "finfo.min in place of -inf",
    "window",
    {"nothing_to_attend_to_gives_zero": "output of a fully masked row is not zero"},
    missed=("padded_equals_unpadded",),
)
def masked_scores_are_finfo_min(m):
    def run(p):
        # Shifting what the contract zeroed makes content of it, as it is where nothing is zeroed.
        weights = masked_scores(p, torch.finfo(torch.float32).min).softmax(-1)
        return apply(weights, replace(p, v=p.v + 1)) - 1

    return fast_path(m, run)


@defect(
    "contract: anchors count from each row's first valid key",
    "sinks",
    {"padded_equals_unpadded": "6 left", "equals_its_matrix": "key_mask"},
)
def left_padding_moves_the_sinks(m):
    def run(p):
        allowed = p.mask.dense(p.q.shape[2], p.k.shape[2], int(p.q_offset))
        if p.key_mask is not None:
            allowed = allowed & p.key_mask[:, None, None, :]
        return apply(
            safe_softmax(masked_scores(replace(p, mask=Everything())).masked_fill(~allowed, -torch.inf)), p
        )

    from efficient_attn.masks import Everything

    return fast_path(m, run)


@defect(
    "transformers#45811 and others: packed sequences are silently one document",
    "window_causal",
    {"packed_equals_separate": "document", "interleaved_segments_are_isolated": "a weight across segments"},
    missed=("equals_its_matrix",),
)
def segments_are_swallowed(m):
    return without(m, "segment_ids")


@defect(
    "contract: a mask that cannot be honoured is refused by name",
    "linformer",
    {"refuses_segments_by_name": "segment_ids was accepted"},
)
def segments_are_accepted_and_ignored(m):
    return without(m, "segment_ids")


@defect(
    "packing that resets once: only the last document is isolated",
    "linear_causal",
    {"packed_equals_separate": r"document 1 of \(10, 1, 20, 6\)"},
    missed=("equals_its_matrix",),
)
def only_the_last_document_is_isolated(m):
    def change(p):
        return (
            {} if p.segment_ids is None else {"segment_ids": (p.segment_ids == p.segment_ids[:, -1:]).long()}
        )

    return everywhere(m, change)


@defect(
    "cu_seqlens conventions: documents are assumed to come in order",
    "linear",
    {
        "packed_equals_separate": r"document \d of .*, ids descending",
        "interleaved_segments_are_isolated": "a weight across segments",
    },
)
def segment_ids_are_assumed_to_ascend(m):
    def change(p):
        return {} if p.segment_ids is None else {"segment_ids": p.segment_ids.cummax(1).values}

    return everywhere(m, change)


@defect(
    "contract: a negative segment is padding",
    "full",
    {"interleaved_segments_are_isolated": "a weight across segments"},
    missed=("packed_equals_separate",),
)
def negative_segments_are_a_document(m):
    return everywhere(m, lambda p: {} if p.segment_ids is None else {"segment_ids": p.segment_ids + 1})


@defect(
    "nystrom-attention 0.0.14: a maximum over the batch, and NaN that crosses it",
    "linear_exp",
    {"batch_neighbours_are_invisible": "beside a neighbour x20"},
    missed=("equals_its_matrix",),
)
def stabiliser_is_a_maximum_over_the_batch(m):
    def run(p):
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (p.q, p.k))
        return kernel(p, torch.exp(q - q.amax(-1, keepdim=True)), torch.exp(k - k.max()))

    return fast_path(m, run)


@defect(
    "nystrom-attention 0.0.14: one NaN poisons other samples",
    "window",
    {"batch_neighbours_are_invisible": "NaN: not finite"},
)
def nan_crosses_the_batch(m):
    def run(p):
        return m_run(p) + 0 * p.q.sum()

    m_run = preferred(m).run
    return fast_path(m, run)
