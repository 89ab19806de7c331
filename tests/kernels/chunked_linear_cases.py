"""Cases of the chunked kernels, judged in Triton's interpreter: prints {name: [what is wrong, ...]} as JSON."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from efficient_attn import LinearAttention, PerformerAttention
from efficient_attn.complexity import Shape
from efficient_attn.feature_maps import FORMULAS, Features, formula_of, orthogonal_gaussian
from efficient_attn.kernels.chunked_linear import counts, launch
from efficient_attn.kernels.chunked_linear.configs import TABLE
from efficient_attn.kernels.configs import INTERPRETER, Config
from efficient_attn.kernels.decode.linear import linear_step
from efficient_attn.ops import chunked_linear, linear_steps, stream
from efficient_attn.ops.composed import (
    composed,
    composed_step,
    features,
    running_maximum,
    state_of,
    with_ones,
)
from efficient_attn.ops.linear_kernel_costs import linear_counts, sizes

from .__main__ import hasten_and_count, launches

UNITS = {torch.float32: 64, torch.float16: 6}
"""Units in the last place of the largest entry that an error may have: sums in fp32, one rounding of half."""


COUNTED: dict[str, Any] = {
    "one span": ("elu", 2, 20, 20, 16, 16, "float32", True, False),
    "several spans": ("elu", 2, 75, 75, 40, 40, "float16", True, False),
    "fewer queries": ("exp", 4, 20, 90, 16, 16, "float16", True, False),
    "more queries": ("elu", 2, 70, 20, 16, 16, "float32", False, False),
    "projected": ("favor", 2, 37, 60, 16, 70, "float16", True, False),
    "projected exactly": ("favor", 2, 37, 60, 24, 70, "float32", False, False),
    "projected wide": ("favor", 2, 20, 20, 72, 40, "float32", True, False),
    "not causal": ("relu", 4, 37, 70, 20, 20, "float16", False, False),
    "not causal, documents": ("favor", 2, 37, 37, 16, 40, "float16", False, False),
    "other blocks": ("favor", 2, 37, 44, 24, 70, "float16", True, True),
    "other blocks, not causal": ("squared_relu", 2, 60, 37, 70, 70, "float32", False, True),
}  # fmt: skip
"""feature, heads, queries, keys, width, features, dtype, is_causal, whether the blocks are those below."""

OTHER = {
    "exponents": Config.of(4, 1, CHUNK=8, BLOCK_M=16),
    "states": Config.of(4, 1, CHUNK=8, BLOCK_M=16, BLOCK_V=16),
    "rows": Config.of(4, 1, CHUNK=16, BLOCK_M=16, FEATURES=48, BLOCK_V=16),
    "rows_projected": Config.of(4, 1, CHUNK=32, BLOCK_M=16, FEATURES=32, BLOCK_V=16),
    "row_gradients": Config.of(4, 1, CHUNK=8, BLOCK_M=16, FEATURES=48),
    "row_gradients_projected": Config.of(4, 1, CHUNK=16, BLOCK_M=16, FEATURES=32),
    "key_gradients": Config.of(4, 1, CHUNK=8, BLOCK_M=32, FEATURES=64),
    "key_gradients_projected": Config.of(4, 1, CHUNK=8, BLOCK_M=16, FEATURES=48),
}
"""Blocks of which none is like another kernel's."""


