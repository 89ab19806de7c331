"""Random cases of every mechanism: 10,000 in each run, other ones every time; `--fuzz N` makes it N a mechanism."""

from __future__ import annotations

import inspect
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fuzz import CHECKS, Case, CaseFailed, run, search
from fuzz.draw import OPTIONS, cases
from hypothesis import given, settings

from efficient_attn.mechanisms import MECHANISMS

ROOT = Path(__file__).parent.parent
IN_ALL = 10_000
"""Cases in a run without `--fuzz`."""
AT_ONCE, SHARDS = 2_500, 4
"""Cases of one test at most, and tests for each mechanism at least, so that workers share them evenly."""

CAUGHT: dict[str, tuple[str, str]] = {
    "causal_flag_is_ignored": ("full", "future|paper|steps"),
    "gradient_reaches_the_future_through_a_straight_through_term": ("linear", "future|gradients|output"),
    "offset_is_ignored_in_the_fast_path": ("linear", "output"),
    "offset_is_ignored_everywhere": ("sliding_window", "paper"),
    "state_forgets_the_key_mask": ("full", "steps"),
    "tokens_of_one_step_see_each_other": ("linear", "steps"),
    "key_mask_is_swallowed": ("linformer", "output|padding|paper|gradients"),
    "nan_padding_spreads": ("sliding_window", "output|padding"),
    "masked_values_get_a_gradient": ("full", "gradients|padding"),
    "fully_masked_row_is_nan": ("sliding_window", "output"),
    "nan_crosses_the_batch": ("sliding_window", "neighbours|output|future"),
    "only_the_last_document_is_isolated": ("linear", "output|paper|gradients"),
    "window_is_one_too_wide": ("sliding_window", "paper|steps"),
    "overlapping_blocks_count_twice": ("bigbird", "output|gradients|steps"),
    "last_rows_are_never_written": ("sliding_window", "output"),
    "strides_are_ignored": ("sliding_window", "output|gradients|steps"),
}
"""Defects of tests/planted that some hundred cases find: in which mechanism, and the checks that may say so."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each share of each mechanism's cases."""
    if "share" not in metafunc.fixturenames:
        return
    each = metafunc.config.getoption("fuzz") or -(-IN_ALL // len(MECHANISMS))
    shards = max(SHARDS, -(-each // AT_ONCE))
    shares = [each * (i + 1) // shards - each * i // shards for i in range(shards)]
    metafunc.parametrize(
        ("mechanism", "share"),
        [pytest.param(name, n, id=f"{name}-{i}") for name in MECHANISMS for i, n in enumerate(shares)],
    )


def test_random_cases_hold(mechanism: str, share: int, record_property) -> None:
    made = search(mechanism, share)
    assert made["cases"] == share
    record_property("mechanism", mechanism)
    record_property("checks", dict(made))


@pytest.mark.parametrize("defect", CAUGHT)
def test_the_battery_finds_what_was_planted(defect: str) -> None:
    mechanism, checks = CAUGHT[defect]
    with pytest.raises(CaseFailed, match=f"^({checks}): "):
        search(mechanism, 400, planted=defect, seed=0, shrink=False)


def test_a_failure_is_small_and_its_last_line_repeats_it() -> None:
    with pytest.raises(CaseFailed) as caught:
        search("sliding_window", 400, planted="window_of_the_fast_path_is_one_too_narrow", seed=0)
    message = str(caught.value)
    command = message.splitlines()[-1]
    variable, _, *rest = shlex.split(command)
    case = Case.parse(rest[-1])
    assert case.command == command
    assert case.kv_len <= 4 and case.q_len <= 4 and case.batch * case.heads == 1, case
    assert run(replace(case, planted=""))["output"] == 1, "without the defect it holds"

    environment = os.environ | dict([variable.split("=")])
    again = subprocess.run(
        [sys.executable, *rest], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1, again.stderr
    assert again.stdout.strip() == message


def drawn(mechanism: str, number: int) -> list[Case]:
    found: list[Case] = []

    @settings(max_examples=number)
    @given(cases(mechanism))
    def note(case: Case) -> None:
        found.append(case)

    note()
    return found


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_option_is_drawn_and_every_case_is_one_line(mechanism: str) -> None:
    found = drawn(mechanism, 100)
    options = {option for case in found for option in case.options} | {"backend"}
    # Linformer takes is_causal to refuse it.
    assert set(inspect.signature(MECHANISMS[mechanism]).parameters) - options <= {"is_causal"}
    for case in found:
        assert "\n" not in repr(case) and Case.parse(repr(case)) == case


def test_every_check_is_made() -> None:
    assert {check for case in drawn("linear", 200) for check in case.checks} == set(CHECKS)
    assert set(OPTIONS) == set(MECHANISMS)
