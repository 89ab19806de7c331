"""What attention costs: time, the allocator's peak, what autograd keeps, and the state of decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from efficient_attn import Attention, Mechanism, Shape
from efficient_attn.benchmarking.allocations import peak_allocated
from efficient_attn.benchmarking.worker import Unsupported

from . import DemoError
from .model import Rotary, Settings, build_model, make_mechanism
from .train import next_byte_loss

LONG_ENOUGH = 0.3
MOST_REPEATS = 5


def allocated_peak(work: Callable[[], object]) -> int:
    """The most bytes that `work` held at one moment beyond what was held before it.

    From the CPU allocator's own records: every allocation counts, those inside an operator too; what was held
    before does not, which is why this tells mechanisms apart and the process's resident size would not.
    """
    try:
        return peak_allocated(work)
    except Unsupported as error:
        raise DemoError(f"peak memory cannot be measured: {error}") from error


def training_step_peak(name: str, settings: Settings) -> int:
    """Peak bytes of one forward and backward of the whole model at the trained size, gradients included."""
    model = build_model(name, settings)
    tokens = torch.zeros(settings.batch_size, settings.context + 1, dtype=torch.long)
    return allocated_peak(lambda: next_byte_loss(model, tokens).backward())


def saved_bytes(name: str, settings: Settings) -> dict[str, int]:
    """What one mechanism keeps for its backward at the trained size: declared, and seen kept by autograd."""
    mechanism = make_mechanism(name, settings)
    shape = (settings.batch_size, settings.num_heads, settings.context, settings.head_dim)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = mechanism(q, k, v)  # held until the count is read: a freed pointer could come back
    own = {p.untyped_storage().data_ptr() for p in (*mechanism.parameters(), *mechanism.buffers())}
    measured = sum(size for pointer, size in kept.items() if pointer not in own)
    del y
    return {
        "declared": _cost(mechanism, settings, settings.batch_size, settings.context, True).saved_bytes,
        "measured": measured,
    }


def state_bytes(name: str, settings: Settings, *, measured_up_to: int = 4096) -> dict[str, dict[int, int]]:
    """Bytes of one layer's decoding state, for one sequence: declared, and of real states where cheap."""
    declared: dict[int, int] = {}
    measured: dict[int, int] = {}
    for length in settings.state_lengths:
        mechanism = make_mechanism(name, settings, max_seq_len=length)
        declared[length] = _cost(mechanism, settings, 1, length, False).state_bytes
        if length <= measured_up_to:
            measured[length] = _stepped_state_bytes(mechanism, settings, length)
    return {"declared": declared, "measured": measured}


def layer_scaling(
    name: str, settings: Settings, report: Callable[[], None] = lambda: None
) -> dict[int, dict[str, float]]:
    """One attention layer, projections included, one sequence: seconds and peak bytes at growing lengths."""
    rows: dict[int, dict[str, float]] = {}
    for length in settings.scaling_lengths:
        generator = torch.Generator().manual_seed(settings.seed)
        mechanism = make_mechanism(name, settings, max_seq_len=length)
        layer = Attention(settings.d_model, settings.num_heads, mechanism, rotary=Rotary(settings.head_dim))
        x = torch.randn(1, length, settings.d_model, generator=generator)

        def forward(layer: Attention = layer, x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return layer(x)

        def forward_backward(layer: Attention = layer, x: Tensor = x) -> None:
            layer.zero_grad()
            layer(x).sum().backward()

        peak = allocated_peak(forward_backward)  # the warm-up, too
        rows[length] = {
            "forward_seconds": seconds(forward),
            "forward_backward_seconds": seconds(forward_backward),
            "peak_bytes": peak,
        }
        report()
    return rows


def seconds(work: Callable[[], object]) -> float:
    """The fastest of a few repeats: the one that other programs disturbed least."""
    fastest, spent, repeats = float("inf"), 0.0, 0
    while repeats < MOST_REPEATS and (repeats == 0 or spent < LONG_ENOUGH):
        began = time.perf_counter()
        work()
        took = time.perf_counter() - began
        fastest, spent, repeats = min(fastest, took), spent + took, repeats + 1
    return fastest


def _cost(mechanism: Mechanism, settings: Settings, batch: int, length: int, training: bool) -> Any:
    shape = Shape(batch, settings.num_heads, length, length, settings.head_dim, dtype=torch.float32)
    return mechanism.cost(shape, training=training)


def _stepped_state_bytes(mechanism: Mechanism, settings: Settings, length: int) -> int:
    state = mechanism.init_state(1, settings.num_heads, settings.head_dim, dtype=torch.float32)
    with torch.no_grad():
        for size in (length - 1, 1):
            q, k, v = torch.randn(3, 1, settings.num_heads, size, settings.head_dim)
            _, state = mechanism.step(q, k, v, state)
    return state.nbytes
