"""What a planted defect is, the mechanisms that defects are planted in, and the tools to plant them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from oracles import oracle_matrix
from torch import Tensor

from efficient_attn import (
    BigBirdAttention,
    FullAttention,
    LinearAttention,
    LinformerAttention,
    LongformerAttention,
    Mechanism,
    PerformerAttention,
    SlidingWindowAttention,
)
from efficient_attn.backends import Backend
from efficient_attn.inputs import accumulation_dtype
from efficient_attn.ops.dense import safe_softmax
from efficient_attn.ops.problem import allowed_pairs
from efficient_attn.testing import check_mechanism
from efficient_attn.testing.laws.law import expect, expect_close
from efficient_attn.testing.sampling import HEAD_DIM, HEADS, LENGTH, expand_heads, holes, in_dtype, sample

TWINS: dict[str, Callable[[], Any]] = {
    "full": lambda: FullAttention(),
    "full_causal": lambda: FullAttention(is_causal=True),
    "window": lambda: SlidingWindowAttention(6),
    "window_causal": lambda: SlidingWindowAttention(6, is_causal=True),
    "window_scaled": lambda: SlidingWindowAttention(6, scale=0.3),
    "sinks": lambda: SlidingWindowAttention(6, num_sinks=3),
    "sinks_causal": lambda: SlidingWindowAttention(6, num_sinks=3, is_causal=True),
    "longformer": lambda: LongformerAttention(6, global_tokens=2),
    "bigbird": lambda: BigBirdAttention(block_size=4, num_random_blocks=2),
    "linformer": lambda: LinformerAttention(LENGTH, HEADS, rank=9),
    "performer": lambda: PerformerAttention(HEAD_DIM, num_features=16),
    "performer_causal": lambda: PerformerAttention(HEAD_DIM, num_features=16, is_causal=True),
    "linear": lambda: LinearAttention(),
    "linear_causal": lambda: LinearAttention(is_causal=True),
    "linear_scaled": lambda: LinearAttention(scale=0.3),
    "linear_exp": lambda: LinearAttention(feature_map="exp"),
}
"""The mechanisms without a defect, for the sizes of the laws."""


@dataclass(frozen=True)
class Defect:
    """A mechanism that is wrong in one way, and what must notice."""

    name: str
    source: str
    """The library, version or issue that had it; or the rule of the contract that it breaks."""
    twin: str
    plant: Callable[[Any], Mechanism]
    """Breaks the twin that it is given."""
    caught: dict[str, str]
    """The laws meant for it, and a pattern that their message must match."""
    missed: tuple[str, ...]
    """Laws that hold nevertheless: what the defect slips past."""

    def mechanism(self) -> Mechanism:
        """The broken mechanism."""
        return self.plant(TWINS[self.twin]())


DEFECTS: list[Defect] = []


def defect(source: str, twin: str, caught: dict[str, str], missed: tuple[str, ...] = ()) -> Callable:
    """Register a function that breaks the mechanism it is given; its name is the defect's."""

    def register(plant: Callable[[Any], Mechanism]) -> Callable[[Any], Mechanism]:
        DEFECTS.append(Defect(plant.__name__, source, twin, plant, caught, missed))
        return plant

    return register


def violation(mechanism: Mechanism, law: str) -> str | None:
    """What `law`, or the comparison with the paper, has to say against the mechanism."""
    if law == equals_the_paper.__name__:
        try:
            equals_the_paper(mechanism)
        except AssertionError as error:
            return str(error)
        return None
    report = check_mechanism(mechanism, laws=[law], raise_on_failure=False)
    assert not report.inapplicable, f"{law} does not apply to {mechanism}"
    return report.broken.get(law)


