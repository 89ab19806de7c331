"""Attention transfer: a swapped layer learns to give what exact attention gave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import inputs
from ..mechanisms import Mechanism
from .observe import Call, evaluation, mechanisms_in

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with: one tensor, positional arguments, or keyword arguments."""


@dataclass(frozen=True)
class TransferReport:
    """What `transfer_attention` trained, and what came of it; `print` it for a table.

    Errors are relative to the exact output, |out - exact| / |exact|, on the first batch.
    """

    before: Mapping[str, float]
    """The error of each mechanism before training."""
    after: Mapping[str, float]
    """The error of each mechanism after it."""
    trained: tuple[str, ...]
    """The names of the parameters that were trained."""

    def __str__(self) -> str:
        width = max(map(len, ("layer", *self.before)))
        lines = [f"{'layer':{width}}  error before  after"]
        for name, before in self.before.items():
            lines.append(f"{name:{width}}  {before:12.3f}  {self.after[name]:5.3f}")
        more = f" and {len(self.trained) - 3} more" if len(self.trained) > 3 else ""
        return "\n".join([*lines, f"trained: {', '.join(self.trained[:3])}{more}"])


def transfer_attention(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float = 1e-3,
    projections: bool = False,
) -> TransferReport:
    """Train the mechanisms of a swapped model to give what exact softmax attention gives, each on its own.

        loss = mean over layers of |mechanism(q', k', v') - softmax(scale q k^T) v|^2 / |softmax(scale q k^T) v|^2

    q, k, v come from the weights that `model` has when this is called, q', k', v' from those in training, both on
    the tokens that the layer would get in the model with exact attention. So no layer learns from the errors of
    another, and no labels are needed. Exact attention has the mechanism's masks, causality and scale; queries that
    are padding do not count. Adam on the parameters named below; all others stay as they are, and so do the modes
    and gradients of the model. Dropout is off; nothing is random, so the same call gives the same weights.

    The target is full softmax attention: not for layers that had a window or softcap of their own before the swap.
    Finetune the model afterwards: each layer is nearer to what it was, the model as a whole need not be near enough.
    A step takes O(L^2 E) time, and the memory of one layer's activations and of all layers' inputs. Zhang et al.,
    "LoLCATs: On Low-Rank Linearizing of Large Language Models", 2024, arXiv:2410.10254, section 3, where feature maps
    are trained, and the loss is not divided by the size of the target.

    Args:
        model: a swapped model, with the weights that exact attention had.
        batches: what the model is called with: tensors, tuples of arguments, or mappings of keyword arguments.
            Gone through again if there are fewer than `steps`.
        steps: batches to train on.
        lr: the learning rate of the first step; it falls linearly towards 0.
        projections: also train what stands before the mechanism in its layer: the projections of q, k and v,
            and norms of q and k. Otherwise only the mechanism's own parameters, which most have none of.
            Either way, parameters that do not require gradients stay frozen: adapters can be trained alone.
    Returns:
        The errors before and after on the first batch, and what was trained.
    Raises:
        ValueError: if there is nothing to train, no mechanism is in the model or called, or `batches` runs out.
    """
    inputs.check_positive("steps", steps)
    mechanisms = mechanisms_in(model)
    candidates = _parameters(model, mechanisms, inputs.check_flag("projections", projections))
    originals = {name: parameter.detach().clone() for name, parameter in candidates.items()}
    stream = _repeat(batches, steps)
    first = next(stream)
    with evaluation(model), _training_only(model, candidates):
        lessons = _lessons(model, mechanisms, originals, first)
        trained = _those_reached(candidates, lessons)
        before = _errors(mechanisms, lessons)
        optimizer = torch.optim.Adam(trained.values(), lr=lr)
        for step in range(steps):
            if step:
                lessons = _lessons(model, mechanisms, originals, next(stream))
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            for loss in _losses(lessons):
                (loss / len(lessons)).backward()
            optimizer.step()
            # Within the caller's autocast the next forward would run with copies of the old weights.
            torch.clear_autocast_cache()
        after = _errors(mechanisms, _lessons(model, mechanisms, originals, first))
    return TransferReport(before, after, tuple(trained))


@dataclass(frozen=True, eq=False)
class _Entry:
    """A layer, and what it was called with where all attention is exact."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Lesson:
    """What a mechanism should give in its layer, for the queries that are real."""

    entry: _Entry
    mechanism: Mechanism
    target: Tensor
    real: Tensor

    def loss(self) -> Tensor:
        """The squared relative error of the mechanism's output."""
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            outputs.append(out)

        hook = self.mechanism.register_forward_hook(keep)
        try:
            self.entry.layer(*self.entry.args, **self.entry.kwargs)
        finally:
            hook.remove()
        counted = self.real[:, None, :, None]
        dtype = inputs.accumulation_dtype(self.target.dtype)
        target = torch.where(counted, self.target.to(dtype), 0.0)
        error = torch.where(counted, outputs[0].to(dtype) - target, 0.0)
        return error.square().sum() / target.square().sum().clamp(min=torch.finfo(target.dtype).tiny)


