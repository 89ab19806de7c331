"""What a mechanism declares about its cost is what is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...complexity import Shape
from ...mechanisms import LinearMechanism, Mechanism, SoftmaxMechanism
from ...ops.costs import register_flop_formulas
from ..counting import count, peak_bytes, saved_bytes
from ..sampling import EQUAL, LENGTH, V_HEAD_DIM, head_dim_of, in_dtype, lengths, sample
from .law import expect, law


def _shape(m: Mechanism, q_len: int, kv_len: int, dtype: torch.dtype, v_head_dim: int = V_HEAD_DIM) -> Shape:
    q, k, v = sample(m, 1, v_head_dim=v_head_dim)
    return Shape(
        2, q.shape[1], q_len, kv_len, q.shape[3], num_kv_heads=k.shape[1], v_head_dim=v.shape[3], dtype=dtype
    )


@law(lambda m: isinstance(m, SoftmaxMechanism))
def model_flops_are_the_pairs_of_the_matrix(mechanism: Mechanism) -> int:
    """In the basis "model", a softmax mechanism's FLOPs are 2 (E + Ev) for every non-zero weight, and twice back."""
    m, cases = in_dtype(mechanism, torch.float64), 0
    for q_len, kv_len in [(n, n) for n in lengths(m)] + [(5, LENGTH), (1, LENGTH)]:
        q, k, _ = sample(m, q_len, kv_len)
        pairs = int((m.matrix(q, k) > 0).sum())
        flops = m.cost(_shape(m, q_len, kv_len, torch.float64), training=True).flops
        each = 2 * (head_dim_of(m) + V_HEAD_DIM)
        expect(
            flops.forward == pairs * each, f"declared {flops.forward}, {pairs} pairs at {q_len} x {kv_len}"
        )
        expect(flops.backward == 2 * pairs * each, f"backward {flops.backward} at {q_len} x {kv_len}")
        cases += 1
    return cases


@law()
def hardware_flops_are_counted(mechanism: Mechanism) -> int:
    """In the basis "hardware", the forward FLOPs are the matrix products that the backend really does."""
    cases = 0
    for backend in mechanism.backends:
        m = in_dtype(mechanism, torch.float32)
        m.backend = backend.name
        for q_len, kv_len in [(n, n) for n in lengths(m)] + [(5, LENGTH)]:
            q, k, v = sample(m, q_len, kv_len, dtype=torch.float32)
            if backend.refuse(m._problem(q, k, v, None, None, None, None)):
                continue
            counted = count(lambda m=m, q=q, k=k, v=v: m(q, k, v)).flops
            cost = m.cost(_shape(m, q_len, kv_len, torch.float32), basis="hardware", backend=backend.name)
            what = f"{backend.name}, {q_len} x {kv_len}"
            expect(counted == cost.flops.forward, f"counted {counted}, declared {cost.flops.forward}: {what}")
            expect(
                sum(cost.terms.values()) == cost.flops.forward, f"the terms do not sum to the whole: {what}"
            )
            cases += 1
    return cases


@law()
def training_flops_are_counted(mechanism: Mechanism) -> int:
    """Forward, backward and recomputation together are the products counted in a training step."""
    cases = 0
    m = in_dtype(mechanism, torch.float32)
    m.backend = m._default_backend()
    for length in lengths(m):
        inputs = sample(m, length, dtype=torch.float32, grad=True)
        counted = count(lambda m=m, inputs=inputs: m(*inputs).sum().backward()).flops
        flops = m.cost(_shape(m, length, length, torch.float32), training=True, basis="hardware").flops
        # torch's unfused attention recomputes nothing, where its fused kernels do.
        declared = flops.total - flops.recompute if m.backend == "sdpa" else flops.total
        expect(counted == declared, f"counted {counted}, declared {declared} at length {length}")
        again = m.cost(_shape(m, length, length, torch.float32), training=True).flops.recompute
        expect(again == 0, f"the mathematics computes nothing twice, declared {again} at length {length}")
        cases += 1
    return cases