def equals_the_paper(mechanism: Mechanism) -> None:
    """Matrix and output are those of a loop written from the paper, which shares no code with the package."""
    m, length = in_dtype(mechanism, torch.float64), 23
    for key_mask, q_len, offset in ((None, length, None), (holes(length), length, None), (None, 5, 9)):
        q, k, v = sample(m, q_len, length)
        expected = oracle_matrix(m, q, k, key_mask=key_mask, q_offset=offset)
        what = f"{q_len} queries, {'no mask' if key_mask is None else 'key_mask'}"
        expect_close(m.matrix(q, k, key_mask=key_mask, q_offset=offset), expected, f"matrix, {what}")
        out = m(q, k, v, key_mask=key_mask, q_offset=offset)
        expect_close(out, expected @ expand_heads(v, q.shape[1]), f"output, {what}")
    expect(bool(expected.any()), "the oracle saw nothing")


# Tools. A plant changes the class of the instance that it is given, because laws copy their mechanism.


def broken(mechanism: Mechanism, **members: Any) -> Mechanism:
    """`mechanism` with these members of its class replaced; the class keeps its name, which chooses the oracle."""
    cls = type(mechanism)
    mechanism.__class__ = type(cls.__name__, (cls,), members)
    return mechanism


def preferred(mechanism: Any) -> Backend:
    """The backend that a CPU takes first."""
    return next(backend for backend in mechanism.backends if backend.name != "triton")


def fast_path(mechanism: Mechanism, run: Callable[[Any], Tensor]) -> Mechanism:
    """`mechanism` with its preferred backend replaced by `run`; its matrix stays right."""
    first = preferred(mechanism)
    backends = (replace(backend, run=run) if backend is first else backend for backend in mechanism.backends)
    return broken(mechanism, backends=tuple(backends))


def before_fast_path(mechanism: Mechanism, change: Callable[[Any], dict[str, Any]]) -> Mechanism:
    """`mechanism` whose preferred backend gets the problem with these fields changed; its matrix stays right."""
    run = preferred(mechanism).run
    return fast_path(mechanism, lambda p: run(replace(p, **change(p))))


def everywhere(mechanism: Mechanism, change: Callable[[Any], dict[str, Any]]) -> Mechanism:
    """`mechanism` in which fast path and matrix both see the problem with these fields changed."""
    cls = type(mechanism)

    def _problem(self: Any, *arguments: Any) -> Any:
        problem = cls._problem(self, *arguments)
        return replace(problem, **change(problem))

    return broken(mechanism, _problem=_problem)


def problem_of(mechanism: Any, q: Tensor, k: Tensor, v: Tensor, masks: dict[str, Any]) -> Any:
    """The problem that `forward` would pose."""
    names = ("key_mask", "segment_ids", "q_offset", "attn_bias")
    return mechanism._problem(q, k, v, *(masks.get(name) for name in names))


def with_mask(mask: Any) -> dict[str, Any]:
    """The fields of a softmax problem that say its pattern."""
    return {"mask": mask, "mask_spec": mask.spec()}


def masked_scores(p: Any, fill: float = -torch.inf) -> Tensor:
    """scale q k^T in the accumulation dtype, `fill` where a mask forbids."""
    dtype = accumulation_dtype(p.q.dtype)
    scores = p.q.to(dtype) @ expand_heads(p.k, p.q.shape[1]).to(dtype).mT * p.scale
    return scores.masked_fill(~allowed_pairs(p), fill)


def apply(weights: Tensor, p: Any) -> Tensor:
    """weights @ v in the dtype of q."""
    return (weights @ expand_heads(p.v, p.q.shape[1]).to(weights.dtype)).to(p.q.dtype)


def dense(p: Any) -> Tensor:
    """Softmax attention written down, right: to be spoilt."""
    return apply(safe_softmax(masked_scores(p)), p)


def kernel(p: Any, phi_q: Tensor, phi_k: Tensor) -> Tensor:
    """Linear attention written down, right for the features given."""
    weights = torch.where(allowed_pairs(p), phi_q @ expand_heads(phi_k, p.q.shape[1]).mT, 0.0)
    total = weights.sum(-1, keepdim=True)
    return apply(weights / torch.where(total == 0, 1.0, total), p)
