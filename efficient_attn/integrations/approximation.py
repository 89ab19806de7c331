"""How far the mechanisms of a model are from exact softmax attention, on its own data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..mechanisms import Mechanism, SoftmaxMechanism
from ..mechanisms.base import zero_where_masked
from ..ops.dense import grouped_matmul
from .observe import Call, evaluation, mechanisms_in

_PAIRS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class LayerApproximation:
    """One mechanism against exact softmax attention.

    `error` is that of the mechanism and `error_of_mean` that of the mean of the values, both relative to the
    exact output; `mass_kept` is the softmax mass on the pairs of the pattern, None where there is no pattern.
    """

    name: str
    mechanism: str
    rows: int
    """Queries of all heads, batch rows and calls that were compared."""
    error: float
    error_of_mean: float
    mass_kept: float | None


@dataclass(frozen=True)
class ApproximationReport:
    """What `measure_approximation` found, in the order of the model's modules; `print` it for a table."""

    layers: tuple[LayerApproximation, ...]

    def __str__(self) -> str:
        rows = [("layer", "mechanism", "error", "mean of v", "mass kept")]
        for layer in self.layers:
            mass = "-" if layer.mass_kept is None else f"{layer.mass_kept:.3f}"
            figures = f"{layer.error:.3f}", f"{layer.error_of_mean:.3f}"
            rows.append((layer.name or "(model)", layer.mechanism, *figures, mass))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([*map(str.ljust, row[:2], widths[:2]), *map(str.rjust, row[2:], widths[2:])])
            for row in rows
        ]
        return "\n".join([*lines, "error, mean of v: relative to the output of exact softmax attention"])


@torch.no_grad()
def measure_approximation(model: nn.Module, *batch_args: Any, **batch_kwargs: Any) -> ApproximationReport:
    """Run `model` on one batch, and compare each mechanism in it with exact softmax attention.

        error         = |out - P v| / |P v|,    P = softmax(scale q k^T) over all keys that the masks allow
        error_of_mean = |U v - P v| / |P v|,    U_ij = 1 / (number of keys that query i may attend to)
        mass_kept     = mean_i sum_j P_ij [pattern allows (i, j)]

    P sees the same q, k, v, scale, causality and masks as the mechanism, but no pattern; norms are Frobenius
    norms over all heads and rows. A mechanism whose `error` is not below `error_of_mean` is no better than one that
    ignores the query. A pattern that keeps mass m > 0 of a row moves its weights by 2 (1 - m) in the L1 norm, and
    its output by at most 2 (1 - m) max |v_j|. Each mechanism is measured on the inputs that it gets in this model,
    where those before it are approximate too. A window or softcap that the model had of its own is not known here.

    Left out are queries that may attend to nothing, and queries that are padding themselves; for the latter,
    `key_mask` is taken to speak of the queries too where a mechanism is causal, or has as many queries as keys.

    Rows are compared a few at a time: O(L S E) time, O(S) memory beyond what the model takes. The model runs in
    evaluation mode and without a cache, and is left as it was.

    Args:
        model: any module with mechanisms inside: layers of this library, or a swapped model.
        batch_args, batch_kwargs: what `model` is called with.
    Returns:
        A row for each mechanism that was called; several calls of one mechanism are taken together.
    Raises:
        ValueError: if no mechanism is in the model, or none was called.
    """
    mechanisms = mechanisms_in(model)
    sums = {module: _Sums() for module in mechanisms.values()}

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        sums[module].add(Call.of(module, args, kwargs), out)  # type: ignore[index]

    hooks = [module.register_forward_hook(add, with_kwargs=True) for module in mechanisms.values()]
    try:
        with evaluation(model):
            model(*batch_args, **batch_kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    called = {name: module for name, module in mechanisms.items() if sums[module].calls}
    if not called:
        raise ValueError(
            f"none of the {len(mechanisms)} mechanisms in this {type(model).__name__} was called "
            "(decoding with a state does not call them either): pass it a whole batch"
        )
    return ApproximationReport(tuple(sums[module].result(name, module) for name, module in called.items()))


@dataclass
class _Sums:
    """Running sums over the rows compared so far."""

    calls: int = 0
    rows: int = 0
    exact: float = 0.0
    error: float = 0.0
    error_of_mean: float = 0.0
    mass: float = 0.0

    def add(self, call: Call, out: Tensor) -> None:
        self.calls += 1
        pattern = call.mechanism.matrix if isinstance(call.mechanism, SoftmaxMechanism) else None
        real = call.real_queries()
        values = _without_padding(call)
        for start, stop, masks in _chunks(call):
            q = call.q[:, :, start:stop]
            weights = call.exact().matrix(q, call.k, **masks)
            uniform = _uniform(call, q, masks)
            counted = (real[:, None, start:stop] & (uniform.sum(-1) > 0))[..., None]
            exact = grouped_matmul(weights, values.to(weights.dtype))
            mean = grouped_matmul(uniform, values.to(weights.dtype))
            self.rows += int(counted.sum())
            self.exact += _square(exact, counted)
            self.error += _square(out[:, :, start:stop].to(exact.dtype) - exact, counted)
            self.error_of_mean += _square(mean - exact, counted)
            if pattern is not None:
                inside = pattern(q, call.k, **masks) > 0
                self.mass += float(torch.where(inside & counted, weights, 0.0).sum())

    def result(self, name: str, module: Mechanism) -> LayerApproximation:
        rows = max(self.rows, 1)
        return LayerApproximation(
            name=name,
            mechanism=type(module).__name__,
            rows=self.rows,
            error=_relative(self.error, self.exact),
            error_of_mean=_relative(self.error_of_mean, self.exact),
            mass_kept=self.mass / rows if isinstance(module, SoftmaxMechanism) else None,
        )


def _chunks(call: Call) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Ranges of queries, each with its masks, such that a range's pairs fit into memory."""
    q_len, offset, bias = call.q.shape[2], call.offset(), call.masks.get("attn_bias")
    size = max(1, _PAIRS_AT_ONCE // max(1, call.q.shape[0] * call.q.shape[1] * call.k.shape[2]))
    for start in range(0, q_len, size):
        masks = {**call.masks, "q_offset": offset + start}
        if bias is not None and bias.dim() > 1 and bias.shape[-2] > 1:
            masks["attn_bias"] = bias[..., start : start + size, :]
        yield start, min(start + size, q_len), masks


def _uniform(call: Call, q: Tensor, masks: dict[str, Any]) -> Tensor:
    """Equal weights on all allowed keys: those of a query of zeros."""
    bias = masks.get("attn_bias")
    if bias is not None and bias.dtype != torch.bool:
        # "May not attend" is the lowest finite number for some libraries.
        masks = {**masks, "attn_bias": bias > torch.finfo(bias.dtype).min / 2}
    return call.exact().matrix(torch.zeros_like(q), call.k, **masks)


def _without_padding(call: Call) -> Tensor:
    """The values, zero where no query may attend, so that NaN there reaches nothing."""
    v, key_mask, segment_ids = call.v, call.masks.get("key_mask"), call.masks.get("segment_ids")
    if key_mask is not None:
        (v,) = zero_where_masked(key_mask, v)
    if segment_ids is not None:
        (v,) = zero_where_masked(segment_ids >= 0, v)
    return v


def _square(x: Tensor, counted: Tensor) -> float:
    return float(torch.where(counted, x, 0.0).square().sum())


def _relative(error: float, exact: float) -> float:
    if exact == 0:
        return 0.0 if error == 0 else float("inf")
    return (error / exact) ** 0.5
