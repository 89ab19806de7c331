"""The map of the battery is right: what it names exists, and no law is missing from it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from battery import COSTS, PROPERTIES, Property

from efficient_attn.testing import LAWS

TESTS = Path(__file__).parent.parent


def test_there_are_twenty_four():
    assert list(PROPERTIES) == list(range(1, 25))


@pytest.mark.parametrize("claim", PROPERTIES.values(), ids=[str(number) for number in PROPERTIES])
def test_what_holds_a_property_exists(claim: Property):
    assert claim.laws or claim.tests
    assert [law for law in claim.laws if law not in LAWS] == []
    for test in claim.tests:
        path, _, function = test.partition("::")
        module = ast.parse((TESTS / path).read_text())
        assert function in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}, test


def test_every_law_holds_a_property_or_a_cost():
    named = [*COSTS, *(law for claim in PROPERTIES.values() for law in claim.laws)]
    assert sorted(named) == sorted(LAWS), "each law once"


def test_every_file_of_this_folder_is_on_the_map():
    named = {test.partition("::")[0] for claim in PROPERTIES.values() for test in claim.tests}
    here = {f"properties/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert here - named == {f"properties/{Path(__file__).name}"}