@torch.no_grad()
def _lessons(
    model: nn.Module, mechanisms: Mapping[str, Mechanism], originals: dict[str, Tensor], batch: Batch
) -> list[_Lesson]:
    """One for each call of a mechanism, from a run with the original weights and exact attention."""
    entries: list[_Entry] = []
    lessons: list[_Lesson] = []

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entries.append(_Entry(layer, args, dict(kwargs)))

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        call = Call.of(module, args, kwargs)
        entry = next((each for each in reversed(entries) if module in each.layer.children()), None)
        if entry is None:
            raise ValueError(
                f"a layer must call its {type(module).__name__} once in its forward, not more often"
            )
        entries.remove(entry)
        target = call.exact()(call.q, call.k, call.v, **call.masks)
        lessons.append(_Lesson(entry, call.mechanism, target, call.real_queries()))
        return target

    layers = _layers(model, mechanisms).values()
    hooks = [module.register_forward_hook(replace, with_kwargs=True) for module in mechanisms.values()]
    hooks += [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    args, kwargs = _arguments(batch)
    try:
        functional_call(model, originals, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    if not lessons:
        raise ValueError(f"none of the mechanisms in this {type(model).__name__} was called")
    return lessons


def _layers(model: nn.Module, mechanisms: Mapping[str, Mechanism]) -> dict[str, nn.Module]:
    """The modules that hold the mechanisms, by name."""
    if "" in mechanisms:
        raise ValueError("model must hold its mechanisms in layers, and is a mechanism itself")
    held = set(mechanisms.values())
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, Mechanism) and held & set(module.children())
    }


def _parameters(
    model: nn.Module, mechanisms: Mapping[str, Mechanism], projections: bool
) -> dict[str, nn.Parameter]:
    """What may be trained; with `projections`, also what turns out to come after the mechanism."""
    layers = _layers(model, mechanisms)
    owners = layers if projections else mechanisms
    wanted = {parameter for owner in owners.values() for parameter in owner.parameters()}
    found = {name: p for name, p in model.named_parameters() if p in wanted and p.requires_grad}
    if not found:
        kinds = sorted({type(mechanism).__name__ for mechanism in mechanisms.values()})
        hint = "they require no gradients" if projections else "projections=True trains those of q, k and v"
        raise ValueError(f"nothing to train: {', '.join(kinds)} and no free parameters; {hint}")
    return found


def _those_reached(candidates: dict[str, nn.Parameter], lessons: list[_Lesson]) -> dict[str, nn.Parameter]:
    """The parameters that the losses depend on; the output projection is none of them."""
    reached: set[str] = set()
    for loss in _losses(lessons):
        gradients = torch.autograd.grad(loss, list(candidates.values()), allow_unused=True)
        reached |= {
            name for name, gradient in zip(candidates, gradients, strict=True) if gradient is not None
        }
    if not reached:
        raise ValueError("nothing to train: the outputs are exact, or depend on no free parameter")
    return {name: parameter for name, parameter in candidates.items() if name in reached}


def _losses(lessons: list[_Lesson]) -> Iterator[Tensor]:
    """The losses of the layers that have something to learn."""
    for lesson in lessons:
        loss = lesson.loss()
        rounding = max(torch.finfo(lesson.target.dtype).eps, 8 * torch.finfo(loss.dtype).eps)
        # Adam makes full steps of any gradient, even of the rounding errors of a layer that is exact.
        if loss.requires_grad and loss > rounding**2:
            yield loss


@torch.no_grad()
def _errors(mechanisms: Mapping[str, Mechanism], lessons: list[_Lesson]) -> dict[str, float]:
    """The relative error of each mechanism, its calls taken together by their mean square."""
    names = {mechanism: name for name, mechanism in mechanisms.items()}
    squares: dict[str, list[float]] = {}
    for lesson in lessons:
        squares.setdefault(names[lesson.mechanism], []).append(float(lesson.loss()))
    return {name: (sum(each) / len(each)) ** 0.5 for name, each in squares.items()}


@contextmanager
def _training_only(model: nn.Module, candidates: dict[str, nn.Parameter]) -> Iterator[None]:
    """Nothing but `candidates` requires gradients; afterwards all is as it was, and so is what `grad` held."""
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    chosen = set(candidates.values())
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in chosen)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _repeat(batches: Iterable[Batch], steps: int) -> Iterator[Batch]:
    """The batches, again and again."""
    count = 0
    while True:
        start = count
        for batch in batches:
            count += 1
            yield batch
        if count == start:
            raise ValueError(f"batches must hold {steps} batches, or be iterable again; got {count}")


def _arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch if isinstance(batch, tuple) else (batch,)), {}
