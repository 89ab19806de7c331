"""The package's mutants apply to the code as it stands, and the tests kill a few of them; `make mutants` runs all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutants import SUBJECTS, Mutant

TESTS = Path(__file__).parent
MUTANTS = [mutant for subject in SUBJECTS for mutant in subject.mutants]
SAMPLE, SEED = 12, 1

HARMLESS = """
import sys
from mutants import Mutant, Subject, __main__

harmless = Mutant("feature_maps.py", "_LARGEST = 60.0", "_LARGEST = 61.0 - 1.0", "no mistake at all"{explained})
__main__.SUBJECTS = (Subject("harmless", (harmless,), tests=("tests/test_feature_maps.py",)),)
sys.exit(__main__.main([]))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=TESTS.parent, env=environment, capture_output=True, text=True
    )


def test_every_mutant_applies_and_changes_something(record_property: Callable[[str, Any], None]) -> None:
    assert len(MUTANTS) >= 220
    assert max(Counter((mutant.file, mutant.why) for mutant in MUTANTS).values()) == 1
    for mutant in MUTANTS:
        compile(mutant.source(), mutant.file, "exec")
    record_property("cases", len(MUTANTS))


def test_a_stale_mutant_is_an_error() -> None:
    for stale in ("no such text", "\n"):
        with pytest.raises(ValueError, match="stale"):
            Mutant("state.py", stale, "", "stale").source()
    with pytest.raises(ValueError, match="changes nothing"):
        Mutant("state.py", "seen: int = 0", "seen:  int = 0", "a space").source()


def test_a_sample_is_killed(record_property: Callable[[str, Any], None]) -> None:
    run = python("-m", "mutants", "--sample", str(SAMPLE), "--seed", str(SEED), "--without-true-code")
    print(run.stdout)
    assert run.returncode == 0, f"--sample {SAMPLE} --seed {SEED}\n{run.stdout}{run.stderr}"
    record_property("cases", SAMPLE)


def test_a_survivor_is_noticed_and_an_explanation_does_not_make_it_a_kill() -> None:
    for explained, words in (("", "SURVIVES"), (', survives="equal"', "1 survivors explained")):
        run = python("-c", HARMLESS.format(explained=explained))
        assert run.returncode == 1, run.stdout + run.stderr
        assert words in run.stdout
        assert "cases hold" in run.stdout, "the true code was not tried"
