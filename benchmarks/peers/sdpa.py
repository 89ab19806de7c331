"""torch's scaled_dot_product_attention: what everybody has, and does a pattern's work with a dense mask.

On a GPU it has several kernels, of which it takes the first that fits; each can be asked for by name.

The mask is built once, outside what is timed. A bool mask is what torch's documentation shows; the CPU kernel turns
it into floats in every call, so a float mask made beforehand is faster, and four times as large.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from efficient_attn import FullAttention
from efficient_attn.benchmarking.contender import Contender
from efficient_attn.benchmarking.worker import Unsupported
from efficient_attn.masks import Everything
from efficient_attn.mechanisms import SoftmaxMechanism

from .contender import Race, tried


def sdpa(race: Race) -> Contender:
    """Full attention, causal if ours is: the same work only for `full`, the common alternative for the others."""
    q, k, v = race.inputs
    causal = race.mechanism.is_causal

    def forward() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return Contender(forward, race.inputs, FullAttention(is_causal=causal))


KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def sdpa_by(kernel: str) -> Callable[[Race], Contender]:
    """Full attention by one kernel, or nothing."""

    def build(race: Race) -> Contender:
        if not isinstance(race.mechanism, FullAttention):
            raise Unsupported("a kernel by name is compared for full attention")
        q, k, v = race.inputs
        causal = race.mechanism.is_causal

        def forward() -> Tensor:
            with sdpa_kernel(KERNELS[kernel]):
                return scaled_dot_product_attention(q, k, v, is_causal=causal)

        tried(forward)
        return Contender(forward, race.inputs, race.mechanism)

    return build


def masked_sdpa(race: Race) -> Contender:
    """The mechanism's pattern, or the causality of one without, as a dense bool mask."""
    return _masked(race, _dense_mask(race))


def float_masked_sdpa(race: Race) -> Contender:
    """The mechanism's pattern as a dense mask of zeros and -inf in the dtype of q."""
    allowed = _dense_mask(race)
    mask = torch.zeros(allowed.shape, dtype=race.q.dtype, device=race.q.device)
    return _masked(race, mask.masked_fill_(~allowed, -torch.inf))


def _masked(race: Race, mask: Tensor) -> Contender:
    q, k, v = race.inputs

    def forward() -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    ours = race.mechanism
    same = isinstance(ours, SoftmaxMechanism)
    return Contender(forward, race.inputs, ours if same else FullAttention(is_causal=ours.is_causal))


def _dense_mask(race: Race, rows_at_once: int = 512) -> Tensor:
    """By strips: the predicate works in int64, and would need 2 GiB a step for all of 16,384 tokens."""
    mask = getattr(race.mechanism, "mask", Everything())
    if mask == Everything():
        raise Unsupported(f"{type(race.mechanism).__name__} has no mask to give to SDPA")
    n, device = race.cell.length, race.q.device
    strips = [
        mask.dense(min(rows_at_once, n - start), n, start, device) for start in range(0, n, rows_at_once)
    ]
    return torch.cat(strips)