def judge(
    feature: str = "elu",
    length: int = 20,
    num_keys: int | None = None,
    offset: int | None = None,
    heads: int = 2,
    kv_heads: int = 1,
    width: int = 16,
    size: int = 16,
    causal: bool = True,
    valid: bool = False,
    dead: bool = False,
    segments: bool = False,
    in_memory: bool = False,
    slope: float = 0.0,
    mean: float = 0.0,
    dtype: str = "float32",
    precision: str | None = None,
) -> list[str]:
    """What differs from the loops in fp64 by more than rounding."""
    torch.manual_seed(0)
    kind: torch.dtype = getattr(torch, dtype)
    num_keys = length if num_keys is None else num_keys
    offset = num_keys - length if offset is None else offset
    # Heads beside the rows, as layers have them, so that no tensor is contiguous.
    q = torch.randn(2, length, heads, width).to(kind).transpose(1, 2)
    k = (
        torch.randn(2, num_keys, kv_heads, width) + slope * torch.linspace(0, 1, num_keys)[:, None, None]
    ).to(kind)
    v = (torch.randn(2, num_keys, kv_heads, 24) + mean).to(kind).transpose(1, 2)
    k = k.transpose(1, 2)
    alive = torch.rand(2, num_keys) > (1.0 if dead else 0.3) if valid or dead else None
    segment = torch.randint(0, 4, (2, num_keys)).sort(1).values if segments else None
    projection = orthogonal_gaussian(size, width, 0) if feature.startswith("favor") else None
    scale, exponents = 0.7, None
    if FORMULAS[feature].has_exponent:
        row_shift, _ = launch.exponents(q, None, projection, feature, scale, of_keys=False)
        shift, exponent = launch.exponents(k, alive, projection, feature, 1.0, of_keys=True)
        assert exponent is not None
        peak = running_maximum(exponent, segment)
        peak = peak if causal else exponent.amax(2, keepdim=True).expand_as(exponent).contiguous()
        exponents = launch.Exponents(row_shift, shift, exponent, peak)
    where: Any = torch.tensor(offset) if in_memory else offset
    run = launch.Pass(
        q, k, v, alive, segment, where, exponents, projection, feature, scale, causal, precision
    )
    out, lost, total = launch.forward(run, keep=True)
    grad = torch.randn(out.shape).to(kind)
    gradients = launch.backward(run, grad, out, lost if lost.numel() else None, total)[:3]

    doubles = [x.double() for x in (q, k, v)]
    others = (
        alive, segment, torch.tensor(offset if causal else num_keys),
        None if projection is None else projection.double(), feature, scale, causal,
    )  # fmt: skip
    exact = stream.forward(*doubles, *others)
    wanted = stream.backward(grad.double(), *doubles, *exact, *others)
    wrong = []
    for name, a, b in zip(("out", "dq", "dk", "dv"), (out, *gradients), (exact[0], *wanted), strict=True):
        unit = torch.finfo(kind).eps * max(b.abs().max().item(), 2.0**-10)
        error = (a.double() - b).abs().max().item()
        if not error <= UNITS[kind] * unit:
            wrong.append(f"{name}: {error:.3g}, that is {error / unit:.1f} units")
    if not torch.equal(torch.isinf(total), torch.isinf(exact[2])):
        wrong.append("other rows are empty")
    return wrong


def judge_decoding() -> list[str]:
    """Some tokens, one by one, some of them masked, of each map."""
    maps = [
        LinearAttention(feature_map=name, is_causal=True) for name in ("elu", "relu", "squared_relu", "exp")
    ]
    favors = [
        PerformerAttention(16, num_features=70, is_causal=True, kernel=kind) for kind in ("softmax", "relu")
    ]
    wrong = []
    for m in (*maps, *favors):
        m.backend = "chunked"
        state = m.init_state(2, 2, 16, v_head_dim=40, dtype=torch.float32)
        kv, exponent = state.kv, state.exponent
        name, projection = formula_of(m.feature_map), getattr(m.feature_map, "projection", None)
        for token in range(4):
            q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 40)
            mask = torch.tensor([[True], [token % 2 == 1]])
            out, state = m.step(q, k, v, state, key_mask=mask)
            mine, kv, exponent = linear_step(q, k, v, mask, kv, exponent, projection, str(name), 1.0)
            pairs: list[tuple[Tensor, Tensor]] = [(out, mine), (state.kv, kv)]
            pairs += [] if exponent is None else [(state.exponent, exponent)]
            error = max((a - b).abs().max().item() for a, b in pairs)
            if not error < 1e-5:
                wrong.append(f"{name}, token {token}: {error:.3g}")
    return wrong


def judge_steps() -> list[str]:
    """Many tokens after a state, in fp64 by torch: outputs, the state after them, and all gradients of both.

    The state's scale is that of small keys, of large ones, or of none.
    """
    wrong = []
    for feature in ("elu", "relu", "squared_relu", "exp", "favor_softmax", "favor_relu"):
        for length, size in ((1, 1.0), (20, 0.0), (37, 4.0)):
            wrong += _judge_step(feature, length, size, torch.float32)
    return wrong + _judge_step("elu", 75, 0.3, torch.float16) + _judge_step("exp", 75, 0.3, torch.float16)


