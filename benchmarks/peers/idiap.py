"""pytorch-fast-transformers (idiap): its C++ operator for causal linear attention.

Called as its CausalLinearAttention does, less its two transpositions: the inputs lie ready heads first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_attn import LinearAttention
from efficient_attn.benchmarking.contender import Contender
from efficient_attn.benchmarking.worker import Unsupported

from .contender import Race, needed

EPSILON = 1e-6


def fast_transformers(race: Race) -> Contender:
    """`causal_dot_product` on elu + 1 features, and its normaliser."""
    module = needed("pytorch-fast-transformers", "fast_transformers.causal_product")
    mechanism = race.mechanism
    if not (isinstance(mechanism, LinearAttention) and mechanism.is_causal):
        raise Unsupported("compared for causal linear attention")
    if race.q.dtype != torch.float32:
        raise Unsupported("its operator takes float32 alone")
    q, k, v = race.inputs

    def forward() -> Tensor:
        phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
        norm = torch.einsum("bhnf,bhnf->bhn", phi_q, phi_k.cumsum(2)) + EPSILON
        return module.causal_dot_product(phi_q, phi_k, v) / norm[..., None]

    return Contender(forward, race.inputs, mechanism)
