"""Where a model attends: what an adapter of another library finds, and what it can do there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import nn

from ..mechanisms import MECHANISMS, create_mechanism
from ..mechanisms.base import Mechanism

Undo = Callable[[], None]


class SwapError(ValueError):
    """A swap that cannot be made, or would compute something else than it says."""


@dataclass(frozen=True)
class Site:
    """One attention module of a model.

    Attributes:
        path: its name in the model.
        module: the module itself.
        layer: its number among the layers of its stack, if it can be told.
        num_heads, num_kv_heads, head_dim: its sizes.
        is_causal: whether a query sees only what came before it.
        is_cross: whether keys and values come from another sequence.
        dropout: of attention weights, in training.
        window: the model's own sliding window, in tokens.
        max_seq_len: the longest sequence that the model takes, if it says.
        causal_by_mask: whether causality, if any, comes as a mask with each call.
        needs: what the model adds to the scores ("softcap", ...), which only full attention can do.
    """

    path: str
    module: nn.Module = field(repr=False)
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_causal: bool
    layer: int | None = None
    is_cross: bool = False
    dropout: float = 0.0
    window: int | None = None
    max_seq_len: int | None = None
    causal_by_mask: bool = False
    needs: tuple[str, ...] = ()

    @property
    def before(self) -> str:
        """What is there now."""
        window = "" if self.window is None else f"(window {self.window})"
        return type(self.module).__name__ + window


@runtime_checkable
class Adapter(Protocol):
    """What `swap_attention` asks of a library's adapter."""

    def find(self, model: nn.Module) -> tuple[list[Site], dict[str, str]]:
        """The sites in `model`, and by path the attention modules that cannot be sites, with the reason."""
        ...

    def refuse(self, site: Site, mechanism: Mechanism) -> str | None:
        """Why `mechanism` would be wrong at `site`, if it would."""
        ...

    def install(self, model: nn.Module, chosen: list[tuple[Site, Mechanism]]) -> Undo:
        """Put each mechanism in its place; the returned function puts everything back."""
        ...


def replace_child(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where the submodule `path` of `model` stands."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def layer_number(path: str) -> int | None:
    """The last number in a module's path: of its layer, in every model that keeps layers in a list."""
    numbers = [part for part in path.split(".") if part.isdigit()]
    return int(numbers[-1]) if numbers else None


def build(site: Site, name: str, options: dict[str, Any]) -> Mechanism:
    """The mechanism `name` for `site`: with its sizes, causality and dropout, and never beyond its window if exact.

    Raises:
        ValueError, TypeError: as `create_mechanism` does.
    """
    # Full attention takes causality as it comes.
    is_causal = site.is_causal and not (site.causal_by_mask and name == "full")
    options = {"max_seq_len": site.max_seq_len, "is_causal": is_causal, **options}
    if site.window is not None and name == "flash":
        name, options["window_size"] = "sliding_window", site.window
    elif site.window is not None and name == "sliding_window" and "window_size" in options:
        options["window_size"] = min(options["window_size"], site.window)
    cls = MECHANISMS.get(name)
    if site.dropout and cls is not None and "dropout_p" in inspect.signature(cls).parameters:
        options.setdefault("dropout_p", site.dropout)
    return create_mechanism(
        name,
        num_heads=site.num_heads,
        head_dim=site.head_dim,
        num_kv_heads=site.num_kv_heads,
        **options,
    )
