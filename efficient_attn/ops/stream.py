"""Linear attention whose features exist one block at a time: forward and backward as operators, with their own loops.

With u_i = grad_i / total_i and w_i = -u_i . out_i the gradients of the features are scans as well:

    d phi_q = scan([u, w], [v, 1], phi_k)
    d phi_k = reverse scan([v, 1], [u, w], phi_q)        dv = reverse scan(phi_k, phi_q, u)

Keys before the first query go into the scan's carry at once, queries after the last key read it at the end; without
causality all queries come after all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..feature_maps import FORMULAS, Features
from ..inputs import accumulation_dtype, full_precision
from .composed import NOTHING, composed, no_weight, running_maximum
from .operators import keep_nothing, no_second_derivative, operator
from .scan import Carry, blocks, pass_by, rows_of_block, scan_block
from .workspace import Workspace


@dataclass
class _Stream:
    """The inputs by blocks: features, values with their column of ones, and who stands beside whom."""

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None
    segment: Tensor | None
    offset: int
    projection: Tensor | None
    feature: str
    scale: float

    def __post_init__(self) -> None:
        self.dtype = accumulation_dtype(self.q.dtype)
        self.projection = None if self.projection is None else self.projection.to(self.dtype)
        self.rounds = self.dtype != self.q.dtype
        self.formula = FORMULAS[self.feature]
        self.groups = self.q.shape[1] // self.k.shape[1]
        self.workspace = Workspace(self.q.device)
        length, num_keys = self.q.shape[2], self.k.shape[2]
        self.first = min(max(0, -self.offset), length)
        self.last = max(self.first, min(length, num_keys - self.offset))
        self.past = min(max(0, self.offset), num_keys)

    def past_keys(self) -> Iterator[slice]:
        """Keys before the first query."""
        return self._blocks(0, self.past, False)

    def beside(self, reverse: bool = False) -> Iterator[tuple[slice, slice]]:
        """Queries, and the keys at their positions."""
        for rows in self._blocks(self.first, self.last, reverse):
            yield rows, slice(rows.start + self.offset, rows.stop + self.offset)

    def late_queries(self) -> Iterator[slice]:
        """Queries after the last key, if there is one."""
        return self._blocks(self.last, self.q.shape[2] if self.k.shape[2] else self.last, False)

    def lonely_queries(self) -> slice:
        """Queries that come before every key."""
        return slice(0, self.first if self.k.shape[2] else self.q.shape[2])

    def _blocks(self, start: int, stop: int, reverse: bool) -> Iterator[slice]:
        heads = self.q.shape[0] * self.q.shape[1]
        return (slice(s.start + start, s.stop + start) for s in blocks(max(0, stop - start), heads, reverse))

    def unread_keys(self) -> slice:
        """Keys that no query comes after."""
        num_keys, stop = self.k.shape[2], self.offset + self.q.shape[2]
        return slice(max(0, min(num_keys, stop)) if self.q.shape[2] else 0, num_keys)

    def by_key_head(self, x: Tensor, rows: slice) -> Tensor:
        """Rows of (B, H, L, ...) as (B, Hkv, G, n, ...)."""
        return x[:, :, rows].unflatten(1, (-1, self.groups))

    def queries(self, rows: slice) -> tuple[Tensor, Features]:
        """The scaled queries (B, Hkv, G, n, E) and their features, whose exponents cancel."""
        x = self.by_key_head(self.q, rows).to(self.dtype)
        x = x if self.scale == 1.0 else x * self.scale
        return x, self.formula.values(x, self.projection)

    def keys(self, columns: slice) -> tuple[Tensor, Features, Tensor | None]:
        """The keys (B, Hkv, 1, n, E), their features, zero where not valid, and what scales them (B, Hkv, n)."""
        x = self.k[:, :, None, columns].to(self.dtype)
        values, exponent = self.formula.values(x, self.projection)
        # A token whose features all vanish has the exponent -inf: log(0).
        b = None if exponent is None else exponent[:, :, 0].clamp(min=NOTHING)
        if self.valid is not None:
            valid = self.valid[:, None, columns]
            values = values.masked_fill(~valid[:, :, None, :, None], 0.0)
            b = None if b is None else b.masked_fill(~valid, NOTHING)
        return x, Features(values, exponent), b

    def values(self, columns: slice) -> Tensor:
        """The values and a one, (B, Hkv, 1, n, Ev + 1)."""
        v = self.v[:, :, columns].to(self.dtype)
        return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)[:, :, None]

    def segments(self, columns: slice) -> Tensor | None:
        return None if self.segment is None else self.segment[:, columns]

    def row_exponents(self, b: Tensor | None, segment: Tensor | None, carry: Carry) -> Tensor | None:
        """Minus the largest exponent that each row of a block has seen."""
        if b is None:
            return None
        running = running_maximum(b, segment)
        if carry.exponent is not None:
            before = carry.exponent[..., None]
            if segment is not None and carry.segment is not None:
                before = torch.where((segment == carry.segment[:, None])[:, None], before, NOTHING)
            running = torch.maximum(running, before)
        return -running


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    segment: Tensor | None,
    offset: Tensor,
    projection: Tensor | None,
    feature: str,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, H, L, Ev), what rounding took from it, and each row's sum of weights (B, H, L), or infinity.

    `valid` and `segment` are (B, S); equal segments are consecutive, and then L = S. `offset` is the position of the
    first query, which matters if `is_causal`. `feature` names one of FORMULAS.
    """
    s = _Stream(q, k, v, valid, segment, int(offset) if is_causal else k.shape[2], projection, feature, scale)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lost = torch.empty_like(out) if s.rounds else q.new_empty(0)
    total = q.new_empty(q.shape[:3], dtype=s.dtype)

    def store(rows: slice, sums: Tensor) -> None:
        weight = sums[..., -1].masked_fill(no_weight(sums[..., -1]), torch.inf)
        s.by_key_head(total, rows).copy_(weight)
        exact = sums[..., :-1].div_(weight[..., None])
        s.by_key_head(out, rows).copy_(exact)
        if s.rounds:
            s.by_key_head(lost, rows).copy_(exact - s.by_key_head(out, rows))

    carry = Carry()
    with full_precision(q.device):
        for columns in s.past_keys():
            _, phi_k, b = s.keys(columns)
            carry.absorb(phi_k.values, s.values(columns), b)
        for rows, columns in s.beside():
            _, phi_k, b = s.keys(columns)
            segments = s.segments(columns)
            a = s.row_exponents(b, segments, carry)
            operands = s.queries(rows)[1].values, phi_k.values, s.values(columns)
            store(rows, scan_block(*operands, a, b, segments, False, carry, s.workspace))
        for rows in s.late_queries():
            store(rows, carry.read(s.queries(rows)[1].values, None))
    for x, nothing in ((out, 0.0), (total, torch.inf), *([(lost, 0.0)] if s.rounds else [])):
        x[:, :, s.lonely_queries()] = nothing
    return out, lost, total


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lost: Tensor,
    total: Tensor,
    valid: Tensor | None,
    segment: Tensor | None,
    offset: Tensor,
    projection: Tensor | None,
    feature: str,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; features are computed again, block by block."""
    s = _Stream(q, k, v, valid, segment, int(offset) if is_causal else k.shape[2], projection, feature, scale)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dq[:, :, s.lonely_queries()] = 0.0
    for x in (dk, dv):
        x[:, :, s.unread_keys()] = 0.0
    exponents = None
    if s.formula.has_exponent:
        exponents = q.new_empty(q.shape[0], k.shape[1], q.shape[2], dtype=s.dtype)

    def row_gradient(rows: slice) -> Tensor:
        """[u, w]: the gradient of a row's weighted values, and of its total weight."""
        u = s.by_key_head(grad, rows).to(s.dtype) / s.by_key_head(total, rows)[..., None]
        exact = s.by_key_head(out, rows).to(s.dtype)
        if s.rounds:
            exact = exact + s.by_key_head(lost, rows)
        w = -(u * exact).sum(-1, keepdim=True)
        return torch.cat([u, w], -1)

    with full_precision(q.device):
        _gradient_of_queries(s, row_gradient, exponents, dq)
        _gradients_of_keys(s, row_gradient, exponents, dk, dv)
    return dq, dk, dv