@law(lambda m: m.is_causal and isinstance(m, LinearMechanism))
def decoding_flops_are_counted(mechanism: Mechanism) -> int:
    """A step of one token, and of several, does the products of the basis "hardware", however many came before."""
    cases = 0
    m = in_dtype(mechanism, torch.float32)
    m.backend = m._default_backend()
    for tokens in (1, 5, 70):
        q, k, v = sample(m, LENGTH + tokens, dtype=torch.float32)
        state = m.init_state(len(k), k.shape[1], k.shape[3], v_head_dim=v.shape[3], dtype=torch.float32)
        (q, new_q), (k, new_k), (v, new_v) = (x.split([LENGTH, tokens], 2) for x in (q, k, v))
        _, state = m.step(q, k, v, state)
        inputs = new_q, new_k, new_v, state
        counted = count(lambda m=m, inputs=inputs: m.step(*inputs)).flops
        shape = _shape(m, tokens, LENGTH + tokens, torch.float32)
        declared = m.cost(shape, phase="decode", basis="hardware").flops.forward
        expect(counted == declared, f"counted {counted}, declared {declared}: {tokens} tokens")
        cases += 1
    return cases


@law()
def torch_flops_are_what_torch_counts(mechanism: Mechanism) -> int:
    """In the basis "torch", the FLOPs are those of FlopCounterMode, on meta tensors, where it sees every product."""
    register_flop_formulas()
    cases = 0
    m = in_dtype(mechanism, torch.float32).to("meta")
    m.backend = m._default_backend()
    for length in lengths(m):
        inputs = [x.detach().to("meta").requires_grad_() for x in sample(m, length, v_head_dim=EQUAL)]
        inputs = [x.float().detach().requires_grad_() for x in inputs]
        with FlopCounterMode(display=False) as forward:
            out = m(*inputs)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        flops = m.cost(_shape(m, length, length, torch.float32, EQUAL), training=True, basis="torch").flops
        for name, mode, declared in (
            ("forward", forward, flops.forward),
            ("backward", backward, flops.backward),
        ):
            counted = mode.get_total_flops()
            # On meta torch takes its unfused attention, which recomputes nothing.
            if m.backend == "sdpa" and name == "backward":
                declared -= m.cost(
                    _shape(m, length, length, torch.float32, EQUAL), training=True, basis="hardware"
                ).flops.recompute
            expect(counted == declared, f"{name}: counted {counted}, declared {declared} at length {length}")
            cases += 1
    return cases


@law()
def saved_bytes_are_measured(mechanism: Mechanism) -> int:
    """What autograd keeps between forward and backward has the declared size, each storage counted once."""
    cases = 0
    for dtype in (torch.float32, torch.bfloat16):
        m = in_dtype(mechanism, dtype)
        for length in (16, LENGTH):
            # Equal head sizes: torch's fused kernel, whose bytes are declared, needs them.
            inputs = sample(m, length, dtype=dtype, grad=True, v_head_dim=EQUAL)
            others = tuple(m.parameters()) + tuple(m.buffers())
            measured = saved_bytes(lambda m=m, inputs=inputs: m(*inputs), besides=others)
            declared = m.cost(_shape(m, length, length, dtype, EQUAL), training=True).saved_bytes
            expect(
                measured == declared, f"{measured} bytes kept, declared {declared}: length {length}, {dtype}"
            )
            cases += 1
    return cases


