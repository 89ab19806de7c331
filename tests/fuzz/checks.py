"""What is checked about a case. Each check raises LawViolation, and says by how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from oracles import oracle_matrix
from torch import Tensor

from efficient_attn import PerformerAttention
from efficient_attn.backends import BackendError
from efficient_attn.mechanisms import LinearMechanism
from efficient_attn.testing.laws.law import expect
from efficient_attn.testing.sampling import expand_heads, poisoned_allocations

from .case import Case
from .contents import build, dtype_of, generator, key_mask_of, values
from .rounding import gradient_bounds
from .subject import Inputs, Subject


class CaseFailed(AssertionError):
    """A case that does not hold; its message ends with the line that runs it again."""


def run(case: Case) -> Counter[str]:
    """How often each check was made on `case`; all of them held.

    Raises:
        CaseFailed: if one does not, or anything else is raised.
    """
    made: Counter[str] = Counter(cases=1)
    doing = "setting up"
    try:
        subject = Subject(case)
        doing = "refuses"
        if refuses(subject):
            made[doing] += 1
            subject = Subject(case, backend="auto")
        for doing in case.checks:
            CHECKS[doing](subject)
            made[doing] += 1
    except Exception as error:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        raise CaseFailed(f"{doing}: {kind}{error}\n{case.command}") from error
    return made


def refuses(s: Subject) -> bool:
    """Whether the backend that the case names refuses this problem: then `forward` must say so, with the reasons."""
    m, names = s.mechanism, ("key_mask", "segment_ids", "q_offset", "attn_bias")
    if m.backend == "auto":
        return False
    (backend,) = (b for b in m.backends if b.name == m.backend)
    reasons = backend.refuse(m._problem(*s.leaves, *(s.masks.get(name) for name in names)))
    if not reasons:
        return False
    try:
        s.call(s.leaves)
    except BackendError as error:
        expect(all(reason in str(error) for reason in reasons), f"the refusal keeps reasons back: {error}")
        return True
    expect(False, f"backend {m.backend} ran what it refuses: {reasons}")
    return True


def output(s: Subject) -> None:
    """The output is `matrix @ v`, finite, in its dtype; rows with no weights are 0; the inputs are untouched."""
    kept = [x.clone() for x in s.leaves]
    out = s.out.detach()
    expect(out.dtype == dtype_of(s.case), f"output is {out.dtype}")
    for name, x, before in zip("qkv", s.leaves, kept, strict=True):
        expect(bool(((x == before) | before.isnan()).all()), f"{name} was written to")
    _matches(s, out, "output")


def _matches(s: Subject, out: Tensor, what: str) -> None:
    expect(out.shape == s.truth.shape, f"{what}: shape {tuple(out.shape)}, not {tuple(s.truth.shape)}")
    nothing = ~s.visible | s.vanished
    expect(bool((torch.where(nothing, out, 0.0) == 0).all()), f"{what}: a row with no weights is not 0")
    _close(torch.where(nothing, 0.0, out), torch.where(nothing, 0.0, s.truth), s.bound, what)
    if s.exact.rows_sum_to_one and out.numel() and s.case.kv_len:
        _is_mean(s, out, what)


def _is_mean(s: Subject, out: Tensor, what: str) -> None:
    """However inaccurate its weights, a mean lies among the values, or is 0 where there are none."""
    v = expand_heads(s.doubles[2], s.case.heads)
    room = s.rounding(dtype_of(s.case)).drift + 8 * torch.finfo(out.dtype).eps + 1e-5
    room = room * v.abs().amax(2, keepdim=True)
    low, high = v.amin(2, keepdim=True).clamp(max=0), v.amax(2, keepdim=True).clamp(min=0)
    inside = (out >= low - room) & (out <= high + room)
    expect(bool(inside.all()), f"{what}: no mean of the values")


def _close(actual: Tensor, truth: Tensor, bound: Tensor, what: str) -> None:
    """Within `bound`, and finite, wherever the dtype of `actual` can hold all that lies there."""
    reach = truth.abs() + torch.where(bound.isinf(), 0.0, bound)
    fits = reach < torch.finfo(actual.dtype).max / 2
    expect(bool(torch.isfinite(actual[fits]).all()), f"{what}: not finite")
    error = (actual.double() - truth).abs()
    excess = torch.where(fits, error - bound, 0.0)
    if excess.numel() and excess.max() > 0:
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        numbers = f"off by {error[at]:.3g}, allowed {bound[at]:.3g}, exact {truth[at]:.3g}"
        expect(False, f"{what}: {numbers} at {at} of {tuple(excess.shape)}")


def gradients(s: Subject) -> None:
    """The gradients are those of `matrix @ v`, finite, and 0 for masked keys and for queries that see nothing."""
    actual = s.gradients(s.out, s.leaves)
    doubles = tuple(x.detach().requires_grad_() for x in s.doubles)
    exact = s.exact.matrix(*doubles[:2], **s.masks) @ expand_heads(doubles[2], s.case.heads)
    truths = torch.autograd.grad(exact, doubles, s.weight, allow_unused=True, materialize_grads=True)
    for name, a, truth, bound in zip("qkv", actual, truths, _gradient_bounds(s, truths), strict=True):
        expect(a.dtype == dtype_of(s.case), f"gradient of {name} is {a.dtype}")
        _close(a, truth, bound, f"gradient of {name}")
    for name, grad in zip("kv", actual[1:], strict=True):
        expect(bool((grad.transpose(1, 2)[~s.valid] == 0).all()), f"a masked {name} has a gradient")
    expect(
        bool((torch.where(s.visible, 0.0, actual[0]) == 0).all()), "a query that sees nothing has a gradient"
    )


def _gradient_bounds(s: Subject, truths: tuple[Tensor, ...]) -> list[Tensor]:
    dtype = dtype_of(s.case)
    if s.matrix.numel() == 0:
        return [torch.zeros_like(x) for x in truths]
    bounds = gradient_bounds(s.rounding(dtype), *s.doubles, s.weight, truths, dtype)
    if bounds is not None:
        return bounds
    # relu's features may be as small as they like, and so may what a gradient is divided by.
    share = 1e-7 if dtype == torch.float64 else 0.05
    if isinstance(s.exact, PerformerAttention) and dtype != torch.float64:
        share = torch.inf
    return [share * (1 + x.abs().max()).expand(x.shape) if x.numel() else x for x in truths]


def derivative(s: Subject) -> None:
    """What autograd makes of the matrix is how the output changes, by a central difference."""
    numbers, step = generator(s.case, 7), 1e-5
    inputs = tuple(x.detach().requires_grad_() for x in s.doubles)
    ways = [torch.randn(x.shape, generator=numbers, dtype=x.dtype) for x in inputs]

    def loss(at: tuple[Tensor, ...]) -> Tensor:
        out = s.exact.matrix(*at[:2], **s.masks) @ expand_heads(at[2], s.case.heads)
        return (out * s.weight).sum()

    grads = torch.autograd.grad(loss(inputs), inputs, allow_unused=True, materialize_grads=True)
    for index, (grad, way) in enumerate(zip(grads, ways, strict=True)):
        ahead, behind = (
            loss(tuple(x.detach() + sign * way if i == index else x.detach() for i, x in enumerate(inputs)))
            for sign in (step, -step)
        )
        terms = grad * way
        numeric, scale = (ahead - behind) / (2 * step), terms.abs().sum() + s.weight.abs().sum()
        expect(
            bool((numeric - terms.sum()).abs() <= 1e-5 * scale),
            f"along {'qkv'[index]} the output changes by {numeric:.6g}, autograd says {terms.sum():.6g}",
        )


def repeat(s: Subject) -> None:
    """The same call gives the same bits."""
    _same_bits(s.call(s.leaves), s.out, "a second call")


def _same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal in every bit, an overflow included; NaN nowhere."""
    expect(not bool(actual.isnan().any()), f"{what}: NaN")
    if not torch.equal(actual, expected):
        moved = (actual.double() - expected.double()).abs().nan_to_num()
        expect(False, f"{what}: {int((moved > 0).sum())} entries moved, by up to {moved.max():.3g}")


