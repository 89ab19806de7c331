"""The laws are trusted for what they catch: every planted defect, by the law meant for it, and nothing else."""

from __future__ import annotations

import re

import pytest
from planted import DEFECTS, TWINS, Defect, violation

from efficient_attn.testing import LAWS


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_defect_is_caught_by_its_laws(defect: Defect) -> None:
    for law, pattern in defect.caught.items():
        message = violation(defect.mechanism(), law)
        assert message is not None, f"{law} lets it pass ({defect.source})"
        assert re.search(pattern, message), f"{law} broke for another reason: {message}"
    for law in defect.missed:
        message = violation(defect.mechanism(), law)
        assert message is None, f"{law} was thought to miss it: {message}"


@pytest.mark.parametrize("twin", TWINS)
def test_no_false_alarm(twin: str) -> None:
    """The mechanism without the defect passes the laws that catch the defects planted in it."""
    laws = {law for defect in DEFECTS if defect.twin == twin for law in (*defect.caught, *defect.missed)}
    applicable = {law for law in laws if law not in LAWS or LAWS[law].applies(TWINS[twin]())}
    assert applicable
    assert {law: violation(TWINS[twin](), law) for law in sorted(applicable)} == dict.fromkeys(applicable)


def test_every_law_catches_something() -> None:
    """A law that no planted defect breaks has not been seen to work."""
    assert set(LAWS) - {law for defect in DEFECTS for law in defect.caught} == set()
