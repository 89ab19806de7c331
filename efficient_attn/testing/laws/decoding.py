"""Decoding is the forward pass, a few tokens at a time."""

from __future__ import annotations

import pickle

import torch
from torch import Tensor

from ...complexity import Shape
from ...mechanisms import Mechanism
from ...state import State
from ..sampling import LENGTH, V_HEAD_DIM, holes, in_dtype, sample
from .budgets import within_budget
from .law import expect, expect_close, law

_CHUNKINGS = ([1] * LENGTH, [LENGTH], [20, 1, 16], [5, 30, 2], [1, 36])


def _start(m: Mechanism, k: Tensor, v: Tensor) -> State:
    return m.init_state(k.shape[0], k.shape[1], k.shape[3], v_head_dim=v.shape[3], dtype=k.dtype)


def _decode(
    m: Mechanism, inputs: tuple[Tensor, ...], mask: Tensor | None, sizes: list[int], state: State
) -> tuple[Tensor, State]:
    outputs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        key_mask = None if mask is None else mask[:, part]
        q, k, v = (x[:, :, part] for x in inputs)
        out, state = m.step(q, k, v, state, key_mask=key_mask)
        outputs.append(out)
        start += size
    return torch.cat(outputs, 2), state


@law(lambda m: m.is_causal)
def stepping_equals_forward(mechanism: Mechanism) -> int:
    """Any chunking of `step` gives the outputs of `forward`, left padding and holes included, whatever they hold."""
    m = in_dtype(mechanism, torch.float64)
    for mask in (None, holes(LENGTH)):
        inputs = sample(m)
        whole = m(*inputs, key_mask=mask)
        if mask is not None:
            q, k, v = inputs
            inputs = q, *(x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
        for sizes in _CHUNKINGS:
            out, _ = _decode(m, inputs, mask, sizes, _start(m, *inputs[1:]))
            expect_close(out, whole, f"chunks {sizes[:4]}, {'no mask' if mask is None else 'key_mask'}")
    return 2 * len(_CHUNKINGS)


@law(lambda m: m.is_causal)
def steps_take_nothing(mechanism: Mechanism) -> int:
    """No new token changes nothing, before the first token or later; no batch gives no output, and no error."""
    m = in_dtype(mechanism, torch.float64)
    inputs = sample(m)
    out, _ = _decode(m, inputs, None, [0, 20, 0, 0, 17, 0], _start(m, *inputs[1:]))
    expect_close(out, m(*inputs), "with empty steps in between")
    nobody = tuple(x[:0] for x in inputs)
    out, state = _decode(m, nobody, holes(LENGTH)[:0], [0, 1, 36], _start(m, *nobody[1:]))
    expect(out.shape == m(*nobody).shape, f"output {tuple(out.shape)} of no rows")
    expect(state.nbytes == 0, f"the state of no rows takes {state.nbytes} bytes")
    return 2


@law(lambda m: m.is_causal)
def stepping_keeps_precision(mechanism: Mechanism) -> int:
    """Token by token in bfloat16, errors are those of `forward`: the state is as precise as its sums need."""
    exact = in_dtype(mechanism, torch.float64)
    m = in_dtype(mechanism, torch.bfloat16)
    inputs = sample(m, 150, dtype=torch.bfloat16, batch=1)
    out, _ = _decode(m, inputs, None, [1] * 150, _start(m, *inputs[1:]))
    truth = exact(*(x.double() for x in inputs))
    within_budget(out, m(*inputs), truth, "150 single steps in bfloat16")
    return 1


@law(lambda m: m.is_causal)
def state_size_is_declared(mechanism: Mechanism) -> int:
    """The state's bytes are those that `cost` declares, at every length and dtype."""
    cases = 0
    for dtype in (torch.float32, torch.bfloat16):
        m = in_dtype(mechanism, dtype)
        q, k, v = sample(m, dtype=dtype)
        state = _start(m, k, v)
        for length in range(1, LENGTH + 1):
            new = slice(length - 1, length)
            _, state = m.step(q[:, :, new], k[:, :, new], v[:, :, new], state)
            shape = Shape(
                2,
                q.shape[1],
                1,
                length,
                q.shape[3],
                num_kv_heads=k.shape[1],
                v_head_dim=V_HEAD_DIM,
                dtype=dtype,
            )
            declared = m.cost(shape, phase="decode").state_bytes
            expect(
                state.nbytes == declared, f"{state.nbytes} bytes after {length} tokens, declared {declared}"
            )
            cases += 1
    return cases


@law(lambda m: m.is_causal)
def state_can_be_moved_about(mechanism: Mechanism) -> int:
    """A state that was cloned, pickled or reordered goes on as the rows that it holds would have."""
    m = in_dtype(mechanism, torch.float64)
    inputs, mask = sample(m), holes(LENGTH)
    whole = m(*inputs, key_mask=mask)[:, :, 20:]
    rest = tuple(x[:, :, 20:] for x in inputs)
    _, state = _decode(m, tuple(x[:, :, :20] for x in inputs), mask[:, :20], [20], _start(m, *inputs[1:]))

    twin, thawed = state.clone(), pickle.loads(pickle.dumps(state))
    order = torch.tensor([1, 0, 1])
    beams = state.reorder(order)
    for name, copy in (("the state itself", state), ("its clone", twin), ("its pickle", thawed)):
        out, _ = _decode(m, rest, mask[:, 20:], [7, 10], copy)
        expect_close(out, whole, name)
    out, _ = _decode(m, tuple(x[order] for x in rest), mask[order, 20:], [1] * 17, beams)
    expect_close(out, whole[order], "rows reordered")
    return 4
