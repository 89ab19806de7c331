"""The peers, by name. Each file says where its idea comes from; none of their code is copied here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from efficient_attn.benchmarking.contender import Contender

from . import fla
from .contender import Race
from .flex_attention import flex
from .idiap import fast_transformers
from .linear_forms import chunks, cumsum, projected_sdpa, two_products
from .lucidrains import linformer, local_attention, performer_pytorch
from .sdpa import KERNELS, float_masked_sdpa, masked_sdpa, sdpa, sdpa_by
from .windows import varlen, xformers

OWN_FORWARD = "own forward"
"""As a peer: not somebody else, but our own forward pass, against our forward and backward."""

PEERS: Mapping[str, Callable[[Race], Contender]] = {
    "SDPA": sdpa,
    **{f"SDPA {kernel}": sdpa_by(kernel) for kernel in KERNELS},
    "masked SDPA": masked_sdpa,
    "masked SDPA, float mask": float_masked_sdpa,
    "flex": flex,
    "cumsum": cumsum,
    "chunks": chunks,
    "fast-transformers": fast_transformers,
    "performer-pytorch": performer_pytorch,
    "linformer": linformer,
    "local-attention": local_attention,
    "FlashAttention-2": varlen,
    "xformers": xformers,
    "fla raw": fla.raw,
    "fla": fla.normalised,
    "two products": two_products,
    "projected SDPA": projected_sdpa,
}

__all__ = ["OWN_FORWARD", "PEERS", "Contender", "Race"]
