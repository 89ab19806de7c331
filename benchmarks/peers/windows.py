"""Windows in kernels of others: FlashAttention-2 as torch ships it, and xformers. Both want (B, L, H, E)."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from efficient_attn import FullAttention, SlidingWindowAttention
from efficient_attn.benchmarking.contender import Contender
from efficient_attn.benchmarking.worker import Unsupported

from .contender import Race, heads_first, needed, tokens_first, tried

UNBOUNDED = -1


def varlen(race: Race) -> Contender:
    """torch.nn.attention.varlen.varlen_attn(window_size=): every batch row is one sequence of the packed ones."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unsupported(f"torch {torch.__version__} has no torch.nn.attention.varlen") from error
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        raise Unsupported(f"varlen_attn of torch {torch.__version__} has no window_size")
    _on_a_gpu(race)
    left, right = _reach(race)
    batch, length = race.cell.batch, race.cell.length
    q, k, v = (x.flatten(0, 1).detach().requires_grad_(x.requires_grad) for x in tokens_first(race.inputs))
    starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)

    attend: Callable[..., Tensor] = varlen_attn  # a pair only if it is asked for

    def forward() -> Tensor:
        return attend(q, k, v, starts, starts, length, length, window_size=(left, right))

    tried(forward)
    return Contender(
        forward,
        (q, k, v),
        race.mechanism,
        lambda x: x.unflatten(0, (batch, length)).transpose(1, 2),
        remark="its own layout (B L, H, E)",
    )


def xformers(race: Race) -> Contender:
    """memory_efficient_attention, which takes the best of its kernels for a local or causal bias."""
    bias_types = needed("xformers", "xformers.ops.fmha.attn_bias")
    memory_efficient_attention = needed("xformers", "xformers.ops").memory_efficient_attention
    _on_a_gpu(race)
    left, right = _reach(race)
    bias = None
    if left != UNBOUNDED:
        bias = bias_types.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)
    elif right == 0:
        bias = bias_types.LowerTriangularMask()
    q, k, v = tokens_first(race.inputs)

    def forward() -> Tensor:
        return memory_efficient_attention(q, k, v, attn_bias=bias)

    tried(forward)
    return Contender(forward, (q, k, v), race.mechanism, heads_first, remark="its own layout (B, L, H, E)")


def _on_a_gpu(race: Race) -> None:
    if race.q.device.type != "cuda":
        raise Unsupported(f"has kernels for GPUs, not for {race.q.device.type}")


def _reach(race: Race) -> tuple[int, int]:
    """How many keys before and after itself a query sees; UNBOUNDED: all of them."""
    mechanism = race.mechanism
    if isinstance(mechanism, SlidingWindowAttention):
        if mechanism.num_sinks:
            raise Unsupported("has no sinks")
        side = mechanism.window_size - 1
        return side, 0 if mechanism.is_causal else side
    if isinstance(mechanism, FullAttention):
        return UNBOUNDED, 0 if mechanism.is_causal else UNBOUNDED
    raise Unsupported(f"has windows, not the pattern of {type(mechanism).__name__}")
