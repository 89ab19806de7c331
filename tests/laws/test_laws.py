"""Every law over every example of every mechanism, on every backend that runs here."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
from oracles import oracle_matrix

from efficient_attn.backends import select
from efficient_attn.mechanisms import MECHANISMS, Mechanism
from efficient_attn.testing import LAWS
from efficient_attn.testing.laws import costs, structure, tracing
from efficient_attn.testing.laws.law import expect, expect_close
from efficient_attn.testing.sampling import HEAD_DIM, HEADS, LENGTH, holes, in_dtype, sample

BACKEND_FREE = {name for module in (costs, structure, tracing) for name in LAWS if hasattr(module, name)}
BACKEND_FREE -= {"dropout_is_dropout"}
"""Laws that choose backends themselves, or speak of none."""


def mechanisms() -> Iterator[tuple[str, Mechanism, bool]]:
    """Each example, and a copy on each other backend that can run it; the flag tells the two apart."""
    for name, cls in MECHANISMS.items():
        for number, example in enumerate(cls.examples(LENGTH, HEADS, HEAD_DIM)):
            yield f"{name}{number}", example, True
            problem = example._problem(*sample(example), None, None, None, None)
            own = select(example.backends, problem, example.backend).name
            for backend in example.backends:
                # A backend that takes only some head sizes or masks is met through "auto".
                if backend.name == own or backend.refuse(problem):
                    continue
                other = copy.deepcopy(example)
                other.backend = backend.name
                yield f"{name}{number}-{backend.name}", other, False


CASES = list(mechanisms())


@pytest.mark.parametrize(
    ("law", "mechanism"),
    [
        pytest.param(law, mechanism, id=f"{law.name}-{label}")
        for law in LAWS.values()
        for label, mechanism, itself in CASES
        if law.applies(mechanism) and (itself or law.name not in BACKEND_FREE)
    ],
)
def test_law(law, mechanism, record_property):
    record_property("law", law.name)
    record_property("cases", law.run(mechanism))


@pytest.mark.parametrize("mechanism", [pytest.param(m, id=label) for label, m, itself in CASES if itself])
def test_matrix_is_the_paper(mechanism, record_property):
    """Matrix and output are those of a loop written from the paper, which shares no code with them."""
    m, cases = in_dtype(mechanism, sample(mechanism)[0].dtype), 0
    shapes = ((LENGTH, LENGTH, None), (5, LENGTH, None), (6, LENGTH, 11), (1, 1, None), (9, 6, 0))
    for q_len, kv_len, offset in shapes:
        q, k, v = sample(m, q_len, kv_len)
        choices = [{}, {"key_mask": holes(kv_len)}, {"key_mask": holes(kv_len) & (holes(kv_len, 1)[:, :1])}]
        if m.supports_segments:
            ids = (holes(kv_len, 2).cumsum(1) // 7) - holes(kv_len, 3)[:, :1].long()
            choices.append({"segment_ids": ids, "key_mask": holes(kv_len)})
        for masks in choices:
            expected = oracle_matrix(m, q, k, q_offset=offset, **masks)
            matrix = m.matrix(q, k, q_offset=offset, **masks)
            expect(matrix.shape == expected.shape, f"shape {tuple(matrix.shape)}")
            expect_close(matrix, expected, f"matrix, {q_len} x {kv_len}, q_offset {offset}, {list(masks)}")
            repeated = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
            out = m(q, k, v, q_offset=offset, **masks)
            what = f"{q_len} x {kv_len}, q_offset {offset}, {list(masks)}"
            expect_close(out, expected @ repeated, f"output, {what}")
            cases += 1
    record_property("law", "matrix_is_the_paper")
    record_property("cases", cases)


def test_every_law_runs():
    """A law that no example is subject to, or a mechanism that escapes most, would go unnoticed."""
    for law in LAWS.values():
        assert any(law.applies(m) for _, m, _ in CASES), law.name
    for label, m, _ in CASES:
        assert sum(law.applies(m) for law in LAWS.values()) >= 20, label
