"""Defects of a module of torch: random state, copies, tracing, autocast, shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efficient_attn import PerformerAttention
from efficient_attn.feature_maps import Favor, orthogonal_gaussian
from efficient_attn.ops.dense import safe_softmax
from efficient_attn.testing.sampling import expand_heads

from .defect import apply, broken, defect, fast_path, masked_scores


def redraw(feature_map: Favor) -> None:
    """Draw the projection from the global generator."""
    seed = int(torch.randint(1 << 30, ()))
    feature_map.projection.copy_(orthogonal_gaussian(feature_map.size, feature_map.head_dim, seed))


@defect(
    "fast-transformers 0.4.0: FAVOR redraws in evaluation",
    "performer",
    {
        "leaves_random_state_alone": "generator was used",
        "repeats_bit_for_bit": "output: .* entries differ",
    },
    missed=("equals_its_matrix",),
)
def projection_is_redrawn_in_evaluation(m):
    cls = type(m)

    def forward(self, q, k, v, **masks):
        redraw(self.feature_map)
        return cls.forward(self, q, k, v, **masks)

    return broken(m, forward=forward)


@defect(
    "performer-pytorch 1.1.4: redrawn every so many calls in training, apart on each rank",
    "performer",
    {"leaves_random_state_alone": "training", "training_is_evaluation_without_dropout": "output"},
    missed=("repeats_bit_for_bit",),
)
def projection_is_redrawn_in_training(m):
    cls = type(m)

    def forward(self, q, k, v, **masks):
        if self.training:
            redraw(self.feature_map)
        return cls.forward(self, q, k, v, **masks)

    return broken(m, forward=forward)


@defect(
    "performer-pytorch 1.1.4: cannot be initialised on meta",
    "performer",
    {"reset_parameters_fills_empty_memory": "projection: not finite"},
    missed=("runs_on_meta",),
)
def memory_from_to_empty_stays_empty(m):
    return broken(m, reset_parameters=lambda self: None)


class RedrawnOnLoad(PerformerAttention):
    """Draws a new projection when a state_dict has been loaded."""

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        result = super().load_state_dict(*arguments, **options)
        redraw(self.feature_map)
        return result


@defect(
    "projection redrawn on load",
    "performer",
    {"survives_copies": "state_dict: .* entries differ"},
    missed=("leaves_random_state_alone", "repeats_bit_for_bit"),
)
def projection_is_redrawn_on_load(m):
    m.__class__ = RedrawnOnLoad
    return m


@defect(
    "features that are not in the checkpoint",
    "performer",
    {"survives_copies": "state_dict: .* entries differ"},
    missed=("leaves_random_state_alone",),
)
def projection_is_not_in_the_state_dict(m):
    m.feature_map.register_buffer("projection", m.feature_map.projection, persistent=False)
    return m


class FromTheGlobalGenerator(PerformerAttention):
    """Draws its projection from the global generator, whatever its seed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        redraw(self.feature_map)


@defect(
    "performer-pytorch 1.1.4: features from the global generator differ between ranks",
    "performer",
    {"leaves_random_state_alone": "generator was used in construction"},
    missed=("repeats_bit_for_bit", "survives_copies"),
)
def projection_comes_from_the_global_generator(m):
    m.__class__ = FromTheGlobalGenerator
    redraw(m.feature_map)
    return m


def _dropped(p: Any, probability: float, rescale: bool, generator: torch.Generator | None = None) -> Tensor:
    weights = safe_softmax(masked_scores(p))
    kept = torch.rand(weights.shape, generator=generator) >= probability
    return apply(weights * kept / ((1 - probability) if rescale else 1), p)


@defect(
    "dropout that ignores eval()",
    "window",
    {"dropout_is_dropout": "evaluation"},
    missed=("equals_its_matrix", "leaves_random_state_alone"),
)
def dropout_acts_in_evaluation(m):
    return broken(m, _dropout=lambda self: self.dropout_p)


@defect(
    "dropout without 1 / (1 - p)",
    "full",
    {"dropout_is_dropout": "dropout changes the mean"},
    missed=("equals_its_matrix", "training_is_evaluation_without_dropout"),
)
def dropout_is_not_rescaled(m):
    return fast_path(m, lambda p: _dropped(p, p.dropout_p, rescale=False))


