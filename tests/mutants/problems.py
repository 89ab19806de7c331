"""Mutants of masks made dense, of what torch's kernels are asked, and of what operators say that they cost."""

from __future__ import annotations

from .mutant import Mutant, Subject

PROBLEM, SOFTMAX, COSTS = "ops/problem.py", "ops/softmax.py", "ops/costs.py"

DENSE = (
    Mutant(
        PROBLEM,
        "stop = torch.where(key_mask, position + 1, 0).amax(1)",
        "stop = torch.where(key_mask, position, 0).amax(1)",
        "a row ends before its last valid position",
    ),
    Mutant(
        PROBLEM,
        "return torch.where(inside, segment_ids[:, position.clamp(0, segment_ids.shape[1] - 1)], -1)",
        "return segment_ids[:, position.clamp(0, segment_ids.shape[1] - 1)]",
        "queries outside the sequence belong to its last document",
    ),
    Mutant(
        PROBLEM,
        "device=segment_ids.device) + q_offset",
        "device=segment_ids.device)",
        "the documents of queries ignore their offset",
    ),
    Mutant(
        PROBLEM,
        "allowed = mask.sized(stop - start).allows(q_pos, k_pos)[:, None]",
        "allowed = mask.sized(num_keys).allows(q_pos, k_pos)[:, None]",
        "a padded row is as long as the batch",
    ),
    Mutant(
        PROBLEM,
        "q_pos, k_pos = q_pos - start, k_pos - start",
        "q_pos, k_pos = q_pos + 0 * start, k_pos + 0 * start",
        "an anchored pattern counts from position 0",
    ),
    Mutant(
        PROBLEM,
        "(same & (p.segment_ids >= 0)[:, None, :])",
        "same",
        "padding attends to padding",
    ),
)

KERNELS = (
    Mutant(
        SOFTMAX,
        "return isinstance(p.mask, Causal) and square",
        "return isinstance(p.mask, Causal)",
        "a causal flag is aligned at the top left whatever the offset",
    ),
    Mutant(
        SOFTMAX,
        "isinstance(p.q_offset, int) and p.q_offset == p.k.shape[2] - 1",
        "isinstance(p.q_offset, int)",
        "one query sees every key wherever it stands",
    ),
    Mutant(
        SOFTMAX, "attn_mask = attn_mask & p.attn_bias", "attn_mask = p.attn_bias", "a bias replaces the masks"
    ),
    Mutant(
        SOFTMAX,
        "p.attn_bias.to(dtype).masked_fill(~attn_mask, -torch.inf)",
        "p.attn_bias.to(dtype).expand(attn_mask.shape[0], p.q.shape[1], *attn_mask.shape[2:])",
        "a float bias replaces the masks",
    ),
    Mutant(
        SOFTMAX,
        "        attn_mask = p.key_mask[:, None, None, :]\n    out",
        "        pass\n    out",
        "padding is not hidden, only zeroed",
    ),
    Mutant(
        SOFTMAX,
        "return not is_plain(p) or (isinstance(p.mask, Causal) and p.key_mask is not None)",
        "return not is_plain(p)",
        "with a key_mask, causality is lost",
    ),
    Mutant(
        SOFTMAX,
        "scale=p.scale,\n        enable_gqa=_grouped(p.q, p.k),",
        "enable_gqa=_grouped(p.q, p.k),",
        "the scale is always torch's own",
    ),
    Mutant(SOFTMAX, "attn_mask=allowed, dropout_p", "attn_mask=None, dropout_p", "a step hides nothing"),
)

COUNTS = (
    Mutant(
        COSTS,
        "        2 * pairs * (shape.head_dim + shape.v_head_dim),\n",
        "        pairs * (shape.head_dim + shape.v_head_dim),\n",
        "a multiply-accumulate counts 1",
    ),
    Mutant(
        COSTS,
        "4 * pairs * (shape.head_dim + shape.v_head_dim) if training",
        "2 * pairs * (shape.head_dim + shape.v_head_dim) if training",
        "a backward pass costs as much as the forward pass",
    ),
    Mutant(
        COSTS,
        "2 * pairs * shape.head_dim if training and recomputes else 0",
        "0",
        "scores are not counted again in the backward pass",
    ),
    Mutant(
        COSTS,
        "+ (length % CHUNK) ** 2",
        "+ (length % CHUNK > 0) * CHUNK**2",
        "the last chunk is counted as a whole one",
    ),
    Mutant(
        COSTS,
        'values = shape.v_head_dim + (basis != "model")',
        "values = shape.v_head_dim",
        "the column of ones is not counted",
    ),
    Mutant(
        COSTS,
        '            terms["reading"] *= 2\n',
        "",
        "a chunk of tokens reads the state for nothing",
    ),
    Mutant(
        COSTS,
        "saved_in_v = 2 * (pairs + rows",
        "saved_in_v = 2 * (rows",
        "the scan for v is counted with a normaliser",
    ),
    Mutant(
        COSTS,
        'Flops(forward, backward, 2 * terms["features"])',
        'Flops(forward, backward, terms["features"])',
        "features are counted again once, not twice",
    ),
    Mutant(
        COSTS,
        "(2 if shape.dtype.itemsize < width else 1) + rows * width",
        "(2 if shape.dtype.itemsize < width else 1)",
        "the sums of a row's weights are not counted as saved",
    ),
    Mutant(COSTS, "log_sums = rows * width", "log_sums = 0", "log-sum-exps are not counted as saved"),
    Mutant(
        COSTS,
        'new_keys = shape.batch * kv_heads * shape.q_len if phase == "decode" else keys',
        "new_keys = keys",
        "a step is said to add every key to the state again",
    ),
    Mutant(
        COSTS,
        "tokens = batch * (heads * length + k[1] * k[2])\n    return",
        "tokens = 2 * batch * heads * length\n    return",
        "FlopCounterMode: keys are counted once for each query head",
    ),
)

SUBJECT = Subject(
    "dense masks and kernels",
    DENSE + KERNELS,
    mechanisms=("full", "flash", "bigbird", "sliding_window", "longformer", "linear"),
    first=("matrix_is_the_paper", "equals_its_matrix", "honours_bias", "stepping_equals_forward"),
)

COUNTED = Subject(
    "operators' costs",
    COUNTS,
    mechanisms=("flash", "sliding_window", "linear", "performer"),
    first=(
        "model_flops_are_the_pairs_of_the_matrix",
        "hardware_flops_are_counted",
        "decoding_flops_are_counted",
        "training_flops_are_counted",
        "torch_flops_are_what_torch_counts",
        "saved_bytes_are_measured",
    ),
)
