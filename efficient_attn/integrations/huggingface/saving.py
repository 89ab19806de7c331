"""A swap in a model's config, so that it is saved with the model, and what a checkpoint holds of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from ...mechanisms import MECHANISMS
from ...mechanisms.base import Mechanism
from ..sites import Site, SwapError

KEY = "efficient_attn"
"""In a model's config: the mechanism of each swapped module, by the module's path."""


WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""The arguments of `from_pretrained` that say where a model is."""


def models_in(model: nn.Module) -> Iterable[tuple[str, PreTrainedModel]]:
    """Each transformers model that is not inside another one, by its path with a dot at the end."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        if isinstance(module, PreTrainedModel) and not prefix.startswith(inside or ("\0",)):
            inside = (*inside, prefix)
            yield prefix, module


def remember(model: nn.Module, chosen: list[tuple[Site, Mechanism]]) -> None:
    """Write the swap into the config of each transformers model in `model`, beside what is swapped there already."""
    for prefix, inner in models_in(model):
        new = {
            site.path.removeprefix(prefix): describe(mechanism)
            for site, mechanism in chosen
            if site.path.startswith(prefix)
        }
        if new:
            setattr(inner.config, KEY, {**_described(inner), **new})


def forget(model: nn.Module, sites: list[Site]) -> None:
    """Take the sites out of the configs again."""
    gone = {site.path for site in sites}
    for prefix, inner in models_in(model):
        left = {path: one for path, one in _described(inner).items() if prefix + path not in gone}
        if left:
            setattr(inner.config, KEY, left)
        elif hasattr(inner.config, KEY):
            delattr(inner.config, KEY)


def _described(model: PreTrainedModel) -> dict[str, Any]:
    """What the config says of modules that do hold a mechanism: it may be that of a checkpoint that was swapped."""
    described: dict[str, Any] = getattr(model.config, KEY, None) or {}
    modules = dict(model.named_modules())
    return {path: one for path, one in described.items() if hasattr(modules.get(path), KEY)}


def describe(mechanism: Mechanism) -> dict[str, Any]:
    """A mechanism as JSON: its name in MECHANISMS and its arguments; or how it prints, if that cannot say it all."""
    name = next((name for name, cls in MECHANISMS.items() if cls is type(mechanism)), None)
    try:
        arguments = json.loads(json.dumps(mechanism.arguments))
    except TypeError:
        name, arguments = None, {}
    if name is None:
        return {"mechanism": None, "repr": str(mechanism)}
    return {"mechanism": name, "arguments": arguments}


def rebuild(path: str, described: dict[str, Any]) -> Mechanism:
    """The mechanism that `describe` described.

    Raises:
        SwapError: if the description names none, or the mechanism refuses its arguments.
    """
    name, arguments = described.get("mechanism"), described.get("arguments", {})
    if name not in MECHANISMS:
        what = described.get("repr", name)
        raise SwapError(
            f"{path} was swapped to {what}, which a config cannot describe: load the model and swap it"
        )
    try:
        return MECHANISMS[str(name)](**arguments)
    except (TypeError, ValueError) as error:
        raise SwapError(f"{path} cannot be made {name} with {arguments} again: {error}") from error


def load(path: str, model_class: Any, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Mechanism]]:
    """The model of a checkpoint before its swap, and the mechanism of each path that was swapped.

    Raises:
        SwapError: as `load_swapped` does.
    """
    config = AutoConfig.from_pretrained(path, **_where(kwargs))
    described: dict[str, Any] = getattr(config, KEY, None) or {}
    if not described:
        raise SwapError(f"{path} holds no swapped model: its config has no {KEY!r}")
    mechanisms = {name: rebuild(name, one) for name, one in described.items()}
    if model_class is None:
        model_class = getattr(transformers, (config.architectures or ["?"])[0])
    model, info = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    delattr(model.config, KEY)
    strange = [key for key in info["unexpected_keys"] if f".{KEY}." not in key]
    if strange or info["missing_keys"]:
        raise SwapError(f"{path}: unexpected {strange}, missing {sorted(info['missing_keys'])}")
    return model, mechanisms


def load_mechanisms(path: str, mechanisms: dict[str, Mechanism], kwargs: dict[str, Any]) -> None:
    """Load into each mechanism what the checkpoint holds of it: its parameters and buffers."""
    saved = _tensors(path, _where(kwargs), f".{KEY}.")
    for name, mechanism in mechanisms.items():
        prefix = f"{name}.{KEY}."
        own = {key.removeprefix(prefix): x for key, x in saved.items() if key.startswith(prefix)}
        mechanism.load_state_dict(own)


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in WHERE if name in kwargs}


def _tensors(path: str, where: dict[str, Any], wanted: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names contain `wanted`."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in _files(path, where):
        with safe_open(file, "pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in tensors.keys() if wanted in key}  # noqa: SIM118
    return found


def _files(path: str, where: dict[str, Any]) -> list[str]:
    def locate(name: str) -> str | None:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)

    index = locate("model.safetensors.index.json")
    if index is None:
        single = locate("model.safetensors")
        return [] if single is None else [single]
    names = set(json.loads(Path(index).read_text())["weight_map"].values())
    return [file for name in sorted(names) if (file := locate(name)) is not None]