def padding(s: Subject) -> None:
    """Whatever stands at masked keys, no bit of the output or of a gradient moves."""
    results = []
    for filler in ("", s.case.masked or "nan"):
        inputs = s.laid_out(_written_out(s.filled(filler)))
        out = s.call(inputs)
        results.append((out, *s.gradients(out, inputs)) if "gradients" in s.case.checks else (out,))
    for name, a, b in zip(("output", "dq", "dk", "dv"), *results[::-1], strict=False):
        _same_bits(a, b, f"{name} with other contents at masked keys")


def _written_out(inputs: list[Tensor] | Inputs) -> Inputs:
    """Repeats written out, so that both sides of a comparison lie alike."""
    q, k, v = (x.contiguous() for x in inputs)
    return q, k, v


def future(s: Subject) -> None:
    """With everything from `cut` on replaced, at any scale, no earlier bit moves and no gradient arrives there."""
    case, cut = s.case, s.case.cut
    rows = s.queries_before(cut)
    inputs = s.laid_out(_written_out(s.inputs))
    before, changed = s.call(inputs), {}
    if "key_mask" in s.masks:
        others = key_mask_of(case, purpose=6)
        assert others is not None
        changed["key_mask"] = torch.cat([s.masks["key_mask"][:, :cut], others[:, cut:]], 1)
    for factor in (1.0, 1000.0) if case.magnitudes == (1, 1, 1) else (1.0,):
        pairs = zip(s.inputs, values(case, 5, factor), (rows, cut, cut), strict=True)
        mixed = [torch.cat([a[:, :, :n], b[:, :, n:]], 2) for a, b, n in pairs]
        after = s.call(s.laid_out(_written_out(mixed)), **changed)
        _same_bits(after[:, :, :rows], before[:, :, :rows], f"outputs before {cut}, the future x{factor:g}")
    if "gradients" in case.checks:
        _, dk, dv = s.gradients(before[:, :, :rows], inputs, s.weight[:, :, :rows])
        for name, grad in (("k", dk), ("v", dv)):
            expect(bool((grad[:, :, cut:] == 0).all()), f"{name} from {cut} on has a gradient")


