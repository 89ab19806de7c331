"""The attention modules of transformers models, and how a mechanism takes their place."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ...mechanisms import FullAttention, LinearMechanism, Mechanism, SoftmaxMechanism
from ..sites import Site, SwapError, Undo, layer_number
from .attention import NAME, Call
from .cache import StateLayer
from .masks import DENSE
from .saving import KEY, forget, remember

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""The global through which a module that can be swapped reaches its attention function."""

CAUSAL_TEXT = (
    "clip_text_model",
    "clipseg_text_model",
    "groupvit_text_model",
    "metaclip_2_text_model",
    "owlv2_text_model",
    "owlvit_text_model",
    "xclip_text_model",
)
"""The model types that call modules built with is_causal=False with is_causal=True."""

HEAD_SIZES = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
DROPOUTS = ("attention_dropout", "attn_dropout", "dropout", "dropout_prob", "dropout_p", "attn_drop")
"""What modules name their sizes and probabilities."""

CACHES = ("past_key_values", "past_key_value", "layer_past")
"""What models name the cache that they give to an attention module."""

CROSS = ("crossattention", "cross_attention", "cross_attn", "encoder_attn", "EncDecAttention")
"""What models name the attention from one sequence to another."""


def find(model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """The sites of every transformers model inside `model`, and what else there calls itself attention."""
    sites: list[Site] = []
    others: dict[str, str] = {}
    for path, module in model.named_modules():
        if not _is_inside(model, path):
            continue
        if _uses_interface(module):
            sites.append(site_of(path, module))
        elif "Attention" in type(module).__name__ and not _contains_attention(module):
            others[path] = f"{type(module).__name__} does not go through transformers' attention interface"
    return sites, {path: why for path, why in others.items() if not _is_part_of(path, sites)}


def _is_inside(model: nn.Module, path: str) -> bool:
    """Whether a transformers model is `model` itself or stands on the way to `path`."""
    module = model
    for name in path.split(".") if path else ():
        if isinstance(module, PreTrainedModel):
            return True
        module = getattr(module, name)
    return False


def _is_part_of(path: str, sites: list[Site]) -> bool:
    return any(path.startswith(site.path + ".") for site in sites)


def _uses_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and INTERFACE in code.co_names


def _contains_attention(module: nn.Module) -> bool:
    return any("Attention" in type(child).__name__ for child in module.modules() if child is not module)


def site_of(path: str, module: nn.Module) -> Site:
    """What an attention module tells of itself and its config."""
    config: Any = module.config
    heads = _first(module, ("num_heads", "n_heads", "num_attention_heads")) or config.num_attention_heads
    head_dim = _first(module, HEAD_SIZES)
    return Site(
        path=path,
        module=module,
        num_heads=heads,
        num_kv_heads=heads // getattr(module, "num_key_value_groups", 1),
        head_dim=head_dim or config.hidden_size // heads,
        is_causal=bool(_causality(module, config)),
        layer=_first(module, ("layer_idx",), least=0) if hasattr(module, "layer_idx") else layer_number(path),
        is_cross=_is_cross(path, module),
        dropout=_dropout(module),
        window=_window(module, config),
        max_seq_len=getattr(config, "max_position_embeddings", None),
        needs=_needs(module),
    )


def _causality(module: nn.Module, config: Any) -> bool | None:
    """Whether the module is causal: by its own word, or by the masks that its model's source makes; None if unknown."""
    if config.model_type in CAUSAL_TEXT:
        return True
    if hasattr(module, "is_causal"):
        return bool(module.is_causal)
    source = vars(sys.modules[type(module).__module__])
    causal, bidirectional = (f"create_{kind}_mask" in source for kind in ("causal", "bidirectional"))
    return causal if causal != bidirectional else None


def _first(module: nn.Module, names: tuple[str, ...], least: int = 1) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value >= least), None)


