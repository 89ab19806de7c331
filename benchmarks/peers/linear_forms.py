"""The usual ways to write linear attention in torch, with elu + 1 as features, and Linformer.

The causal ones are written here from the equations of Katharopoulos et al., 2020, arXiv:2006.16236: equation 9 summed
token by token, and the chunked form that flash-linear-attention's documentation describes (Yang et al., 2023,
arXiv:2312.06635, section 3), all chunks at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_attn import LinearAttention, LinformerAttention
from efficient_attn.benchmarking.contender import Contender
from efficient_attn.benchmarking.worker import Unsupported

from .contender import Race

CHUNK = 64
LARGEST = 1 << 30
"""Bytes of one product of features and values; the features are cut into the fewest equal parts that stay below."""


def cumsum(race: Race) -> Contender:
    """out_i = phi(q_i) S_i / phi(q_i) z_i, with S = cumsum(phi(k) v^T) and z = cumsum(phi(k)) written out."""
    q, k, v = _causal_elu(race)
    parts = _parts(race)

    def forward() -> Tensor:
        phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
        norm = (phi_q * phi_k.cumsum(2)).sum(-1, keepdim=True)
        out = torch.zeros_like(v)
        for queries, keys in zip(phi_q.chunk(parts, -1), phi_k.chunk(parts, -1), strict=True):
            states = torch.einsum("bhnf,bhne->bhnfe", keys, v).cumsum(2)
            out = out + torch.einsum("bhnf,bhnfe->bhne", queries, states)
        return out / norm

    remark = "in one piece" if parts == 1 else f"features in {parts} parts"
    return Contender(forward, race.inputs, race.mechanism, remark=remark)


def chunks(race: Race) -> Contender:
    """Chunks of 64: quadratic inside, all of them in one bmm; between them an exclusive cumsum of their states."""
    q, k, v = _causal_elu(race)
    if race.cell.length % CHUNK:
        raise Unsupported(f"written for multiples of {CHUNK} tokens, got {race.cell.length}")
    shape = (*q.shape[:2], race.cell.length // CHUNK, CHUNK, -1)
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)

    def forward() -> Tensor:
        phi_q, phi_k = (F.elu(q) + 1).view(shape), (F.elu(k) + 1).view(shape)
        values = F.pad(v, (0, 1), value=1.0).view(shape)  # the column of ones sums to the norm
        states = phi_k.mT @ values
        before = F.pad(states[:, :, :-1].cumsum(2), (0, 0, 0, 0, 1, 0))
        within = (phi_q @ phi_k.mT).masked_fill(future, 0)
        out = (phi_q @ before + within @ values).flatten(2, 3)
        return out[..., :-1] / out[..., -1:]

    return Contender(forward, race.inputs, race.mechanism)


def two_products(race: Race) -> Contender:
    """phi(q) (phi(k)^T v), each row divided by phi(q) (phi(k)^T 1)."""
    mechanism = race.mechanism
    if (
        not isinstance(mechanism, LinearAttention)
        or mechanism.is_causal
        or mechanism.feature_map.name != "elu"
    ):
        raise Unsupported("written for linear attention with elu + 1 that is not causal")
    q, k, v = race.inputs

    def forward() -> Tensor:
        phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
        out = phi_q @ (phi_k.mT @ v)
        return out / (phi_q @ phi_k.sum(2, keepdim=True).mT)

    return Contender(forward, race.inputs, mechanism)


def projected_sdpa(race: Race) -> Contender:
    """Linformer as two products, E^T k and F^T v, and SDPA over what they leave."""
    mechanism = race.mechanism
    if not isinstance(mechanism, LinformerAttention) or mechanism.value_projection is None:
        raise Unsupported("written for Linformer with one E and one F for all heads")
    q, k, v = race.inputs
    e, f = mechanism.key_projection, mechanism.value_projection

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, e.mT @ k, f.mT @ v)

    return Contender(forward, (*race.inputs, *mechanism.parameters()), mechanism)


def _causal_elu(race: Race) -> tuple[Tensor, Tensor, Tensor]:
    mechanism = race.mechanism
    if not (
        isinstance(mechanism, LinearAttention) and mechanism.is_causal and mechanism.feature_map.name == "elu"
    ):
        raise Unsupported("written for causal linear attention with elu + 1")
    return race.inputs


def _parts(race: Race) -> int:
    """A power of two of equal parts of the features."""
    whole = race.v.numel() * race.cell.head_dim * race.v.element_size()
    parts = 1
    while whole // parts > LARGEST and parts < race.cell.head_dim:
        parts *= 2
    return parts
