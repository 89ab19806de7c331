"""Break the package on purpose, one mistake at a time, and see that the tests notice: python -m mutants."""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from . import SUBJECTS
from .battery import Law, Tests, checks, law_names
from .mutant import Mutant, Subject
from .server import Outcome, Task, ask, in_forks

SHARE = 0.98
"""Of the mutants that are not explained, at least this many must be killed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants, print the table, and return 0 if the tests are to be trusted."""
    options = _options(arguments)
    chosen = _chosen(options.only, options.sample, options.seed)
    for _, mutant in chosen:
        mutant.source()
    laws, start = ask(law_names), time.monotonic()
    tasks = [Task(mutant, tuple(checks(subject, laws))) for subject, mutant in chosen if not mutant.survives]
    alarms = []
    if not options.without_true_code:
        alarms = [_alarm(outcome) for outcome in in_forks(_true_code(chosen, laws), options.jobs)]
    print(f"{len(tasks)} mutants", flush=True)
    outcomes = []
    for outcome in in_forks(tasks, options.jobs):
        outcomes.append(outcome)
        print(_line(outcome), flush=True)
    trusted = _summary(chosen, outcomes) and not any(alarms)
    print(f"{time.monotonic() - start:.0f} s, {options.jobs} at a time")
    return 0 if trusted else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--only", default="", help="a pattern for subject, file or description")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="selects the sample")
    parser.add_argument("--without-true-code", action="store_true", help="do not look for false alarms")
    return parser.parse_args(arguments)


def _chosen(only: str, sample: int | None, seed: int) -> list[tuple[Subject, Mutant]]:
    every = [(subject, mutant) for subject in SUBJECTS for mutant in subject.mutants]
    found = [(s, m) for s, m in every if re.search(only, f"{s.name} {m.file} {m.why}")]
    return found if sample is None else random.Random(seed).sample(found, min(sample, len(found)))


def _true_code(chosen: Iterable[tuple[Subject, Mutant]], laws: tuple[str, ...]) -> Iterator[Task]:
    """Every check that any mutant is put to, once, on the code as it is."""
    subjects = {subject.name: subject for subject, _ in chosen}.values()
    mechanisms = tuple(sorted({name for subject in subjects for name in subject.mechanisms}))
    everything = [check for subject in subjects for check in checks(subject, laws)]
    files = dict.fromkeys(check.file for check in everything if isinstance(check, Tests))
    named = dict.fromkeys(check.name for check in everything if isinstance(check, Law))
    yield from (Task(None, (Tests(file),)) for file in files)
    yield from (Task(None, (Law(law, mechanisms),)) for law in named)


def _alarm(outcome: Outcome) -> bool:
    (check,) = outcome.task.checks
    what = check.file if isinstance(check, Tests) else check.name
    verdict = (
        f"{outcome.cases:6} cases hold" if outcome.violation is None else f"FALSE ALARM {outcome.violation}"
    )
    print(f"true code  {what:45} {outcome.seconds:6.1f} s  {verdict}", flush=True)
    return outcome.violation is not None


def _line(outcome: Outcome) -> str:
    mutant, by = outcome.task.mutant, outcome.violation
    assert mutant is not None
    verdict = "SURVIVES" if by is None else "timeout" if "timeout:" in by else "killed"
    by = " ".join((by or f"{outcome.cases} cases").split())
    return f"{verdict:8} {outcome.seconds:5.1f} s  {mutant.file:30} {mutant.why:60} {by[:150]}"


def _summary(chosen: list[tuple[Subject, Mutant]], outcomes: list[Outcome]) -> bool:
    """Print the totals and every survivor; whether enough are killed, and every survivor is explained."""
    subject_of = {mutant: subject.name for subject, mutant in chosen}
    survivors = [outcome.task.mutant for outcome in outcomes if outcome.violation is None]
    killed = Counter(subject_of[o.task.mutant] for o in outcomes if o.task.mutant and o.violation)
    total = Counter(subject.name for subject, _ in chosen)
    explained = [mutant for _, mutant in chosen if mutant.survives]
    print()
    for name, count in total.items():
        print(f"{name:20} {killed[name]:4} of {count:4} killed")
    print(
        f"{'in all':20} {killed.total():4} of {total.total():4} killed: {killed.total() / total.total():.1%}"
    )
    timeouts = sum("timeout:" in (outcome.violation or "") for outcome in outcomes)
    print(f"{timeouts} of them by timeout; {len(explained)} survivors explained, {len(survivors)} not")
    for mutant in explained:
        print(f"  explained    {mutant.file}: {mutant.why}: {mutant.survives}")
    for mutant in survivors:
        assert mutant is not None
        print(f"  unexplained  {mutant.file}: {mutant.why}")
    return not survivors and killed.total() >= SHARE * total.total()


if __name__ == "__main__":
    sys.exit(main())