def _is_cross(path: str, module: nn.Module) -> bool:
    if any(part in CROSS for part in path.split(".")) or "CrossAttention" in type(module).__name__:
        return True
    beside_causal = getattr(module, "is_decoder", False) and getattr(module, "is_causal", None) is False
    return beside_causal or getattr(module, "is_cross_attention", False)


def _dropout(module: nn.Module) -> float:
    for name in DROPOUTS:
        value = getattr(module, name, None)
        value = value.p if isinstance(value, nn.Dropout) else value
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def _window(module: nn.Module, config: Any) -> int | None:
    """The sliding window that the module will be called with: of its layer if layers differ, else of the model."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window  # type: ignore[return-value]
    if getattr(config, "layer_types", None):
        return None
    return getattr(config, "sliding_window", None)


def _needs(module: nn.Module) -> tuple[str, ...]:
    needs = []
    if getattr(module, "attn_logit_softcapping", None) is not None:
        needs.append("softcap")
    if getattr(module, "sinks", None) is not None:
        needs.append("attention sinks (s_aux)")
    if "position_bias" in inspect.signature(inspect.unwrap(type(module).forward)).parameters:
        needs.append("position_bias")
    return tuple(needs)


def refuse(site: Site, mechanism: Mechanism) -> str | None:
    """Why `mechanism` would be wrong at `site`, if it would."""
    if site.is_cross:
        return "cross-attention is left to the model"
    if _causality(site.module, site.module.config) is None:
        return "neither the module nor its model says whether it is causal"
    if getattr(site.module.config, "num_kv_shared_layers", 0):
        return "layers of this model share keys and values with each other"
    if site.is_causal != mechanism.is_causal:
        return f"the layer has is_causal={site.is_causal}, the mechanism is_causal={mechanism.is_causal}"
    if site.needs and not isinstance(mechanism, FullAttention):
        return f"only full attention can apply the layer's {' and '.join(site.needs)}"
    if hasattr(site.module, NAME):
        return "it is swapped already: restore it first"
    return None


def holds_state(mechanism: Mechanism) -> bool:
    """Whether decoding needs no more than a state of one size, rather than every key and value."""
    if isinstance(mechanism, SoftmaxMechanism):
        return mechanism.is_causal and mechanism.retained is not None
    return isinstance(mechanism, LinearMechanism) and mechanism.is_causal


def install(model: nn.Module, chosen: list[tuple[Site, Mechanism]]) -> Undo:
    """Put each mechanism into its module, and our attention function into the configs that they read."""
    undos = [_install_one(site.module, mechanism) for site, mechanism in chosen]
    undos += _redirect(model, [site.module for site, _ in chosen])
    remember(model, chosen)

    def undo() -> None:
        forget(model, [site for site, _ in chosen])
        for one in reversed(undos):
            one()

    return undo


def _install_one(module: nn.Module, mechanism: Mechanism) -> Undo:
    mechanism.to(next(module.parameters()).device).train(module.training)
    module.add_module(NAME, mechanism)
    hook = listen(module)

    def undo() -> None:
        hook.remove()
        delattr(module, NAME)

    return undo


def listen(module: nn.Module) -> RemovableHandle:
    """Have `tell` called before `module`."""
    parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]
    positions = {name: i for i, name in enumerate(parameters)}
    return module.register_forward_pre_hook(functools.partial(tell, positions), with_kwargs=True)


def _redirect(model: nn.Module, swapped: list[nn.Module]) -> list[Undo]:
    """Have each swapped module read a config that names our function, and the model that makes its masks, if it may.

    Configs are copied, as other models may read them too. Where a model (of transformers) has other attention beside
    the swapped, its masks stay as they are, and only the swapped modules read the copy.
    """
    undos: list[Undo] = []
    for config, modules in _by_config(model):
        if not any(module in swapped for module in modules):
            continue
        shared = copy.copy(config)
        undos += [_give(module, shared) for module in modules]
        undos.append(functools.partial(_hand_back, shared, dict(vars(shared)), config))
        for owner in modules:  # from the outside in
            inner = [module for module in owner.modules() if getattr(module, "config", None) is shared]
            readers = [module for module in inner if _uses_interface(module)]
            if readers and all(module in swapped for module in readers):
                renamed = _renamed(shared, readers)
                undos += [_give(module, renamed) for module in inner]
                undos.append(functools.partial(_hand_back, renamed, dict(vars(renamed)), shared))
    return undos


def _by_config(model: nn.Module) -> list[tuple[Any, list[nn.Module]]]:
    """The modules that read each config, outer ones first."""
    readers: dict[int, tuple[Any, list[nn.Module]]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            readers.setdefault(id(config), (config, []))[1].append(module)
    return list(readers.values())


def _renamed(config: Any, swapped: list[nn.Module]) -> Any:
    renamed = copy.copy(config)
    renamed._attn_implementation_internal = NAME
    setattr(renamed, DENSE, all(isinstance(getattr(module, NAME), FullAttention) for module in swapped))
    return renamed


def _give(module: Any, config: Any) -> Undo:
    before = module.config
    module.config = config

    def undo() -> None:
        module.config = before

    return undo


def _hand_back(copied: Any, before: dict[str, Any], config: Any) -> None:
    """Into the config that was copied, what has changed in the copy since it was as `before`."""
    kept = ("_attn_implementation_internal", KEY, DENSE)
    for name, value in vars(copied).items():
        if name not in kept and (name not in before or value is not before[name]):
            setattr(config, name, value)


def tell(
    positions: dict[str, int], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a module of ours runs: put its state into the cache it is given, and tell the attention function."""
    implementation = module.config._attn_implementation or ""
    swapped = getattr(module, NAME, None)
    if swapped is not None and implementation != NAME:
        raise SwapError(
            f"{type(module).__name__} was swapped, and its attention implementation set to {implementation!r} since: "
            "restore() the swap first"
        )
    if swapped is None and not implementation.startswith(NAME):
        return None

    def argument(name: str) -> Any:
        position = positions.get(name, len(args))
        return args[position] if position < len(args) else kwargs.get(name)

    for name in ("key_value_states", "encoder_hidden_states"):
        if swapped is not None and argument(name) is not None and not getattr(module, "is_causal", False):
            raise SwapError(f"{type(module).__name__} was swapped as self-attention, and is given {name}")
    cache = next((found for name in CACHES if (found := argument(name)) is not None), None)
    if cache is None:
        return None
    length = (args[0] if args else kwargs["hidden_states"]).shape[1]
    return args, {**kwargs, "efficient_attn_call": _call(cache, module, swapped, length)}


