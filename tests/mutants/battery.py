"""What is run against a mutant: test files and laws, in this process, until something is violated."""

from __future__ import annotations

import contextlib
import io
import signal
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from .mutant import ROOT, Subject

SECONDS = 60
"""What a single test or law may take: most take well under one."""

SLOW = ("largest_intermediate_grows_as_declared", "exports", "compiles_to_one_graph")
"""Laws to run last."""

PAPER = "matrix_is_the_paper"
"""The comparison with the oracles, run as if it were a law, and first."""


@dataclass(frozen=True)
class Tests:
    """One test file."""

    file: str


@dataclass(frozen=True)
class Law:
    """One law over the examples of some mechanisms, on every backend that runs them."""

    name: str
    mechanisms: tuple[str, ...]


Check = Tests | Law


@dataclass
class Result:
    """How many cases held, and the first violation."""

    cases: int = 0
    violation: str | None = None
    seconds: float = 0.0


def checks(subject: Subject, laws: tuple[str, ...]) -> list[Check]:
    """The battery of a subject, in order."""
    tests, others = ([Tests(file) for file in files] for files in (subject.tests, subject.others))
    ranked = sorted(laws, key=lambda law: (law in SLOW, law not in subject.first))
    of_laws = [Law(law, subject.mechanisms) for law in ranked if subject.mechanisms]
    fast, slow = ([law for law in of_laws if (law.name in SLOW) == late] for late in (False, True))
    return [*tests, *fast, *others, *slow]


def law_names() -> tuple[str, ...]:
    """Every law, the comparison with the paper first."""
    from efficient_attn.testing import LAWS

    return (PAPER, *LAWS)


def run(check: Check) -> Result:
    """Run `check` up to its first violation."""
    return _run_tests(check.file) if isinstance(check, Tests) else _run_law(check)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError inside if it takes more of the processor's time, whatever else the machine does."""

    def stop(signum: int, frame: types.FrameType | None) -> None:
        raise TimeoutError(f"timeout: more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class _FirstFailure:
    """A pytest plugin: counts what passed, and keeps the name and the last words of what did not."""

    def __init__(self) -> None:
        self.result = Result()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        with time_limit(SECONDS):
            yield

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)
        if report.when == "call" and report.passed:
            self.result.cases += int(dict(report.user_properties).get("cases", 1))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and self.result.violation is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash is not None else str(report.longrepr).strip().splitlines()[-1]
            self.result.violation = f"{report.nodeid}: {said}"


def _run_tests(file: str) -> Result:
    plugin, path = _FirstFailure(), str(ROOT / file)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}", path], [plugin]
        )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and plugin.result.violation is None:
        plugin.result.violation = f"{file}: pytest ended with {code}"
    return plugin.result


def _run_law(law: Law) -> Result:
    from laws import test_laws

    result = Result()
    for label, mechanism, itself in test_laws.CASES:
        name = label.partition("-")[0].rstrip("0123456789")
        if name not in law.mechanisms or not _applies(law.name, mechanism, itself, test_laws):
            continue
        try:
            with time_limit(SECONDS):
                result.cases += _hold(law.name, mechanism, test_laws)
        except Exception as error:
            kind = "" if type(error).__name__ == "LawViolation" else f"{type(error).__name__}: "
            result.violation = f"{law.name}, {label}: {kind}{error}"
            break
    return result


def _applies(law: str, mechanism: Any, itself: bool, module: Any) -> bool:
    if law == PAPER:
        return itself
    return module.LAWS[law].applies(mechanism) and (itself or law not in module.BACKEND_FREE)


def _hold(law: str, mechanism: Any, module: Any) -> int:
    torch.manual_seed(0)
    run: Callable[[Any], int] = module.LAWS[law].run if law != PAPER else None
    if run is not None:
        return run(mechanism)
    said: dict[str, Any] = {}
    module.test_matrix_is_the_paper(mechanism, said.__setitem__)
    return said["cases"]
