"""The package's custom operators: opaque to torch.compile, known to autograd and to meta tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from .transforms import transformable

_LIBRARY = torch.library.Library("efficient_attn", "DEF")


def operator(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = (),
) -> Any:
    """Register `run`, whose annotations are the schema, as `torch.ops.efficient_attn.<name>`, and return it.

    `fake` makes outputs without data; `save` and `backward` are those of torch.library.register_autograd; `tags` say
    what the compiler must know.
    torch.library.custom_op would do the same, but imports the compiler at the first call: a second and 135 MB.
    """
    qualified = f"efficient_attn::{name}"
    _LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()), tags=tags)
    _LIBRARY.impl(name, _hidden_from_compiler(run), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=save, lib=_LIBRARY)
    return transformable(getattr(torch.ops.efficient_attn, name).default, save, backward)


def _hidden_from_compiler(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, into whose loops the compiler does not look when a compiled graph calls it."""
    disabled: list[Callable[..., Any]] = []

    @wraps(run)
    def opaque(*args: Any) -> Any:
        if not disabled:
            compiler = sys.modules.get("torch._dynamo")
            if compiler is None or not hasattr(compiler, "disable"):  # not imported, or half-way through it
                return run(*args)
            disabled.append(compiler.disable(run))
        return disabled[0](*args)

    return opaque


def no_second_derivative(message: str) -> Callable[..., Any]:
    """A backward pass that says that there is none."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(message)

    return backward


def keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """What an operator without a derivative saves."""