def _gradient_of_queries(
    s: _Stream, row_gradient: Callable[[slice], Tensor], exponents: Tensor | None, dq: Tensor
) -> None:
    """From the first key on; leaves each row's exponent in `exponents`."""

    def store(rows: slice, d_phi: Tensor, a: Tensor | None) -> None:
        x, phi_q = s.queries(rows)
        d_x = s.formula.pull_back(x, phi_q, d_phi, s.projection)
        s.by_key_head(dq, rows).copy_(d_x.mul_(s.scale))
        if exponents is not None and a is not None:
            exponents[:, :, rows] = a

    carry = Carry()
    for columns in s.past_keys():
        _, phi_k, b = s.keys(columns)
        carry.absorb(s.values(columns), phi_k.values, b)
    for rows, columns in s.beside():
        _, phi_k, b = s.keys(columns)
        segments = s.segments(columns)
        a = s.row_exponents(b, segments, carry)
        operands = row_gradient(rows), s.values(columns), phi_k.values
        store(rows, scan_block(*operands, a, b, segments, False, carry, s.workspace), a)
    for rows in s.late_queries():
        a = None if carry.exponent is None else -carry.exponent[..., None]
        store(rows, carry.read(row_gradient(rows), None), a)


def _gradients_of_keys(
    s: _Stream, row_gradient: Callable[[slice], Tensor], exponents: Tensor | None, dk: Tensor, dv: Tensor
) -> None:
    """From the last query back: the carry holds the later rows, as the keys of both mirrored scans."""

    def of_rows(rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        return (
            row_gradient(rows),
            s.queries(rows)[1].values,
            None if exponents is None else exponents[:, :, rows],
        )

    def store(columns: slice, x: Tensor, phi: Features, d_phi: Tensor, d_values: Tensor) -> None:
        dk[:, :, columns] = s.formula.pull_back(x, phi, d_phi, s.projection)[:, :, 0]
        dv[:, :, columns] = d_values[:, :, 0]

    later, other_workspace = Carry(), Workspace(s.q.device)
    for rows in s.late_queries():
        gradient, phi_q, a = of_rows(rows)
        later.absorb(gradient, phi_q, a)
    for rows, columns in s.beside(reverse=True):
        gradient, phi_q, a = of_rows(rows)
        x, phi_k, b = s.keys(columns)
        rest = b, a, s.segments(columns), True
        past = pass_by(gradient, phi_q, *rest, later, s.workspace)
        d_phi = rows_of_block(s.values(columns), gradient, phi_q, *rest, past, s.workspace)
        past = past.turned(columns=s.v.shape[3])
        d_values = rows_of_block(phi_k.values, phi_q, gradient[..., :-1], *rest, past, other_workspace)
        store(columns, x, phi_k, d_phi, d_values)
    for columns in s.past_keys() if s.q.shape[2] else ():
        x, phi_k, b = s.keys(columns)
        d_phi = later.read(s.values(columns), b)
        store(columns, x, phi_k, d_phi, later.turned(s.v.shape[3]).read(phi_k.values, b))


def _fake_forward(q, k, v, *others):  # type: ignore[no-untyped-def]
    out, dtype = q.new_empty(*q.shape[:3], v.shape[3]), accumulation_dtype(q.dtype)
    lost = torch.empty_like(out) if q.dtype != dtype else q.new_empty(0)
    return out, lost, q.new_empty(q.shape[:3], dtype=dtype)


def _fake_backward(grad, q, k, v, *others):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def linear_operator(  # type: ignore[no-untyped-def]
    name: str, forward: Callable[..., Any], fake_forward: Callable[..., Any], backward: Callable[..., Any]
):
    """`forward` as a differentiable operator `<name>_forward`, whose derivative is `<name>_backward`.

    Their arguments are those of `forward` and `backward` below; `forward` may have more, at the end.
    """
    derivative = operator(
        f"{name}_backward",
        backward,
        _fake_backward,
        keep_nothing,
        no_second_derivative(f'{name}_backward has no derivative of its own; backend="reference" has one'),
    )

    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, valid, segment, offset, projection, *scalars = inputs
        ctx.save_for_backward(q, k, v, *output, valid, segment, projection)
        ctx.others = offset, scalars
        ctx.mark_non_differentiable(*output[1:])

    def pull_back(ctx, grad, *_others):  # type: ignore[no-untyped-def]
        *tensors, projection = ctx.saved_tensors
        offset, scalars = ctx.others
        feature, scale, is_causal = scalars[:3]
        no_gradients = [None] * (4 + len(scalars))
        if torch.is_grad_enabled():  # somebody will differentiate the gradients
            gradients = _differentiable(grad, tensors, offset, projection, feature, scale, is_causal)
        else:
            gradients = derivative(grad, *tensors, offset, projection, feature, scale, is_causal)
        return (*gradients, *no_gradients)

    return operator(f"{name}_forward", forward, fake_forward, save, pull_back)


def _differentiable(  # type: ignore[no-untyped-def]
    grad, tensors, offset, projection, feature, scale, is_causal
) -> tuple[Tensor, ...]:
    """The gradients as functions of what autograd looks into."""
    q, k, v, *_, valid, segment = tensors
    cast = None if projection is None else projection.to(accumulation_dtype(q.dtype))

    def phi(x: Tensor) -> Features:
        return FORMULAS[feature].values(x, cast)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with full_precision(q.device):
            return composed(phi, q, k, v, valid, segment, offset, scale, is_causal)

    # Not autograd.grad: one tensor may be given as q, k and v, some may need no gradient, and vmap may be around.
    return torch.func.vjp(run, q, k, v)[1](grad)


stream = linear_operator("linear", forward, _fake_forward, backward)
"""`forward` as a differentiable operator."""
