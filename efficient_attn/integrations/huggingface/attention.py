"""The attention function: what transformers calls in place of its own, with a mechanism of ours inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _active_collector

from ...masks import segment_ids_from_cu_seqlens
from ...mechanisms import FullAttention
from ...mechanisms.base import Mechanism
from .cache import StateLayer
from .dense import softcapped
from .lowering import Masks, lower, lower_new

NAME = "efficient_attn"
"""Of the attention and mask functions, of the submodule that holds the mechanism, and of the key in a config."""

REFUSED = (
    "head_mask",
    "layer_head_mask",
    "cache",
    "block_table",
    "indices",
    "block_indices",
    "topk_indices",
    "indexer_topk_indices",
    "sinks",
    "alibi",
)
"""What some model may hand over that changes the result, and that nothing here knows."""


@dataclass
class Call:
    """What an attention module is told of its cache before it runs.

    Attributes:
        layer: the state that this layer keeps, if it keeps one in place of keys and values.
        q_offset: where the first query stands among the keys that it will be given; None without a cache.
        used: whether the attention function has been called already: a state must not take its tokens twice.
    """

    layer: StateLayer | None = None
    q_offset: int | Tensor | None = None
    used: bool = False


def attend_swapped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for a swapped module: `attend` by the mechanism that the module holds."""
    mechanism = getattr(module, NAME, None)
    if mechanism is None:
        raise ValueError(
            f"{type(module).__name__} has no mechanism: choose one with swap_attention, "
            f"or set attn_implementation to '{NAME}:' and a mechanism's name"
        )
    return attend(module, mechanism, query, key, value, attention_mask, **kwargs)


def attend(
    module: nn.Module,
    mechanism: Mechanism,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    efficient_attn_call: Call | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, as transformers asks for it.

    Args:
        query: (B, H, L, E).
        key, value: (B, Hkv, S, E) and (B, Hkv, S, Ev).
        attention_mask: None; (B, S) bool or segments from our mask function; (B, 1 or H, L, S), bool with True = may
            attend, or float to add.
        dropout: of the weights; the mechanism's own is set when it is swapped in.
        scaling: the softmax scale.
        is_causal: overrides the module's own word.
        sliding_window: the model's window, which full attention keeps to.
        position_bias: added to the scores; full attention only.
        softcap: c in c tanh(score / c); full attention only.
        s_aux: a score for each head that stands for no key; full attention only.
    Returns:
        The outputs (B, L, H, Ev) and, if they are asked for, the weights.
    Raises:
        ValueError: for anything that the mechanism cannot honour.
    """
    call = efficient_attn_call or Call()
    _check_causal(module, mechanism, is_causal)
    _check_kwargs(kwargs)
    _take_over(mechanism, scaling, dropout, query.shape[3])
    query, key, value = _one_dtype(query, key, value)
    full = isinstance(mechanism, FullAttention)
    wants_weights = _wants_weights(module, kwargs)
    if wants_weights and not full:
        raise ValueError(
            f"{type(mechanism).__name__} cannot honour output_attentions=True: weights take O(L S) time and memory; "
            "its matrix method writes them"
        )
    extras = {"position_bias": position_bias, "softcap": softcap, "s_aux": s_aux}
    for name, extra in extras.items():
        if extra is not None and not full:
            raise ValueError(f"{type(mechanism).__name__} cannot honour {name}: only FullAttention does")

    if call.layer is not None:
        if wants_weights:
            raise ValueError("output_attentions=True needs every key: use_cache=False")
        if kwargs.get("cu_seq_lens_q") is None:
            return _by_state(call, mechanism, query, key, value, attention_mask, sliding_window), None
        if call.layer.seen:
            raise ValueError("packed documents (cu_seq_lens_q) cannot follow what a cache holds")
        call.layer.spoil("it was given packed documents, of which a state cannot be kept")

    masks = lower(attention_mask, query, key, call.q_offset, mechanism, sliding_window, position_bias)
    if masks.num_keys < key.shape[2]:
        key, value = key[:, :, : masks.num_keys], value[:, :, : masks.num_keys]
    if kwargs.get("cu_seq_lens_q") is not None:
        masks.segment_ids = _packed(kwargs["cu_seq_lens_q"], masks, key)
    if softcap is not None or s_aux is not None:
        out, weights = softcapped(mechanism, query, key, value, masks, softcap, s_aux)
    else:
        out, weights = mechanism(query, key, value, **masks.arguments), None
    if wants_weights:
        weights = mechanism.matrix(query, key, **masks.arguments) if weights is None else weights
        return out.transpose(1, 2).contiguous(), weights.to(query.dtype)
    return out.transpose(1, 2).contiguous(), None


def _check_causal(module: nn.Module, mechanism: Mechanism, is_causal: bool | None) -> None:
    expected = getattr(module, "is_causal", mechanism.is_causal) if is_causal is None else is_causal
    if bool(expected) != mechanism.is_causal:
        raise ValueError(
            f"{type(module).__name__} wants is_causal={bool(expected)}, {type(mechanism).__name__} was built with "
            f"is_causal={mechanism.is_causal}"
        )


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"efficient_attn cannot honour {name}")


def _by_state(
    call: Call, mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None
) -> Tensor:
    layer = call.layer
    assert layer is not None
    if call.used:
        raise ValueError(
            f"this layer calls its attention more than once: {type(mechanism).__name__} cannot keep a state for it"
        )
    call.used = True
    valid, past = lower_new(mask, q.shape[2], layer.seen, mechanism, window)
    if mask is None and layer.is_sliding:  # it says nothing of those before the model's window
        past = None
    return layer.attend(q, k, v, valid, past).transpose(1, 2).contiguous()


def _take_over(mechanism: Mechanism, scaling: float | None, dropout: float, head_dim: int) -> None:
    """Give the mechanism the model's softmax scale and dropout, which some models tell only when they call."""
    if scaling is not None and scaling != mechanism.scale:
        if mechanism.scale is not None:
            raise ValueError(
                f"{type(mechanism).__name__} was built with scale={mechanism.scale}, the model asks for {scaling}"
            )
        if scaling != head_dim**-0.5:
            mechanism.scale = scaling
    if dropout and mechanism.dropout_p == 0.0 and "dropout_p" not in mechanism.arguments:
        mechanism.dropout_p = dropout


def _one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in one dtype: under autocast rotary embeddings leave q and k finer than v."""
    if len({x.dtype for x in tensors}) == 1:
        return tensors
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(torch.promote_types(tensors[0].dtype, tensors[1].dtype), tensors[2].dtype)
    return tuple(x.to(dtype) for x in tensors)


def _packed(cu_seqlens: Tensor, masks: Masks, key: Tensor) -> Tensor:
    if masks.key_mask is not None or masks.q_offset not in (None, 0) or key.shape[0] != 1:
        raise ValueError("cu_seq_lens_q packs one row without a mask or a cache; got more")
    return segment_ids_from_cu_seqlens(cu_seqlens, key.shape[2]).reshape(1, -1)


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether weights are asked for, of this call or by the model, which collects what its layers return."""
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(module.config, "output_attentions", False)
    if torch.compiler.is_compiling():
        return bool(asked)
    return bool(asked) or any(name.endswith("attentions") for name in _active_collector.get() or ())
