"""flash-linear-attention: chunk_linear_attn, called as its documentation shows, on inputs in its layout (B, L, H, E).

It takes features, not queries and keys. `raw` gets them ready and divides nothing, which is less work than ours;
`normalised` computes what ours computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_attn import LinearAttention
from efficient_attn.benchmarking.contender import Contender
from efficient_attn.benchmarking.worker import Unsupported

from .contender import Race, heads_first, needed, tokens_first, tried


class Unnormalised(nn.Module):
    """Of q and k that are features already: q k^T at and below the diagonal."""

    def matrix(self, q: Tensor, k: Tensor, *, q_offset: int) -> Tensor:
        rows = torch.arange(q_offset, q_offset + q.shape[2], device=q.device)[:, None]
        future = torch.arange(k.shape[2], device=q.device) > rows
        return (q @ k.mT).masked_fill(future, 0.0)


def raw(race: Race) -> Contender:
    """On features that lie ready, without the division."""
    chunk_linear_attn = _operator(race)
    given = [
        (F.elu(x) + 1 if features else x).detach().requires_grad_(x.requires_grad)
        for x, features in zip(race.inputs, (True, True, False), strict=True)
    ]
    q, k, v = tokens_first(given)

    def forward() -> Tensor:
        return chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]

    tried(forward)
    return Contender(
        forward,
        (q, k, v),
        Unnormalised(),
        heads_first,
        remark="features lie ready, and nothing is divided: less work than ours",
        given=(given[0], given[1], given[2]),
    )


def normalised(race: Race) -> Contender:
    """elu + 1 in torch, then the operator with its own division."""
    chunk_linear_attn = _operator(race)
    q, k, v = tokens_first(race.inputs)

    def forward() -> Tensor:
        return chunk_linear_attn(F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, normalize=True)[0]

    tried(forward)
    return Contender(
        forward, (q, k, v), race.mechanism, heads_first, remark="elu + 1 in torch, then its operator"
    )


def _operator(race: Race) -> Callable[..., tuple[Tensor, Tensor]]:
    module, mechanism = needed("fla-core", "fla.ops.linear_attn"), race.mechanism
    if not (
        isinstance(mechanism, LinearAttention) and mechanism.is_causal and mechanism.feature_map.name == "elu"
    ):
        raise Unsupported("compared for causal linear attention with elu + 1")
    if race.q.device.type != "cuda":
        raise Unsupported(f"its kernels run on GPUs, not on {race.q.device.type}")
    return module.chunk_linear_attn
