"""What the mechanisms inside a model are called with, whichever library the model comes from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import inputs
from ..mechanisms import FullAttention, Mechanism

_FORWARD = inspect.signature(Mechanism.forward)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a mechanism."""

    mechanism: Mechanism
    q: Tensor
    k: Tensor
    v: Tensor
    masks: Mapping[str, Any]

    @classmethod
    def of(cls, mechanism: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call whose arguments a forward hook was given."""
        given = _FORWARD.bind(mechanism, *args, **kwargs).arguments
        return cls(*(given.pop(name) for name in ("self", "q", "k", "v")), masks=given)

    def exact(self) -> FullAttention:
        """Softmax attention to every key that is not masked, with the mechanism's causality and scale."""
        return FullAttention(is_causal=self.mechanism.is_causal, scale=self.mechanism.scale)

    def offset(self) -> int | Tensor:
        """The position of the first query."""
        return inputs.resolve_offset(
            self.masks.get("q_offset"),
            self.q.shape[2],
            self.k.shape[2],
            self.mechanism.is_causal,
            self.q.device,
        )

    def real_queries(self) -> Tensor:
        """(B, L) bool: False where a query is padding itself, so that nobody reads its output.

        Queries are taken to be the tokens of the keys, and `key_mask` to speak of them too, if the mechanism is
        causal, or there are as many queries as keys.
        """
        key_mask, q_len, num_keys = self.masks.get("key_mask"), self.q.shape[2], self.k.shape[2]
        if key_mask is None or not (self.mechanism.is_causal or q_len == num_keys) or num_keys == 0:
            return torch.ones(len(self.q), q_len, dtype=torch.bool, device=self.q.device)
        position = torch.arange(q_len, device=self.q.device) + self.offset()
        inside = (position >= 0) & (position < num_keys)
        return key_mask[:, position.clamp(0, num_keys - 1)] | ~inside


def mechanisms_in(model: nn.Module) -> dict[str, Mechanism]:
    """The mechanisms of `model` by their names, but for those inside of others.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if there is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found: dict[str, Mechanism] = {}
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, Mechanism) and not inside:
            found[name] = module
    if not found:
        raise ValueError(
            f"model must hold a Mechanism, and this {type(model).__name__} holds none: "
            "build it with efficient_attn.Attention or MultiheadAttention, or swap its attention first"
        )
    return found


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no cache in models of transformers, which would bypass `forward`; then all as it was."""
    modes = {module: module.training for module in model.modules()}
    configs: dict[int, Any] = {
        id(each): each for each in (getattr(module, "config", None) for module in modes)
    }
    caches = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    model.eval()
    try:
        for config, _ in caches:
            config.use_cache = False
        yield
    finally:
        for config, used in caches:
            config.use_cache = used
        for module, mode in modes.items():
            module.training = mode
