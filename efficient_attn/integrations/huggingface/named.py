"""Attention implementations by name, for `from_pretrained(..., attn_implementation="efficient_attn:NAME")`."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ...mechanisms import MECHANISMS, FullAttention, SlidingWindowAttention, create_mechanism
from ...mechanisms.base import Mechanism
from ..sites import build
from .attention import NAME, attend
from .masks import dense_or_flat_mask, flat_mask
from .sites import listen, refuse, site_of

TAKEN = ("flash", "sdpa", "flex_attention", "/", "|")
DEFAULT_NAMES = {"flash": "fused"}
"""What a mechanism is called where transformers would misread its own name."""

GIVEN = ("num_heads", "head_dim", "num_kv_heads", "is_causal")
"""What each module knows of itself."""


def register(mechanism: str, name: str | None = None, **options: Any) -> str:
    """Give transformers an attention implementation; returns what to pass as `attn_implementation`.

    Each module attends by a mechanism of its own, made when it first runs. Keys and values stay in the cache that
    transformers makes; `swap_attention` is the way to a state of constant size, and to learnt parameters.

    Args:
        mechanism: a key of MECHANISMS.
        name: what follows the colon; the mechanism's by default.
        options: of the mechanism.
    Raises:
        ValueError: if the mechanism is unknown or has learnt parameters, or the name has one of the words that mean
            something to transformers.
        TypeError: if the mechanism has no such option.
    """
    trial = create_mechanism(mechanism, num_heads=1, head_dim=8, **{"max_seq_len": 8, **options})
    if any(True for _ in trial.parameters()):
        raise ValueError(
            f"{mechanism} has learnt parameters, which an attention implementation cannot hold: swap it in"
        )
    full = f"{NAME}:{mechanism if name is None else name}"
    if any(word in full for word in TAKEN):
        raise ValueError(
            f"name must contain none of {', '.join(TAKEN)}, which transformers reads, got {full!r}"
        )
    AttentionInterface.register(full, functools.partial(_attention, full, mechanism, options))
    AttentionMaskInterface.register(full, dense_or_flat_mask if mechanism == "full" else flat_mask)
    return full


def register_defaults() -> None:
    """Register each mechanism that has no parameters and no argument without a default, but what modules know."""
    for name, cls in MECHANISMS.items():
        parameters = inspect.signature(cls).parameters.items()
        if all(p.default is not p.empty or key in GIVEN for key, p in parameters):
            register(name, DEFAULT_NAMES.get(name))


def _attention(
    full: str,
    name: str,
    options: dict[str, Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    made = vars(module).get("_efficient_attn")
    if made is None or made[0] != full:
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{full} makes its mechanisms when it first runs: run the model once before compiling it"
            )
        made = full, _made(module, name, options)
        if "_efficient_attn" not in vars(module):
            listen(module)
        object.__setattr__(module, "_efficient_attn", made)
    mechanism = made[1].to(query.device).train(module.training)
    return attend(module, mechanism, query, key, value, attention_mask, **kwargs)


def _made(module: nn.Module, name: str, options: dict[str, Any]) -> Mechanism:
    site = site_of("", module)
    if site.is_cross:
        return FullAttention(dropout_p=site.dropout)
    mechanism = build(site, name, options)
    reason = refuse(site, mechanism)
    if (
        reason is None
        and site.window is not None
        and not isinstance(mechanism, FullAttention | SlidingWindowAttention)
    ):
        reason = f"its cache keeps a window of {site.window}, and {name} looks further back: swap it in"
    if reason is not None:
        raise ValueError(f"{type(module).__name__}: {reason}")
    return mechanism