def _judge_step(feature: str, length: int, size: float, kind: torch.dtype) -> list[str]:
    torch.manual_seed(0)
    # Heads beside the rows, as layers have them, so that no tensor is contiguous.
    q, k, v = (
        torch.randn(2, length, heads, width).to(kind).transpose(1, 2)
        for heads, width in ((4, 16), (2, 16), (2, 24))
    )
    past, past_v = torch.randn(2, 2, 30, 16, dtype=torch.float64) * size, torch.randn(2, 2, 30, 24).double()
    projection = orthogonal_gaussian(40, 16, 0) if feature.startswith("favor") else None
    valid = torch.rand(2, length) > 0.3

    def phi(x: Tensor) -> Features:
        return FORMULAS[feature].values(x, None if projection is None else projection.double())

    nothing = torch.zeros(2, 30, dtype=torch.bool) if size == 0.0 else None
    old, exponent = state_of(*_prepared(phi, past, past_v, nothing))
    state, scales = old.float(), None if exponent is None else exponent.float()
    leaves = [x.detach().requires_grad_() for x in (q, k, v, state)]
    before = launches["rows_kernel"]
    out, _, _, kv, peak = linear_steps._steps(
        *leaves[:3], valid, leaves[3], scales, projection, feature, 0.7, True
    )
    launched = launches["rows_kernel"] > before
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = composed_step(phi, *exact[:3], valid, 0.7, exact[3], exponent)
    weights = torch.randn_like(out), torch.randn_like(kv)
    mine = torch.autograd.grad((out, kv), leaves, weights)
    theirs = torch.autograd.grad(wanted[:2], exact, [w.double() for w in weights])
    pairs = {"out": (out, wanted[0]), "kv": (kv, wanted[1])}
    pairs |= dict(zip(("dq", "dk", "dv", "dkv"), zip(mine, theirs, strict=True), strict=True))
    wrong = [] if launched else [f"{feature}, {length} tokens: no kernel was launched"]
    if wanted[2] is not None and not torch.equal(peak.double(), wanted[2]):
        wrong.append(f"{feature}, {length} tokens: another exponent")
    for name, (a, b) in pairs.items():
        unit = torch.finfo(a.dtype).eps * max(b.abs().max().item(), 2.0**-10)
        # The features of fp16 are multiplied as tf32.
        units = UNITS[kind] if a.dtype == kind else UNITS[kind] * 2**13
        error = (a.double() - b).abs().max().item()
        if not error <= units * unit:
            wrong.append(f"{feature}, {length} tokens, {name}: {error:.3g}, that is {error / unit:.1f} units")
    return wrong


def judge_documents() -> list[str]:
    """Documents without causality, from one token to more than spans, against the composed scans in fp64."""
    wrong, lengths = [], torch.tensor([40, 1, 3, 0, 12, 14])
    segment = torch.arange(6).repeat_interleave(lengths).expand(2, -1)
    for feature, dtype, slope in (
        ("elu", "float32", 0.0),
        ("squared_relu", "float32", 3.0),
        ("exp", "float32", -9.0),
        ("exp", "float16", 9.0),
        ("favor_softmax", "float32", 3.0),
    ):
        torch.manual_seed(0)
        kind: torch.dtype = getattr(torch, dtype)
        q, v = torch.randn(2, 4, 70, 16).to(kind), torch.randn(2, 2, 70, 24).to(kind)
        k = (torch.randn(2, 2, 70, 16) + slope * torch.linspace(0, 1, 70)[:, None]).to(kind)
        grad, valid = torch.randn(2, 4, 70, 24).to(kind), torch.rand(2, 70) > 0.3
        projection = orthogonal_gaussian(40, 16, 0) if feature.startswith("favor") else None
        others = valid, segment, torch.tensor(0), projection, feature, 0.7, False
        forward = chunked_linear.forward(q, k, v, *others, True)
        mine = [forward[0], *chunked_linear.backward(grad, q, k, v, *forward, *others)]

        def phi(x: Tensor, feature: str = feature, projection: Tensor | None = projection) -> Features:
            return FORMULAS[feature].values(x, None if projection is None else projection.double())

        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        out = composed(phi, *leaves, valid, segment, 0, 0.7, False)
        theirs = [out, *torch.autograd.grad(out, leaves, grad.double())]
        for name, a, b in zip(("out", "dq", "dk", "dv"), mine, theirs, strict=True):
            unit = torch.finfo(kind).eps * max(b.abs().max().item(), 2.0**-10)
            error = (a.double() - b).abs().max().item()
            if not error <= UNITS[kind] * unit:
                wrong.append(f"{feature}, {dtype}, {name}: {error:.3g}, that is {error / unit:.1f} units")
    return wrong


