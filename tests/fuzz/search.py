"""Let hypothesis look for a case that fails, and shrink it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import hypothesis
from hypothesis import HealthCheck, Phase

from .case import Case
from .checks import CaseFailed, run
from .draw import cases


def search(
    mechanism: str, examples: int, *, planted: str = "", seed: int | None = None, shrink: bool = True
) -> Counter[str]:
    """Run that many random cases of the mechanism, and count the checks made.

    Args:
        planted: a defect of tests/planted to break each case's mechanism with.
        seed: repeats a search; other cases every time if None.
        shrink: look for a smaller case that fails, too.
    Raises:
        CaseFailed: for the smallest case found that does not hold.
    """
    made: Counter[str] = Counter()

    @hypothesis.settings(
        max_examples=examples,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        deadline=None,
        database=None,
        derandomize=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(cases(mechanism))
    def holds(case: Case) -> None:
        made.update(run(replace(case, planted=planted) if planted else case))

    if seed is not None:
        holds = hypothesis.seed(seed)(holds)
    try:
        holds()
    except CaseFailed as failure:
        # Without what hypothesis notes below it, so that the command is the last line.
        raise CaseFailed(str(failure)) from failure.__cause__
    return made
