"""The command: it runs, resumes, survives Ctrl-C, and says clearly what is wrong with its arguments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cpu, plan
from benchmarks.harness import command
from efficient_attn.benchmarking import environment, run
from efficient_attn.benchmarking.cells import FORWARD, MEMORY, Cell, Target
from efficient_attn.benchmarking.environment import ROOT, fingerprint, usable_cores
from efficient_attn.benchmarking.records import Records, key_of
from efficient_attn.benchmarking.worker import Outcome
from tests.benchmarks.measurers import behave

TINY = (
    Cell("tiny", "window 256, causal", FORWARD, 64, "masked SDPA", heads=1, target=Target(1000)),
    Cell("tiny", "linear, causal", FORWARD, 64, "chunks", heads=1),
)
SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "cpu.py")]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SECTIONS", {"tiny": lambda at: iter(TINY)})
    monkeypatch.setattr(
        environment, "sources_digest", lambda origin: "of sources that nobody edits meanwhile"
    )
    monkeypatch.setattr(plan, "target_of", {cell: cell.target for cell in TINY}.get)


@pytest.mark.usefixtures("tiny")
def test_two_tiny_cells_are_measured_recorded_and_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "cpu.jsonl"
    arguments = ["--threads", "1", "--out", str(out)]
    assert cpu.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "[1/2, " in printed
    assert "target ≥ 1e+03: MISSED" in printed
    records, complaints = Records(out).read()
    assert complaints == []
    assert [r["status"] for r in records] == ["ok", "ok"]
    for record in records:
        assert record["environment"]["cpu"]
        assert len(record["environment"]["load"]) == 3
    assert records[0]["target"] == "≥ 1e+03"

    def nothing(self: object, cell: Cell) -> Outcome:
        raise AssertionError(f"{cell.label} was measured again")

    monkeypatch.setattr(run.Worker, "run", nothing)
    with open(out, "a") as file:
        file.write("damage\n")
    assert cpu.main(arguments) == 0
    again = capsys.readouterr()
    assert again.out.count("(recorded 20") == 2
    assert "line 3: not JSON; skipped" in again.err
    with pytest.raises(AssertionError, match="was measured again"):
        cpu.main([*arguments, "--again"])


@pytest.mark.usefixtures("tiny")
def test_the_list_says_what_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cpu.jsonl"
    assert cpu.main(["--list", "--threads", "1", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("to measure") == 2
    assert not out.exists()


def measured(tmp_path: Path, *behaviours: str, again: bool = False) -> list[tuple[str, str, bool]]:
    """What is reported of these cells, with the stand-in that does as it is told."""
    seen: list[tuple[str, str, bool]] = []
    run.measure_all(
        [Cell("run", behaviour, FORWARD, 16) for behaviour in behaviours],
        Records(tmp_path / "run.jsonl"),
        behave,
        timeout=30,
        again=again,
        report=lambda cell, record, fresh: seen.append((cell.subject, record["status"], fresh)),
        complain=lambda text: pytest.fail(text),
    )
    return seen


def test_a_failed_cell_is_recorded_and_the_run_goes_on(tmp_path: Path) -> None:
    behaviours = ("unsupported", "raises", "killed", "fine")
    statuses = ("unsupported", "error", "oom", "ok")
    first = measured(tmp_path, *behaviours)
    assert first == [(b, s, True) for b, s in zip(behaviours, statuses, strict=True)]
    second = measured(tmp_path, *behaviours)
    assert [fresh for _, _, fresh in second] == [False, True, False, False], "only an error is tried again"
    assert all(fresh for _, _, fresh in measured(tmp_path, *behaviours, again=True))
    assert len(Records(tmp_path / "run.jsonl").read()[0]) == 4 + 1 + 4


def test_ctrl_c_loses_no_finished_cell(tmp_path: Path) -> None:
    out = tmp_path / "cpu.jsonl"
    arguments = ["--quick", "--only", "full", "linear", "--threads", "1", "--out", str(out)]
    process = subprocess.Popen(
        [*SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What runs in the background of a shell is told to ignore Ctrl-C, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[2/"):
            break
    os.killpg(process.pid, signal.SIGINT)  # to every process, as a terminal does
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    records, complaints = Records(out).read()
    assert complaints == []
    assert len(records) >= 2
    known = {json.dumps(r["cell"], sort_keys=True) for r in records}
    assert len(known) == len(records)

    for record in records:
        cell = Cell.from_identity(record["cell"])
        assert record["key"] == key_of(cell, fingerprint(record["environment"])), "it will be found again"


def test_a_line_says_what_was_measured() -> None:
    cell = Cell("memory", "linear, causal", MEMORY, 64)
    record = {
        "status": "ok",
        "reason": "",
        "result": {"resident_bytes": 5 << 20},
        "environment": {"date": "2026"},
    }
    assert command.line(cell, record, True) == "peak 5 MiB beyond the inputs"
    failed = record | {"status": "oom", "reason": "MemoryError"}
    assert command.line(cell, failed, False) == "oom: MemoryError (recorded 2026)"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "windows"], "--only windows: the sections are full, every, window"),
        (["--only"], "expected at least one argument"),
        (["--threads", "0"], "must be at least 1, got 0"),
        (["--threads", "two"], "must be a whole number, got 'two'"),
        (["--threads", "4096"], f"this process may use {usable_cores()} cores"),
        (["--timeout", "-1"], "must be at least 1, got -1"),
        (["--out", "."], "is a directory"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_bad_argument_is_refused_by_name(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cpu.main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sections"),
    [
        ([], list(plan.SECTIONS)),
        (["--memory"], ["memory"]),
        (["--decode", "--capacity"], ["capacity", "decode"]),
        (["--only", "linear", "window", "--decode"], ["window", "linear", "decode"]),
    ],
)
def test_sections_are_chosen_and_keep_their_order(arguments: list[str], sections: list[str]) -> None:
    assert cpu._options(arguments).sections == sections


def test_a_quick_run_keeps_its_records_apart() -> None:
    assert cpu._options(["--quick"]).out.name == "cpu-quick.jsonl"
    assert cpu._options([]).out.name == "cpu.jsonl"