@defect(
    "dropout from a generator of its own: recomputation drops other weights",
    "full",
    {"works_under_checkpointing": "gradient of", "dropout_is_dropout": "the same seed"},
    missed=("equals_its_matrix",),
)
def dropout_has_its_own_generator(m):
    generator = torch.Generator().manual_seed(0)
    return fast_path(m, lambda p: _dropped(p, p.dropout_p, True, generator))


@defect(
    "dropout of another probability, rescaled by its own: unbiased, and not what was asked for",
    "full",
    {"dropout_keeps_its_share": "what dropout_p = 0.1 leaves"},
    missed=("dropout_is_dropout", "works_under_checkpointing"),
)
def dropout_probability_is_squared(m):
    return fast_path(m, lambda p: _dropped(p, p.dropout_p**2, rescale=True))


@defect(
    "dropout of whole heads: unbiased and rescaled, but not weight by weight",
    "full",
    {"dropout_keeps_its_share": "dropout_p = 0.1 kept"},
    missed=("dropout_is_dropout",),
)
def dropout_drops_whole_heads(m):
    def run(p):
        weights = safe_softmax(masked_scores(p))
        kept = torch.rand(*weights.shape[:2], 1, 1) >= p.dropout_p
        return apply(weights * kept / (1 - p.dropout_p), p)

    return fast_path(m, run)


@defect(
    "a cache that is filled under inference_mode",
    "linear",
    {"works_in_inference_mode": "Inference tensors cannot be saved for backward"},
    missed=("equals_its_matrix", "repeats_bit_for_bit"),
)
def cache_holds_inference_tensors(m):
    cls = type(m)

    def forward(self, q, k, v, **masks):
        if not hasattr(self, "cached"):
            self.cached = torch.ones((), dtype=v.dtype)
        return cls.forward(self, q, k, v * self.cached.to(v.dtype), **masks)

    return broken(m, forward=forward)


@defect(
    "a Python branch on data",
    "window",
    {
        "compiles_to_one_graph": "Unsupported|data-dependent",
        "exports": "data-dependent|Could not",
        "runs_on_meta": "meta",
    },
    missed=("equals_its_matrix", "stays_finite"),
)
def branches_on_data(m):
    cls = type(m)

    def forward(self, q, k, v, **masks):
        if q.numel() and bool(q.abs().max() > 1e30):
            raise OverflowError("q is too large")
        return cls.forward(self, q, k, v, **masks)

    return broken(m, forward=forward)


@defect(
    "pytorch#141486, attention-gym#187: a graph for every shape",
    "window",
    {"compiles_to_one_graph": "graphs for four lengths"},
    missed=("exports", "runs_on_meta"),
)
def recompiles_for_each_length(m):
    cls = type(m)

    def forward(self, q, k, v, **masks):
        out = cls.forward(self, q, k, v, **masks)
        return torch.cat([out[:, :, start : start + 16] for start in range(0, q.shape[2], 16)], 2)

    return broken(m, forward=forward)


@defect(
    "HF BigBird 5.23: CPU autocast crashes",
    "full",
    {"respects_autocast": "RuntimeError"},
    missed=("equals_its_matrix",),
)
def autocast_mixes_dtypes(m):
    def run(p):
        weights = safe_softmax(masked_scores(p)).to(p.q.dtype)
        out = torch.zeros(*p.q.shape[:3], p.v.shape[3], dtype=p.q.dtype)
        return out.index_add(2, torch.arange(p.q.shape[2]), weights @ expand_heads(p.v, p.q.shape[1]))

    return fast_path(m, run)


@defect(
    "performer-pytorch 1.1.4: batch 0 and length 0 raise",
    "window",
    {"takes_empty_inputs": r"RuntimeError: amax\(\)"},
    missed=("equals_its_matrix",),
)
def empty_inputs_raise(m):
    def run(p):
        scores = masked_scores(p)
        weights = torch.exp(scores - scores.amax().clamp(min=-1e30))
        total = weights.sum(-1, keepdim=True)
        return apply(weights / torch.where(total == 0, 1.0, total), p)

    return fast_path(m, run)


@defect(
    "linformer-pytorch 0.19.3: only N == input_size",
    "linformer",
    {"equals_its_matrix": "ValueError: k must have exactly 37 positions"},
)
def only_one_length_is_taken(m):
    cls = type(m)

    def _check_sizes(self, name, num_keys, num_kv_heads):
        if num_keys != self.max_seq_len:
            raise ValueError(f"{name} must have exactly {self.max_seq_len} positions, got {num_keys}")
        cls._check_sizes(self, name, num_keys, num_kv_heads)

    return broken(m, _check_sizes=_check_sizes)
