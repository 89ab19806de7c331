"""Operators under torch.func: what `register_autograd` registers serves outside its transforms only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def transformable(op: Any, save: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """`op` with the derivative that is registered for it, under torch.func.grad too; vmap folds into the batch.

    Tensors have the batch first; numbers, empty vectors and a `projection` belong to the whole batch.
    """
    names = [argument.name for argument in op._schema.arguments]

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return op(*args)
        return function.apply(*args)

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if any(name == "seed" and isinstance(x, Tensor) for name, x in zip(names, args, strict=True)):
            return _one_by_one(call, in_dims, args, size)
        folded = [_fold(*each, size) for each in zip(names, args, in_dims, strict=True)]
        out, batch = call(*folded), folded[0].shape[0] // size
        if isinstance(out, Tensor):
            return out.unflatten(0, (size, batch)), 0
        dims = tuple(0 if x.dim() > 1 else None for x in out)
        unfolded = [
            x if dim is None else x.unflatten(0, (size, batch)) for x, dim in zip(out, dims, strict=True)
        ]
        return tuple(unfolded), dims

    # `forward` is `call` again: a transform further in is still to come.
    methods = {"forward": call, "setup_context": save, "backward": backward, "vmap": vmap}
    function: Any = type(
        f"{op.name()} under transforms",
        (torch.autograd.Function,),
        {name: staticmethod(method) for name, method in methods.items()},
    )
    return call


def _one_by_one(call: Callable[..., Any], in_dims: tuple[int | None, ...], args: Any, size: int) -> Any:
    """Samples in a loop: what each of them draws must not depend on how many there are beside it."""
    results = [
        call(*(x if dim is None else x.select(dim, number) for x, dim in zip(args, in_dims, strict=True)))
        for number in range(size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def _fold(name: str, x: Any, dim: int | None, size: int) -> Any:
    """x with its dimension `dim` of `size` folded into the batch, expanded first if there is none."""
    if not isinstance(x, Tensor):
        return x
    shared = name == "projection" or x.dim() - (dim is not None) < 1 or (x.numel() == 0 and x.dim() == 1)
    if shared and dim is not None:
        raise NotImplementedError(f"vmap over {name} is not implemented: the whole batch shares it")
    if shared:
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)
