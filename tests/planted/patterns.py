"""Defects in what is seen, how it is weighed, and by which head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficient_attn.masks import (
    BlockWindow,
    Causal,
    Everything,
    GlobalTokens,
    Mask,
    RandomBlocks,
    Window,
    random_blocks,
)
from efficient_attn.ops.dense import safe_softmax

from .defect import (
    apply,
    before_fast_path,
    broken,
    defect,
    dense,
    everywhere,
    fast_path,
    masked_scores,
    preferred,
    problem_of,
    with_mask,
)


@defect(
    'local-attention 1.11.2: an "exact" window of 8 shows 9 keys',
    "window",
    {"equals_the_paper": "matrix"},
    missed=("equals_its_matrix", "rows_sum_to_one"),
)
def window_is_one_too_wide(m):
    return everywhere(m, lambda p: with_mask(Window(m.window_size + 1)))


@defect(
    "contract: |i - j| < window_size",
    "window_causal",
    {"equals_its_matrix": "output, length 7", "stepping_equals_forward": "chunks"},
)
def window_of_the_fast_path_is_one_too_narrow(m):
    return before_fast_path(m, lambda p: with_mask(Window(m.window_size - 1) & Causal()))


@defect(
    "local-attention: without exact_windowsize, a window of W shows up to 2 W keys",
    "window_causal",
    {"equals_the_paper": "matrix", "stepping_equals_forward": "chunks"},
    missed=("equals_its_matrix", "sees_no_future", "rows_sum_to_one"),
)
def window_is_rounded_to_blocks(m):
    return everywhere(m, lambda p: with_mask(BlockWindow(m.window_size, 3) & Causal()))


@defect(
    "local-attention 1.11.2: keys padded to a multiple of the block are visible to the tail rows",
    "full",
    {"equals_its_matrix": "output, length 1: off by"},
)
def tail_rows_see_the_padding_to_a_block(m):
    def run(p):
        missing = -p.k.shape[2] % 16
        scores = torch.nn.functional.pad(masked_scores(p), (0, missing))
        return apply(safe_softmax(scores)[..., : p.k.shape[2]], p)

    return fast_path(m, run)


@dataclass(frozen=True)
class FirstQuarter(RandomBlocks):
    """Random blocks drawn from the first quarter of the sequence only."""

    def choices(self, row_blocks: Tensor) -> Tensor:
        most = torch.as_tensor(self.num_blocks).div(4, rounding_mode="floor").clamp(min=self.count)
        return random_blocks(row_blocks, count=self.count, seed=self.seed, num_choices=most)


@defect(
    "transformers#16566: BigBird's random blocks come from the first 1024 tokens",
    "bigbird",
    {"random_draws_are_uniform": "not uniform"},
    missed=("equals_its_matrix", "equals_the_paper"),
)
def random_blocks_come_from_the_first_part(m):
    def mask() -> Mask:
        band = BlockWindow(m.block_size, 3) | GlobalTokens.first(m.block_size)
        return band | FirstQuarter(m.block_size, m.num_random_blocks, m.seed, False)

    def random_block_choices(self: Any, block: int, num_blocks: int) -> tuple[int, ...]:
        drawn = FirstQuarter(self.block_size, self.num_random_blocks, self.seed, False, num_blocks)
        return tuple(drawn.choices(torch.tensor(block)).tolist())

    everywhere(m, lambda p: with_mask(mask()))
    return broken(m, random_block_choices=random_block_choices)


@defect(
    "HF BigBird: random blocks drawn anew in each forward, from the global generator",
    "bigbird",
    {
        "leaves_random_state_alone": "generator was used",
        "repeats_bit_for_bit": "output: .* entries differ",
        "equals_its_matrix": "output",
    },
)
def random_blocks_are_redrawn_from_the_global_generator(m):
    def change(p):
        seed = int(torch.randint(1000, ()))
        return with_mask(BlockWindow(4, 3) | GlobalTokens.first(4) | RandomBlocks(4, 2, seed, False))

    return everywhere(m, change)


@defect(
    "HF BigBird 5.23: training reseeds the global NumPy generator",
    "bigbird",
    {"leaves_random_state_alone": "NumPy.s global random generator was used in training"},
    missed=("repeats_bit_for_bit", "equals_its_matrix"),
)
def numpy_is_reseeded_in_training(m):
    cls = type(m)

    def forward(self, q, k, v, **masks):
        if self.training:
            np.random.seed(self.seed)
        return cls.forward(self, q, k, v, **masks)

    return broken(m, forward=forward)


@defect(
    "HF BigBird 5.23: a short input switches the module to full attention for ever",
    "window",
    {"repeats_bit_for_bit": "after other lengths"},
    missed=("padded_equals_unpadded",),
)
def short_input_switches_to_full_attention_for_ever(m):
    cls = type(m)

    def forward(self, q, k, v, **masks):
        self.dense = getattr(self, "dense", False) or q.shape[2] <= self.window_size
        if not self.dense:
            return cls.forward(self, q, k, v, **masks)
        return dense(replace(problem_of(self, q, k, v, masks), mask=Everything()))

    return broken(m, forward=forward)


@defect(
    "HF BigBird 5.23: evaluation differs from training by the weight of block 0",
    "bigbird",
    {"training_is_evaluation_without_dropout": "output"},
    missed=("equals_its_matrix", "works_under_checkpointing"),
)
def training_counts_the_first_block_again(m):
    cls = type(m)

    def forward(self, q, k, v, **masks):
        if not self.training:
            return cls.forward(self, q, k, v, **masks)
        p = problem_of(self, q, k, v, masks)
        return apply(safe_softmax(masked_scores(p) + 0.7 * (torch.arange(p.k.shape[2]) < 4)), p)

    return broken(m, forward=forward)


@defect(
    "HF BigBird: a block that is in the window and drawn is counted twice",
    "bigbird",
    {"equals_its_matrix": "output"},
    missed=("masked_keys_have_no_weight", "nothing_to_attend_to_gives_zero"),
)
def overlapping_blocks_count_twice(m):
    def run(p):
        q, k = p.q.shape[2], p.k.shape[2]
        drawn = RandomBlocks(4, 2, 0, False).dense(q, k, int(p.q_offset))
        both = drawn & BlockWindow(4, 3).dense(q, k, int(p.q_offset))
        return apply(safe_softmax(masked_scores(p) + both * torch.log(torch.tensor(2.0))), p)

    return fast_path(m, run)


@defect(
    "two softmaxes in place of one: window and global tokens normalised apart",
    "longformer",
    {"rows_sum_to_one": "row sums", "equals_the_paper": "matrix"},
)
def parts_are_normalised_apart(m):
    def matrix(self, q, k, *, key_mask=None, q_offset=None, **masks):
        p = self._problem(q, k, k, key_mask, None, q_offset, None)
        scores = masked_scores(p)
        first = torch.arange(k.shape[2]) < 2
        return safe_softmax(scores.masked_fill(first, -torch.inf)) + safe_softmax(
            scores.masked_fill(~first, -torch.inf)
        )

    return broken(m, matrix=matrix)


@defect(
    "grouped heads repeated in the wrong order: head h with key head h % Hkv",
    "full_causal",
    {"grouped_heads_equal_repeated_heads": "output at length", "equals_the_paper": "matrix"},
)
def grouped_heads_go_round_robin(m):
    def run(p):
        def repeat(x):
            return x.repeat(1, p.q.shape[1] // x.shape[1], 1, 1)

        return dense(replace(p, k=repeat(p.k), v=repeat(p.v)))

    def matrix(self, q, k, **masks):
        p = self._problem(
            q, k, k, *(masks.get(n) for n in ("key_mask", "segment_ids", "q_offset", "attn_bias"))
        )
        return safe_softmax(masked_scores(replace(p, k=k.repeat(1, q.shape[1] // k.shape[1], 1, 1))))

    fast_path(m, run)
    return broken(m, matrix=matrix)


@defect(
    "contract: grouped heads",
    "linear_causal",
    {"equals_its_matrix": "output, length 1", "grouped_heads_equal_repeated_heads": "output at length"},
)
def fast_path_shares_heads_round_robin(m):
    run = preferred(m).run

    def shuffled(p):
        heads, shared = p.q.shape[1], p.k.shape[1]
        order = torch.arange(heads).view(-1, shared).mT.flatten()
        return run(replace(p, q=p.q[:, order]))[:, order.argsort()]

    return fast_path(m, shuffled)


@defect(
    "contract: the scale is 1 / sqrt(E)",
    "full",
    {"equals_full_attention_at_its_limit": "output", "equals_the_paper": "matrix"},
    missed=("equals_its_matrix", "rows_sum_to_one", "passes_gradcheck"),
)
def scale_is_one_per_cent_off(m):
    return everywhere(m, lambda p: {"scale": p.scale * 1.01})


@defect(
    "contract: the scale is 1 / sqrt(E)",
    "performer",
    {"equals_the_paper": "matrix"},
    missed=("equals_its_matrix",),
)
def scale_of_a_performer_is_one_per_cent_off(m):
    return everywhere(m, lambda p: {"scale": p.scale * 1.01})


@defect(
    "contract: the scale is 1 / sqrt(E)",
    "linear",
    {"equals_its_matrix": "output, length 2"},
)
def scale_of_the_fast_path_is_one_per_cent_off(m):
    return before_fast_path(m, lambda p: {"scale": p.scale * 1.01})


@defect(
    "xformers#761, #932: reference code without the scale",
    "window",
    {"equals_full_attention_at_its_limit": "output", "equals_the_paper": "matrix"},
    missed=("equals_its_matrix",),
)
def scores_are_not_scaled(m):
    return everywhere(m, lambda p: {"scale": 1.0})


@defect(
    "contract: scale= is honoured",
    "window_scaled",
    {"equals_full_attention_at_its_limit": "output", "equals_the_paper": "matrix"},
)
def scale_argument_is_ignored(m):
    return everywhere(m, lambda p: {"scale": p.q.shape[3] ** -0.5})


@defect(
    "contract: linear mechanisms multiply q by scale * sqrt(E)",
    "linear_scaled",
    {"equals_the_paper": "matrix"},
    missed=("equals_its_matrix",),
)
def scale_argument_of_a_linear_mechanism_is_ignored(m):
    return everywhere(m, lambda p: {"scale": p.q.shape[3] ** -0.5})


@defect(
    "transformers#45811: the bias is dropped",
    "full",
    {"honours_bias": "attn_bias"},
    missed=("equals_its_matrix",),
)
def bias_is_swallowed(m):
    return everywhere(m, lambda p: {"attn_bias": None})


@defect(
    "contract: a float bias is added after scaling",
    "full_causal",
    {"honours_bias": "attn_bias"},
    missed=("equals_its_matrix",),
)
def bias_is_scaled_with_the_scores(m):
    def change(p):
        scaled = p.attn_bias is not None and p.attn_bias.dtype != torch.bool
        return {"attn_bias": p.attn_bias * p.scale} if scaled else {}

    return everywhere(m, change)


@defect(
    "tiles along the keys: what lies beyond the first one is dropped",
    "full",
    {"equals_its_matrix": "1100 keys"},
    missed=("equals_the_paper", "equals_full_attention_at_its_limit"),
)
def keys_beyond_the_first_tile_are_dropped(m):
    def change(p):
        key_mask = None if p.key_mask is None else p.key_mask[:, :1024]
        return {"k": p.k[:, :, :1024], "v": p.v[:, :, :1024], "key_mask": key_mask}

    return before_fast_path(m, change)