def _call(cache: Any, module: Any, swapped: Mechanism | None, length: int) -> Call:
    cache, index = getattr(cache, "self_attention_cache", cache), module.layer_idx
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    # A cache of a window forgets keys that a wider pattern needs.
    forgetful = getattr(layer, "is_sliding", False) and not isinstance(swapped, FullAttention)
    if isinstance(layer, StateLayer) or (swapped is not None and (forgetful or holds_state(swapped))):
        return Call(layer=_state_layer(cache, index, swapped))
    seen = layer.get_seq_length()
    # A static cache counts on in the same tensor.
    seen = seen.clone() if isinstance(seen, torch.Tensor) else seen
    return Call(q_offset=seen - layer.get_mask_sizes(length)[1])


def _state_layer(cache: Any, index: int, mechanism: Mechanism | None) -> StateLayer:
    layer = cache.layers[index]
    if mechanism is None:
        raise ValueError(
            f"the cache holds a state at layer {index}, whose attention is not swapped: start a new one"
        )
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        raise ValueError(
            f"layer {index} keeps a state of its own beside attention: it has no room for a mechanism's"
        )
    if not isinstance(layer, StateLayer):
        if not isinstance(layer.get_seq_length(), torch.Tensor) and layer.get_seq_length():
            raise SwapError(
                f"the cache holds keys and values of layer {index}, from before it was swapped: start a new one"
            )
        layer = cache.layers[index] = StateLayer(mechanism, layer)
    layer.expect(mechanism)
    return layer