def neighbours(s: Subject) -> None:
    """The first row of the batch does not depend on the others, NaN included."""
    clean = _written_out(s.inputs)
    others = [torch.cat([x[:1], x[1:] * torch.nan]) for x in clean]
    before, after = (s.call(s.laid_out(_written_out(inputs))) for inputs in (clean, others))
    _same_bits(after[:1], before[:1], "a row beside NaN")


def steps(s: Subject) -> None:
    """`step` in the chunks of the case gives the output of `forward`."""
    m, key_mask = s.mechanism, s.masks.get("key_mask")
    if m.backend.startswith("sdpa_"):
        # One kernel by name takes no chunk after the first: it would need a dense mask.
        m = build(s.case, backend="auto")
    _, k, v = s.leaves
    state = m.init_state(len(k), k.shape[1], k.shape[3], v_head_dim=v.shape[3], dtype=k.dtype)
    order, start, outputs = torch.arange(len(k)), 0, [s.out[:, :, :0]]
    for size in s.case.chunks:
        part = slice(start, start + size)
        new = (x[order, :, part] for x in s.leaves)
        with poisoned_allocations():
            out, state = m.step(*new, state, key_mask=None if key_mask is None else key_mask[order, part])
        outputs.append(out[order])
        start += size
        # Rows change places, as in a beam search; turned round twice, they are where they were.
        order, state = order.flip(0), state.reorder(torch.arange(len(k)).flip(0))
    _matches(s, torch.cat(outputs, 2).detach(), f"steps of {s.case.chunks}")


def paper(s: Subject) -> None:
    """The matrix is that of the paper's definition in plain loops."""
    q, k, _ = s.doubles
    expected, matrix = oracle_matrix(s.exact, q, k, **s.masks), s.matrix
    if isinstance(s.exact, LinearMechanism):
        # The oracle takes logarithms, in which no weight is too small; here a row may be, or a weight beside others.
        expected = torch.where((matrix == 0).all(-1, keepdim=True), 0.0, expected)
    if matrix.numel():
        r = s.rounding(torch.float64)
        _close(
            matrix, expected, torch.where(s.visible, 8 * r.errors + 1e-12 * r.weights + 1e-30, 0.0), "matrix"
        )


CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (output, gradients, padding, future, neighbours, steps, derivative, repeat, paper)
}
