"""Mutants of what calls are said to cost."""

from __future__ import annotations

from .mutant import Mutant, Subject

COST, COMPRESS = "complexity/cost.py", "ops/compress.py"

SHAPES = (
    Mutant(
        COST,
        "return self.batch * self.num_kv_heads * self.kv_len * self.head_dim",
        "return self.batch * self.num_heads * self.kv_len * self.head_dim",
        "keys are counted once for each query head",
    ),
    Mutant(
        COST,
        "return self.batch * self.num_kv_heads * self.kv_len * self.v_head_dim",
        "return self.batch * self.num_kv_heads * self.kv_len * self.head_dim",
        "values are counted as wide as keys",
    ),
    Mutant(
        COST,
        "return self.batch * self.num_heads * self.q_len * self.v_head_dim",
        "return self.batch * self.num_heads * self.q_len * self.head_dim",
        "the output is counted as wide as the queries",
    ),
    Mutant(
        COST,
        "return (self.q_numel + self.k_numel + self.v_numel) * self.dtype.itemsize",
        "return (self.q_numel + self.k_numel + self.v_numel) * 4",
        "inputs take four bytes whatever their dtype",
    ),
    Mutant(
        COST,
        "return self.forward + self.backward + self.recompute",
        "return self.forward + self.backward",
        "recomputation is left out of the total",
    ),
)

SUMS = (
    Mutant(
        COST,
        "self.recompute + other.recompute\n",
        "self.recompute\n",
        "a sum of FLOPs forgets the second recomputation",
    ),
    Mutant(
        COST,
        "max(self.peak_bytes + other.saved_bytes, other.peak_bytes + self.saved_bytes)",
        "self.peak_bytes + other.peak_bytes",
        "peaks of calls that follow one another are added",
    ),
    Mutant(
        COST,
        "max(self.peak_bytes + other.saved_bytes, other.peak_bytes + self.saved_bytes)",
        "max(self.peak_bytes, other.peak_bytes)",
        "the peak of a sequence forgets what is saved meanwhile",
    ),
    Mutant(
        COST,
        "self.state_bytes + other.state_bytes,",
        "max(self.state_bytes, other.state_bytes),",
        "two layers share one state",
    ),
    Mutant(
        COST,
        "self.peak_bytes + self.saved_bytes * (times - 1) if times else 0",
        "self.peak_bytes * times",
        "the peak of a stack is the sum of its layers' peaks",
    ),
    Mutant(
        COST,
        "self.params * times,",
        "self.params,",
        "a stack of layers has the parameters of one",
    ),
    Mutant(
        COST,
        "{name: value * times for name, value in self.terms.items()}",
        "dict(self.terms)",
        "the terms of a stack are those of one layer",
    ),
)

PRODUCTS = (
    Mutant(
        COST,
        "forward = 2 * rows * in_features * out_features",
        "forward = rows * in_features * out_features",
        "a multiply-accumulate of a projection counts 1",
    ),
    Mutant(
        COST,
        "backward=2 * forward if training else 0",
        "backward=forward if training else 0",
        "a projection has one product in its backward pass",
    ),
    Mutant(
        COST,
        "params = in_features * out_features + out_features * bias",
        "params = in_features * out_features",
        "biases are no parameters",
    ),
    Mutant(
        COST,
        "bytes_read=(rows * in_features + params) * itemsize,",
        "bytes_read=rows * in_features * itemsize,",
        "the weights of a projection are not read",
    ),
)

COMPRESSED = (
    Mutant(
        COMPRESS,
        '"compression": 2 * keys * rank * both,',
        '"compression": keys * rank * both,',
        "a multiply-accumulate of the compression counts 1",
    ),
    Mutant(
        COMPRESS,
        '"scores": 2 * rows * rank * shape.head_dim,',
        '"scores": 2 * keys * rank * shape.head_dim,',
        "scores are counted for each key, not each query",
    ),
    Mutant(
        COMPRESS,
        '"values": 2 * rows * rank * shape.v_head_dim,',
        '"values": 2 * rows * rank * shape.head_dim,',
        "values are counted as wide as keys",
    ),
    Mutant(
        COMPRESS,
        "flops = Flops(forward, 2 * forward if training else 0, recompute)",
        "flops = Flops(forward, forward if training else 0, recompute)",
        "a product has one product in its backward pass",
    ),
    Mutant(
        COMPRESS,
        'recompute = terms["scores"] if training and basis != "model" and backend == "sdpa" else 0',
        'recompute = terms["scores"] if training and basis == "model" and backend == "sdpa" else 0',
        "the mathematics recomputes, the kernel does not",
    ),
    Mutant(
        COMPRESS,
        "saved = shape.q_numel + shape.k_numel + shape.v_numel + shape.out_numel + small + rows",
        "saved = shape.q_numel + shape.k_numel + shape.v_numel + shape.out_numel + small",
        "the log-sum-exp kept for the backward pass is not declared",
    ),
    Mutant(
        COMPRESS,
        "saved += 2 * heads * shape.kv_len * rank",
        "saved += heads * shape.kv_len * rank",
        "one of the two projections kept in fp32 is not declared",
    ),
    Mutant(
        COMPRESS,
        'terms |= {"compression": keys_only, "values": pairs * rank + pairs * shape.v_head_dim}',
        'terms |= {"compression": keys_only, "values": pairs * rank}',
        "the reference's last product is not counted",
    ),
    Mutant(
        COMPRESS,
        "bytes_read=shape.input_bytes + num_params * shape.dtype.itemsize,",
        "bytes_read=shape.input_bytes,",
        "the projections are not read",
    ),
    Mutant(
        COMPRESS,
        "bytes_written=shape.output_bytes,",
        "bytes_written=shape.input_bytes,",
        "the input is written",
    ),
)

SUBJECT = Subject(
    "costs",
    SHAPES + SUMS + PRODUCTS + COMPRESSED,
    tests=("tests/test_cost_sums.py", "tests/test_layers.py"),
    mechanisms=("full", "sliding_window", "linformer", "linear", "performer"),
    first=(
        "declared_traffic_is_every_tensor_once",
        "saved_bytes_are_measured",
        "training_flops_are_counted",
        "hardware_flops_are_counted",
        "model_flops_are_the_pairs_of_the_matrix",
        "torch_flops_are_what_torch_counts",
    ),
    others=("tests/test_errors.py",),
)
