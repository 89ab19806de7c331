"""Bad inputs are refused with the right type, and a message that says what came and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from bad_inputs import CASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_attn import MECHANISMS, BackendError, FlashAttention, Mechanism, Shape
from efficient_attn.state import State

BATCH, HEADS, KV_HEADS, LENGTH, HEAD_DIM = 2, 4, 2, 6, 8

EXAMPLES = [m for cls in MECHANISMS.values() for m in cls.examples(LENGTH, HEADS, HEAD_DIM)]
WITHOUT_BIAS = [m for m in EXAMPLES if not m.supports_bias]
WITHOUT_SEGMENTS = [m for m in EXAMPLES if not m.supports_segments]
CAUSAL = [m for m in EXAMPLES if m.is_causal]


def label(mechanism: Mechanism) -> str:
    return re.sub(r"\s+", "", repr(mechanism))


def tokens(length: int, kv_heads: int = KV_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(BATCH, HEADS, length, HEAD_DIM)
    k, v = torch.randn(2, BATCH, kv_heads, length, HEAD_DIM)
    return q, k, v


def check_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    """`call` must raise exactly `error`, with `message`, in which `...` stands for any text."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error, repr(caught.value)
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    assert re.fullmatch(pattern, str(caught.value), re.DOTALL), f"{caught.value}\nis not\n{message}"


class NoReading(TorchDispatchMode):
    """Forbids bringing a tensor's value to Python: an accelerator would have to stop for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a check reads a value"
        return func(*args, **(kwargs or {}))


def test_the_table_is_as_long_as_promised() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize(
    ("call", "error", "message"), [pytest.param(*case, id=case[2][:80]) for case in CASES]
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with NoReading():
        check_refused(call, error, message)


@pytest.mark.parametrize("method", ["forward", "matrix", "explain"])
@pytest.mark.parametrize("mechanism", WITHOUT_BIAS, ids=label)
def test_attn_bias_is_refused_by_all_but_full(mechanism: Mechanism, method: str) -> None:
    inputs = tokens(LENGTH, mechanism.num_kv_heads or KV_HEADS)[: 2 if method == "matrix" else 3]
    bias = torch.zeros(LENGTH, LENGTH)
    check_refused(
        lambda: getattr(mechanism, method)(*inputs, attn_bias=bias),
        ValueError,
        f"{type(mechanism).__name__} cannot honour attn_bias: only FullAttention adds a bias",
    )


@pytest.mark.parametrize("method", ["forward", "matrix", "explain"])
@pytest.mark.parametrize("mechanism", WITHOUT_SEGMENTS, ids=label)
def test_segment_ids_are_refused_by_anchored_patterns(mechanism: Mechanism, method: str) -> None:
    inputs = tokens(LENGTH, mechanism.num_kv_heads or KV_HEADS)[: 2 if method == "matrix" else 3]
    segments = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    check_refused(
        lambda: getattr(mechanism, method)(*inputs, segment_ids=segments),
        ValueError,
        f"{type(mechanism).__name__} cannot honour segment_ids: ...",
    )


def test_the_anchored_mechanisms_are_those_of_the_contract() -> None:
    anchored = {name for name, cls in MECHANISMS.items() if any(isinstance(m, cls) for m in WITHOUT_SEGMENTS)}
    assert anchored >= {"sliding_window", "longformer", "bigbird", "sparse_transformer", "linformer"}


@pytest.mark.parametrize("mechanism", EXAMPLES, ids=label)
def test_cost_refuses_a_backend_that_the_mechanism_has_not(mechanism: Mechanism) -> None:
    shape = Shape(BATCH, HEADS, LENGTH, LENGTH, HEAD_DIM)
    allowed = ["auto", *(backend.name for backend in mechanism.backends)]
    message = f"backend must be one of {allowed}, got 'cuda'"
    check_refused(lambda: mechanism.cost(shape, backend="cuda"), ValueError, message)


def contents(state: State) -> dict[str, Any]:
    held = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: t.clone() if isinstance(t, Tensor) else t for name, t in held.items()}


def check_same(state: State, before: dict[str, Any]) -> None:
    after = contents(state)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, f"{name} has changed"


@pytest.mark.parametrize("mechanism", CAUSAL, ids=label)
def test_a_refused_step_leaves_the_state_usable(mechanism: Mechanism) -> None:
    state = mechanism.init_state(BATCH, KV_HEADS, HEAD_DIM)
    valid = torch.tensor([[False, True, True], [True, False, True]])
    _, state = mechanism.step(*tokens(3), state, key_mask=valid)
    before, copy = contents(state), state.clone()

    q, k, v = tokens(4)
    good = torch.ones(BATCH, 4, dtype=torch.bool)
    refused: list[tuple[Any, Any, Any, Any]] = [
        (q[0], k, v, None),
        (q[:, :, 1:], k, v, None),
        (q, k, v.double(), None),
        (q.double(), k.double(), v.double(), None),
        (q[:1], k[:1], v[:1], None),
        (q, k[:, :1], v[:, :1], None),
        (q[..., :4], k[..., :4], v, None),
        (q, k, v[..., :4], None),
        (q, k, v, good.int()),
        (q, k, v, good[:, 1:]),
    ]
    for bad_q, bad_k, bad_v, key_mask in refused:
        with pytest.raises((TypeError, ValueError)):
            mechanism.step(bad_q, bad_k, bad_v, state, key_mask=key_mask)
        check_same(state, before)
    with pytest.raises(TypeError, match="indices"):
        state.reorder(torch.tensor([0.0, 1.0]))
    check_same(state, before)

    out, after = mechanism.step(q, k, v, state)
    expected, after_copy = mechanism.step(q, k, v, copy)
    assert torch.equal(out, expected)
    check_same(after, contents(after_copy))


def test_a_step_that_no_backend_can_run_leaves_the_state_usable() -> None:
    flash = FlashAttention(is_causal=True)
    _, state = flash.step(*tokens(3), flash.init_state(BATCH, KV_HEADS, HEAD_DIM))
    before = contents(state)
    q, k, v = tokens(2)
    with pytest.raises(BackendError, match=r"sdpa_cudnn: .*cuda, not cpu"):
        FlashAttention(is_causal=True, backend="sdpa_cudnn").step(q, k, v, state)
    check_same(state, before)
    out, _ = flash.step(q, k, v, state)
    assert out.isfinite().all()