@law()
def peak_bytes_are_bounded(mechanism: Mechanism) -> int:
    """What is allocated at once, forward and backward, is at most the declared peak, which is at most 4 times that."""
    cases = 0
    for dtype in (torch.float32, torch.bfloat16):
        m = in_dtype(mechanism, dtype)
        m.backend = m._default_backend()
        for length in (min(m.max_seq_len or 1024, 1024), LENGTH):
            for training in (False, True):
                inputs = sample(m, length, dtype=dtype, grad=training, batch=1, v_head_dim=EQUAL)
                measured = peak_bytes(m, inputs, [*m.parameters(), *m.buffers()])
                shape = replace(_shape(m, length, length, dtype, EQUAL), batch=1)
                declared = m.cost(shape, training=training).peak_bytes
                what = f"{measured} bytes at once, declared {declared}: length {length}, {dtype}, {training=}"
                expect(measured <= declared <= 4 * measured, what)
                cases += 1
    return cases


@law(lambda m: m.max_seq_len is None)
def largest_intermediate_grows_as_declared(mechanism: Mechanism) -> int:
    """Forward and backward, no tensor grows faster with the length than the declared memory."""
    m = in_dtype(mechanism, torch.float32)
    m.backend = m._default_backend()
    sizes = []
    for length in (1024, 4096):
        inputs = sample(m, length, dtype=torch.float32, grad=True, batch=1)
        sizes.append(count(lambda inputs=inputs: m(*inputs).sum().backward()).largest)
    grown = math.log(sizes[1] / sizes[0]) / math.log(4)
    degree = m.complexity.degree("memory")
    # Tiles are cut at the edges, hence the margin; what is quadratic is far beyond it.
    expect(grown <= degree + 0.25, f"the largest tensor grew like L^{grown:.2f}, declared L^{degree:g}")
    return 1


