"""What every test runs under: one thread, fixed seeds, and a summary that hides nothing."""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

# Before torch is imported: several workers share the cores, and so do the interpreters that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from battery import PROPERTIES

from efficient_attn.kernels.screening import HEADING

torch.set_num_threads(1)

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")

SEED = 0
LAWS = PurePosixPath("tests/laws")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, help="random cases of each mechanism, instead of 10,000 in all")


def pytest_runtest_setup() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(SEED)
    torch.manual_seed(SEED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# The summary. It reads only reports, which xdist sends to the controller, so any number of workers is right.


def law_cases(passed: Iterable[pytest.TestReport]) -> Counter[str]:
    """The number of cases that held, by law, as the tests gave them to `record_property`, of one law or of many."""
    cases: Counter[str] = Counter()
    for report in passed:
        path = PurePosixPath(report.nodeid.partition("::")[0])
        said = dict(report.user_properties)
        if report.when == "call" and "laws" in said:
            cases.update(said["laws"])
        elif report.when == "call" and LAWS in path.parents:
            cases[str(said.get("law", path.stem.removeprefix("test_")))] += int(said.get("cases", 1))
    return cases


def property_cases(passed: Iterable[pytest.TestReport]) -> Counter[int]:
    """The number of cases that held, by property of the battery."""
    holds = {name: number for number, claim in PROPERTIES.items() for name in (*claim.laws, *claim.tests)}
    cases: Counter[int] = Counter()
    for report in passed:
        said = dict(report.user_properties)
        test = report.nodeid.removeprefix("tests/").partition("[")[0]
        number = holds.get(str(said.get("law")), holds.get(test))
        if report.when == "call" and number is not None:
            cases[number] += int(said.get("cases", 1))
    return cases


def fuzzed(passed: Iterable[pytest.TestReport]) -> dict[str, Counter[str]]:
    """How often each check held in random cases, by mechanism."""
    made: dict[str, Counter[str]] = defaultdict(Counter)
    for report in passed:
        said = dict(report.user_properties)
        if report.when == "call" and "checks" in said:
            made[str(said["mechanism"])].update(said["checks"])
    return made


def screened(passed: Iterable[pytest.TestReport]) -> list[str]:
    """What each kernel compiled to, in one order however many workers there were."""
    said = (dict(report.user_properties) for report in passed if report.when == "call")
    return sorted(str(properties["screened"]) for properties in said if "screened" in properties)


def skip_reasons(skipped: Iterable[pytest.TestReport]) -> dict[str, list[str]]:
    """The tests skipped, by reason."""
    tests: dict[str, list[str]] = defaultdict(list)
    for report in skipped:
        where = report.longrepr
        reason = where[2] if isinstance(where, tuple) else str(where)
        tests[reason.removeprefix("Skipped: ")].append(report.nodeid)
    return tests


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if reasons := skip_reasons(terminalreporter.stats.get("skipped", [])):
        terminalreporter.section("SKIPPED", sep="!", yellow=True, bold=True)
        for reason, tests in sorted(reasons.items()):
            terminalreporter.write_line(f"{len(tests)} skipped: {reason}", yellow=True, bold=True)
            for test in tests:
                terminalreporter.write_line(f"  {test}", yellow=True)
    if cases := law_cases(terminalreporter.stats.get("passed", [])):
        terminalreporter.section("laws")
        for name, count in sorted(cases.items()):
            terminalreporter.write_line(f"{count:8,} cases  {name}")
        terminalreporter.write_line(f"{cases.total():8,} cases  in all")
    if held := property_cases(terminalreporter.stats.get("passed", [])):
        terminalreporter.section("properties")
        for number, count in sorted(held.items()):
            terminalreporter.write_line(f"{count:8,} cases  {number:2}. {PROPERTIES[number].claim}")
    if rows := screened(terminalreporter.stats.get("passed", [])):
        terminalreporter.section("kernels compiled without a GPU")
        for row in (HEADING, *rows):
            terminalreporter.write_line(row)
        terminalreporter.write_line(f"{len(rows)} variants")
    if made := fuzzed(terminalreporter.stats.get("passed", [])):
        terminalreporter.section("random cases")
        names = list(sum(made.values(), Counter()))
        for mechanism, counts in {**made, "in all": sum(made.values(), Counter())}.items():
            checks = ", ".join(f"{counts[name]:,} {name}" for name in names if name != "cases")
            terminalreporter.write_line(f"{counts['cases']:8,} cases  {mechanism}: {checks}")