def _prepared(
    phi: Callable[[Tensor], Features], k: Tensor, v: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    values, exponent = features(phi, k, 1.0, valid)
    return values, with_ones(v), exponent


def judge_far_offsets() -> list[str]:
    """Offsets beyond 32 bits, as numbers and in memory."""
    q, k, v = torch.randn(1, 1, 20, 16), torch.randn(1, 1, 20, 16), torch.randn(1, 1, 20, 16)
    wrong = []
    for far, near in ((1 << 40, 20), (-(1 << 40), -20)):
        results = []
        for offset in (near, far, torch.tensor(far)):
            run = launch.Pass(q, k, v, None, None, offset, None, None, "elu", 1.0, True)
            results.append(launch.forward(run, keep=False)[0])
        if not all(torch.equal(results[0], other) for other in results[1:]):
            wrong.append(f"offset {far}")
    return wrong


def judge_counts() -> list[str]:
    """FLOPs that are declared, against those of every product that the interpreter does."""
    done = [0]
    multiply = InterpreterBuilder.create_dot

    def counted(self: Any, a: Any, b: Any, *others: Any) -> Any:
        done[0] += 2 * a.data.size * b.data.shape[-1]
        return multiply(self, a, b, *others)

    def flops(run: Callable[[], Any]) -> int:
        done[0] = 0
        run()
        return done[0]

    InterpreterBuilder.create_dot = counted
    wrong = []
    for name, (feature, heads, length, num_keys, width, size, dtype, causal, other) in COUNTED.items():
        kind, batch = getattr(torch, dtype), 1 + (length < 30)
        q, k, v = (
            torch.randn(batch, *x).to(kind)
            for x in ((heads, length, width), (heads // 2, num_keys, width), (heads // 2, num_keys, 24))
        )
        m: Any = (
            PerformerAttention(width, num_features=size)
            if feature == "favor"
            else LinearAttention(feature_map=feature)
        )
        m.is_causal, m.backend = causal, "triton"
        configs = copy.deepcopy(TABLE)
        if other:
            for kernel, config in OTHER.items():
                TABLE[kernel] |= {key: config for key in TABLE[kernel] if key[0] == INTERPRETER}
        shape = Shape(
            batch, heads, length, num_keys, width, num_kv_heads=heads // 2, v_head_dim=24, dtype=kind
        )
        declared = linear_counts(m.feature_map, causal, shape, INTERPRETER)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        outputs = []
        here = flops(lambda: outputs.append(m(*leaves)))  # noqa: B023
        there = flops(outputs[0].sum().backward)
        pairs = [("forward", here, declared[0]), ("backward", there, declared[1])]
        if causal:
            new = [x[:, :, :length].detach() for x in leaves]
            state = m.init_state(batch, heads // 2, width, v_head_dim=24, dtype=kind)
            state.kv.requires_grad_()
            shape = dataclasses.replace(shape, kv_len=length)
            declared = linear_counts(m.feature_map, causal, shape, INTERPRETER)
            here = flops(lambda: outputs.append(m.step(*new, state)[0]))  # noqa: B023
            there = flops(outputs[1].sum().backward)
            pairs += [("step", here, declared[0]), ("backward of a step", there, declared[1])]
        elif length == num_keys:
            documents = torch.arange(length).expand(batch, -1) // 9
            walked = dataclasses.replace(
                sizes(m.feature_map, True, shape, INTERPRETER), both_ways=True, is_causal=True
            )
            declared = (
                counts.forward(walked, min(4, kind.itemsize)),
                counts.backward(walked, min(4, kind.itemsize)),
            )
            here = flops(lambda: outputs.append(m(*leaves, segment_ids=documents)))  # noqa: B023
            there = flops(outputs[1].sum().backward)
            pairs += [("documents", here, declared[0]), ("backward of documents", there, declared[1])]
        TABLE.update(configs)
        for what, a, b in pairs:
            if a != sum(b.values()):
                wrong.append(f"{name}, {what}: {a} are done, {sum(b.values())} declared, {dict(b)}")
    InterpreterBuilder.create_dot = multiply
    return wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    hasten_and_count()
    results = {name: judge(**options) for name, options in json.loads(sys.argv[1]).items()}
    results |= {
        "decoding": judge_decoding(), "steps": judge_steps(), "documents": judge_documents(),
        "far offsets": judge_far_offsets(), "counts": judge_counts(),
    }  # fmt: skip
    print(json.dumps(results))