@law()
def declared_time_is_the_cost(mechanism: Mechanism) -> int:
    """From 4K to 1M tokens the exact count grows as the formula in `complexity` does, and as its exponent says."""
    lengths = (1 << 12, 1 << 20)
    if mechanism.max_seq_len is not None:
        lengths = (mechanism.max_seq_len // 2, mechanism.max_seq_len)
    flops = [mechanism.cost(_shape(mechanism, n, n, torch.float32)).flops.forward for n in lengths]
    grown = _exponent(flops, lengths)
    declared = mechanism.complexity.degree("time")
    expect(abs(grown - declared) < 0.05, f"FLOPs grow like L^{grown:.3f}, declared L^{declared:g}")
    formula = _exponent([_evaluated(mechanism, "time", n) for n in lengths], lengths)
    expect(abs(grown - formula) < 0.05, f"FLOPs grow like L^{grown:.3f}, the formula like L^{formula:.3f}")
    return 2


@law(lambda m: not m.is_causal)
def declared_path_is_that_of_the_graph(mechanism: Mechanism) -> int:
    """Information crosses the sequence in as many layers as declared: walks over the matrix's non-zero entries."""
    declared = mechanism.complexity.expression("path")
    if declared.is_infinite:
        return 0
    m = in_dtype(mechanism, torch.float64)
    length = LENGTH - 1  # whole blocks and strides: what is left over is no part of the pattern
    # A feature of zero hides what the next draw shows.
    drawn = [sample(m, length, batch=1, seed=seed)[:2] for seed in range(8)]
    step = torch.stack([m.matrix(q, k)[0, 0] != 0 for q, k in drawn]).any(0)
    step |= torch.eye(length, dtype=torch.bool)
    reached, layers = step, 1
    while not reached.all() and layers <= length:
        reached, layers = (reached.double() @ step.double()) > 0, layers + 1
    bound = _evaluated(m, "path", length)
    layers = layers if reached.all() else math.inf
    expect(
        layers == bound or bound - 1 <= layers <= math.ceil(bound),
        f"{layers} layers to cross {length} tokens, declared {bound:g}",
    )
    return 1


def _exponent(values: Sequence[float], lengths: tuple[int, int]) -> float:
    return math.log(values[1] / values[0]) / math.log(lengths[1] / lengths[0])


def _evaluated(mechanism: Mechanism, name: str, length: int) -> float:
    """A formula with the mechanism's parameters; with 1 for letters that it does not explain."""
    if all(str(s) in "LEP" or str(s) in mechanism.complexity.symbols for s in _symbols(mechanism, name)):
        return mechanism.evaluate(name, length, head_dim_of(mechanism))
    ones = {str(symbol): 1.0 for symbol in _symbols(mechanism, name)}
    return mechanism.complexity.evaluate(name, {**ones, "L": length})


def _symbols(mechanism: Mechanism, name: str) -> set[Any]:
    return mechanism.complexity.expression(name).free_symbols


@law(lambda m: m.is_causal)
def declared_decoding_is_the_cost(mechanism: Mechanism) -> int:
    """The FLOPs of more tokens, and the bytes of the state, grow with the length as `complexity` says."""
    lengths = (1 << 14, 1 << 16)
    # Many tokens: where a single one stands in its block or stride would decide what it costs.
    costs = [mechanism.cost(_shape(mechanism, 1024, n, torch.float32), phase="decode") for n in lengths]
    for name, small, large in (
        ("decode_time", *(cost.flops.forward for cost in costs)),
        ("state", *(cost.state_bytes for cost in costs)),
    ):
        grown = math.log(large / small) / math.log(lengths[1] / lengths[0])
        declared = mechanism.complexity.degree(name)
        expect(abs(grown - declared) < 0.05, f"{name} grows like L^{grown:.3f}, declared L^{declared:g}")
    return 2


@law(lambda m: m.is_causal)
def decoding_traffic_is_the_state_once(mechanism: Mechanism) -> int:
    """A step reads the state and its tokens once; it writes its output, and no more of the state than there is."""
    for tokens in (1, 5):
        for dtype in (torch.float32, torch.bfloat16):
            m = in_dtype(mechanism, dtype)
            q, k, v = sample(m, LENGTH + tokens, dtype=dtype)
            state = m.init_state(len(k), k.shape[1], k.shape[3], v_head_dim=v.shape[3], dtype=dtype)
            (q, new_q), (k, new_k), (v, new_v) = (x.split([LENGTH, tokens], 2) for x in (q, k, v))
            _, state = m.step(q, k, v, state)
            before, fresh = state.nbytes, sum(x.numel() for x in (new_q, new_k, new_v)) * dtype.itemsize
            out, state = m.step(new_q, new_k, new_v, state)
            cost = m.cost(_shape(m, tokens, LENGTH + tokens, dtype), phase="decode")
            read, grown = before + fresh, state.nbytes - before
            expect(
                cost.bytes_read == read,
                f"{read} bytes to read, declared {cost.bytes_read}: {tokens}, {dtype}",
            )
            expect(
                grown == tokens * cost.kv_bytes_per_token,
                f"the state grew by {grown}, declared {cost.kv_bytes_per_token} a token: {dtype}",
            )
            changed = cost.bytes_written - out.nbytes
            expect(
                grown <= changed <= state.nbytes, f"{changed} bytes of the state change: {tokens}, {dtype}"
            )
    return 4


@law()
def declared_traffic_is_every_tensor_once(mechanism: Mechanism) -> int:
    """Inputs and parameters are read once, the output is written once, and every learnt number is counted."""
    for dtype in (torch.float32, torch.bfloat16):
        m = in_dtype(mechanism, dtype)
        inputs = sample(m, dtype=dtype)
        parameters = list(m.parameters())
        cost = m.cost(_shape(m, LENGTH, LENGTH, dtype))
        read, written = sum(x.nbytes for x in (*inputs, *parameters)), m(*inputs).nbytes
        expect(cost.bytes_read == read, f"{read} bytes to read, declared {cost.bytes_read}, {dtype}")
        expect(
            cost.bytes_written == written, f"{written} bytes to write, declared {cost.bytes_written}, {dtype}"
        )
        numbers = sum(x.numel() for x in parameters)
        expect(cost.params == numbers, f"{numbers} numbers are learnt, declared {cost.params}")
    return 2
