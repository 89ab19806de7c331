"""A mechanism is a good citizen of torch: shapes, layouts, copies, precision regions, random state."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ...mechanisms import Mechanism
from ..counting import untouched_rng
from ..sampling import (
    HEAD_DIM,
    HEADS,
    LENGTH,
    V_HEAD_DIM,
    expand_heads,
    head_dim_of,
    heads_of,
    holes,
    in_dtype,
    sample,
)
from .law import expect, expect_close, expect_identical, law


@law(lambda m: m.num_kv_heads is None)
def grouped_heads_equal_repeated_heads(mechanism: Mechanism) -> int:
    """Heads that share a key-value head give what each would with a copy of it, and its gradient is their sum."""
    m = in_dtype(mechanism, torch.float64)
    for length in (1, 16, LENGTH):
        q, k, v = sample(m, length, grad=True)
        shared = m(q, k, v)
        repeated = m(q, expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1]))
        expect_close(shared, repeated, f"output at length {length}")
        for name, a, b in zip(
            "qkv",
            torch.autograd.grad(shared.square().sum(), (q, k, v)),
            torch.autograd.grad(repeated.square().sum(), (q, k, v)),
            strict=True,
        ):
            expect_close(a, b, f"gradient of {name} at length {length}")
    return 3


@law()
def takes_empty_inputs(mechanism: Mechanism) -> int:
    """No batch, no queries, no keys: right shapes, zeros where there is nothing to attend to, gradients that exist."""
    m = in_dtype(mechanism, torch.float32)
    heads, kv_heads = heads_of(m)
    size, cases = head_dim_of(m), 0
    for batch, q_len, kv_len in ((0, 7, 7), (2, 0, 7), (2, 0, 0), (2, 3, 0), (0, 0, 0)):
        q = torch.randn(batch, heads, q_len, size, requires_grad=True)
        k = torch.randn(batch, kv_heads, kv_len, size, requires_grad=True)
        v = torch.randn(batch, kv_heads, kv_len, V_HEAD_DIM, requires_grad=True)
        choices: list[dict] = [{}, {"key_mask": torch.ones(batch, kv_len, dtype=torch.bool)}]
        if m.supports_segments:
            choices.append({"segment_ids": torch.zeros(batch, kv_len, dtype=torch.int64)})
        for masks in choices:
            out = m(q, k, v, q_offset=0, **masks)
            expect(out.shape == (batch, heads, q_len, V_HEAD_DIM), f"output {tuple(out.shape)}")
            expect(bool((out == 0).all()) or kv_len > 0, "something came from no keys")
            for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
                expect(grad.shape == x.shape and bool(torch.isfinite(grad).all()), "gradient")
            matrix = m.matrix(q, k, q_offset=0, **masks)
            expect(matrix.shape == (batch, heads, q_len, kv_len), f"matrix {tuple(matrix.shape)}")
            cases += 1
    return cases


@law()
def survives_copies(mechanism: Mechanism) -> int:
    """deepcopy, pickle, torch.save and a strict state_dict into a fresh copy give the same bits."""
    m = in_dtype(mechanism, torch.float32)
    q, k, v = sample(m, dtype=torch.float32)
    expected = m(q, k, v)
    loaded = copy.deepcopy(m)
    with torch.no_grad():
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.fill_(0.5)
    buffer = io.BytesIO()
    torch.save(m.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    for name, twin in (
        ("deepcopy", copy.deepcopy(m)),
        ("pickle", pickle.loads(pickle.dumps(m))),
        ("state_dict", loaded),
    ):
        expect_identical(twin(q, k, v), expected, name)
    return 3


@law(lambda m: bool(m.state_dict()))
def reset_parameters_fills_empty_memory(mechanism: Mechanism) -> int:
    """After meta and `to_empty`, `reset_parameters` fills every tensor, buffers as it fills them anywhere."""
    resettable: Any = in_dtype(mechanism, torch.float32)
    lazy: Any = copy.deepcopy(resettable).to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*lazy.parameters(), *lazy.buffers()):
            tensor.fill_(torch.nan)
    lazy.reset_parameters()
    resettable.reset_parameters()
    for name, tensor in lazy.named_parameters():
        expect(bool(torch.isfinite(tensor).all()), f"{name} was not filled")
    for (name, a), b in zip(lazy.named_buffers(), resettable.buffers(), strict=True):
        expect_identical(a, b, name)
    return 1


@law()
def leaves_random_state_alone(mechanism: Mechanism) -> int:
    """Without dropout no random number is drawn; two instances of one seed agree whatever the global seed was, which
    making them leaves alone if there is nothing to learn."""
    m = in_dtype(mechanism, torch.float32)
    q, k, v = sample(m, dtype=torch.float32)
    with untouched_rng("in evaluation"):
        first = m(q, k, v)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        expect_identical(m(q, k, v), first, "after another global seed")
    with untouched_rng("in training"):
        _without_dropout(m).train()(q, k, v)
    if not any(True for _ in mechanism.parameters()):
        # torch's alone: who checks the types of arguments at run time may draw from Python's.
        before = torch.get_rng_state()
        type(mechanism).examples(LENGTH, HEADS, HEAD_DIM)
        untouched = torch.equal(before, torch.get_rng_state())
        expect(untouched, "torch's global random generator was used in construction")

    made = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made.append(type(mechanism).examples(LENGTH, HEADS, HEAD_DIM))
    for one, other in zip(*made, strict=True):
        for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
            expect_identical(a, b, f"{name} of {one}, made under two global seeds")
    return 5


@law()
def works_in_inference_mode(mechanism: Mechanism) -> int:
    """Under inference_mode the bits are the same, and a module that was used there can be trained afterwards."""
    m, mask = in_dtype(mechanism, torch.float32), holes(LENGTH)
    inputs = sample(m, dtype=torch.float32, grad=True)
    used = copy.deepcopy(m)
    with torch.inference_mode():
        inside = used(*inputs, key_mask=mask)
    expect(inside.is_inference(), "the output has a gradient")
    results = []
    for module in (used, m):
        out = module(*inputs, key_mask=mask)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for name, a, b in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        expect_identical(a, b, f"{name} after inference_mode")
    expect_identical(inside, results[1][0], "output in inference_mode")
    return 2


def _without_dropout(m: Mechanism) -> Mechanism:
    if m.dropout_p is not None:
        m.dropout_p = 0.0
    return m


def _with_dropout(m: Mechanism) -> Mechanism:
    """`m` that drops weights in training, on any backend if the one it asks for has no place for that."""
    m.dropout_p = 0.3
    problem = m.train()._problem(*sample(m), None, None, None, None)
    if any(backend.name == m.backend and backend.refuse(problem) for backend in m.backends):
        m.backend = "auto"
    return m.eval()


@law()
def training_is_evaluation_without_dropout(mechanism: Mechanism) -> int:
    """Without dropout, training mode changes neither outputs nor gradients."""
    m = _without_dropout(in_dtype(mechanism, torch.float64))
    inputs, results = sample(m, grad=True), []
    for training in (False, True):
        out = m.train(training)(*inputs, key_mask=holes(LENGTH))
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for name, a, b in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        expect_close(b, a, f"{name} in training")
    return 2


@law(lambda m: getattr(m, "num_random_blocks", 0) > 0)
def random_draws_are_uniform(mechanism: Mechanism) -> int:
    """What `random_block_choices` draws is distinct, always the same, and spread over all that there is to draw."""
    drawing: Any = mechanism
    count, total, blocks = drawing.num_random_blocks, 320, range(64, 320)
    seen = [0] * 8
    for block in blocks:
        drawn = drawing.random_block_choices(block, total)
        available = block if mechanism.is_causal else total
        expect(drawn == drawing.random_block_choices(block, total), f"block {block} draws anew each time")
        good = len(set(drawn)) == len(drawn) == count and all(0 <= b < available for b in drawn)
        expect(good, f"block {block} drew {drawn}, not {count} distinct blocks of {available}")
        for b in drawn:
            seen[8 * b // available] += 1
    mean = sum(seen) / 8
    chi_square = sum((n - mean) ** 2 for n in seen) / mean
    # Five standard deviations above the mean of seven degrees of freedom.
    expect(chi_square < 7 + 5 * 14**0.5, f"not uniform: {seen} draws from each eighth")
    return len(blocks)


@law()
def respects_autocast(mechanism: Mechanism) -> int:
    """Under autocast, inputs of either precision give the result, and the dtype, that they give outside it."""
    for dtype in (torch.float32, torch.bfloat16):
        m = in_dtype(mechanism, torch.float32)
        inputs = sample(m, dtype=dtype, grad=True)
        outside = m(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = m(*inputs)
        expect(inside.dtype in (dtype, torch.bfloat16), f"{dtype} gave {inside.dtype}")
        error = (inside.double() - outside.double()).abs().max().item()
        bound = 0.03 * outside.double().abs().max().item()
        expect(error <= bound, f"autocast moved {dtype} by {error:.3g}, allowed {bound:.3g}")
        grads = torch.autograd.grad(inside.float().sum(), inputs)
        expect(
            all(bool(torch.isfinite(g).all()) for g in grads), f"gradients of {dtype} inputs under autocast"
        )
    return 2


@law()
def works_under_checkpointing(mechanism: Mechanism) -> int:
    """Activation checkpointing changes no bit of the gradients, dropout included."""
    m = in_dtype(mechanism, torch.float32).train()
    inputs = sample(m, dtype=torch.float32, grad=True)
    variants = [m] if m.dropout_p is None else [m, _with_dropout(copy.deepcopy(m)).train()]
    for variant in variants:
        grads = []
        for run in (variant, partial(checkpoint, variant, use_reentrant=False)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                grads.append(torch.autograd.grad(run(*inputs).sum(), inputs))
        for name, a, b in zip("qkv", grads[1], grads[0], strict=True):
            expect_identical(a, b, f"gradient of {name}, dropout_p={variant.dropout_p}")
    return len(variants)


@law(lambda m: m.dropout_p is not None)
def dropout_is_dropout(mechanism: Mechanism) -> int:
    """Off in evaluation; repeatable by seed; unbiased; its gradient is that of the weights that were kept."""
    m = _with_dropout(in_dtype(mechanism, torch.float64))
    q, k, v = sample(m, 12)
    clean = m(q, k, v)
    expect_close(clean, m.matrix(q, k) @ expand_heads(v, q.shape[1]), "evaluation, with dropout_p = 0.3")
    m.train()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(m(q, k, v))
    expect_identical(runs[0], runs[1], "the same seed")
    expect(not torch.equal(runs[0], runs[2]), "another seed dropped the same weights")
    mean = torch.stack([m(q, k, v) for _ in range(400)]).mean(0)
    spread = torch.stack([m(q, k, v) for _ in range(50)]).std(0) / 400**0.5
    expect(bool(((mean - clean).abs() <= 6 * spread + 1e-9).all()), "dropout changes the mean")

    # Linear in v: with one seed, the output at v is the gradient's inner product with v.
    v = v.requires_grad_()
    torch.manual_seed(3)
    out = m(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), v)
    expect_close((grad * v).sum(), out.sum(), "gradient of v under dropout")
    return 4


@law(lambda m: m.dropout_p is not None and m.rows_sum_to_one)
def dropout_keeps_its_share(mechanism: Mechanism) -> int:
    """The share of weights that survive is 1 - p within five standard deviations; each of them grew by 1 / (1 - p)."""
    m = _with_dropout(in_dtype(mechanism, torch.float64)).train()
    q, k, _ = sample(m)
    weights = m.matrix(q, k)
    # With one-hot values the output is the matrix after dropout.
    v = torch.eye(LENGTH, dtype=torch.float64).expand(*k.shape[:2], -1, -1)
    for p in (0.1, 0.3, 0.5):
        m.dropout_p = p
        pairs = kept = 0
        for seed in range(20):
            torch.manual_seed(seed)
            left = m(q, k, v)
            alive = left != 0
            expect_close(left[alive], weights[alive] / (1 - p), f"what dropout_p = {p} leaves")
            pairs += int((weights > 0).sum())
            kept += int(alive.sum())
        spread = (p * (1 - p) / pairs) ** 0.5
        expect(
            abs(kept / pairs - (1 - p)) <= 5 * spread,
            f"dropout_p = {p} kept {kept / pairs:.4f} of {pairs} weights, 5 sigma are {5 * spread:.4f}",
        )
    return 60
