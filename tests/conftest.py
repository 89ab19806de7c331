"""What every test runs under: one thread, fixed seeds, checked shapes, and a summary that hides nothing."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import random
import typing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any

# Before torch is imported: several workers share the cores, and so do the interpreters that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jaxtyping
import pytest
import torch
from beartype import beartype

torch.set_num_threads(1)

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")

SEED = 0
LAWS = PurePosixPath("tests/laws")


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
    """The number of cases that held, by law: one a test, or what it gave to `record_property("cases", n)`."""
    cases: Counter[str] = Counter()
    for report in passed:
        path = PurePosixPath(report.nodeid.partition("::")[0])
        if report.when == "call" and LAWS in path.parents:
            cases[path.stem.removeprefix("test_")] += int(dict(report.user_properties).get("cases", 1))
    return cases


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
        each = ", ".join(f"{law} {count} cases" for law, count in sorted(cases.items()))
        terminalreporter.write_line(f"laws: {each}; {cases.total()} in all")


# The shapes in signatures. jaxtyping's import hook puts `jaxtyping.jaxtyped` on every function of the
# package. What stands there under pytest checks the jaxtyping annotations alone (pyright checks the other
# types). It checks nothing while torch.compile or torch.export traces, for they cannot trace the checks; and
# a function that refuses its arguments does so itself, for its own error is the documented one.

Function = Callable[..., Any]


def checks_shapes(fn: Any = None, *, typechecker: object = None) -> Any:
    """Stand in for `jaxtyping.jaxtyped` in the modules that the import hook reads."""
    if fn is None:
        return functools.partial(checks_shapes, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = checks_shapes(fn.__init__)
        return fn
    if not any(_is_shape(hint) for hint in _hints(fn).values()):
        return fn

    # Made at the first call, when every name in the annotations has been defined.
    checked = functools.cache(lambda: _checked(fn))

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        try:
            return checked()(*args, **kwargs)
        except jaxtyping.TypeCheckError as mismatch:
            if not getattr(mismatch, "accepted_by_the_function", False):
                fn(*args, **kwargs)
                mismatch.accepted_by_the_function = True
            raise

    return call


def _checked(fn: Function) -> Function:
    """`fn` under beartype, every annotation but the shapes' forgotten."""
    hints = {name: hint for name, hint in _hints(fn).items() if _is_shape(hint)}
    for hint in hints.values():
        if isinstance(hint, str):
            raise NameError(f"{hint}, in {fn.__qualname__}: a name there is not imported at run time")
    signature = inspect.signature(fn)
    parameters = [p.replace(annotation=hints.get(p.name, Any)) for p in signature.parameters.values()]

    @functools.wraps(fn)
    def same(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    returns = hints.get("return", Any)
    same.__signature__ = signature.replace(parameters=parameters, return_annotation=returns)
    return _jaxtyped(same, typechecker=beartype)


def _hints(fn: Function) -> dict[str, Any]:
    hints = {}
    for name, hint in fn.__annotations__.items():
        try:
            hints[name] = eval(hint, fn.__globals__) if isinstance(hint, str) else hint
        except NameError:
            # A name still to be defined, or imported for type checkers only; a shape's text gives it away.
            hints[name] = hint
    return hints


def _is_shape(hint: Any) -> bool:
    if isinstance(hint, str):
        return "[Tensor, " in hint
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_is_shape(inner) for inner in typing.get_args(hint))


_jaxtyped = jaxtyping.jaxtyped
jaxtyping.jaxtyped = checks_shapes
jaxtyping.install_import_hook("efficient_attn", "beartype.beartype")
