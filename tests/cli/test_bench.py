"""`bench`: every cell is checked and recorded, whatever becomes of it, and nothing that is done is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import MECHANISMS, LinearAttention, SlidingWindowAttention
from efficient_attn.benchmarking import alone, environment
from efficient_attn.benchmarking.alone import judged, measure_alone
from efficient_attn.benchmarking.cells import DECODE, FORWARD, TRAINING, Cell
from efficient_attn.benchmarking.records import (
    ERROR,
    OK,
    OOM,
    TIMEOUT,
    UNSTABLE,
    UNSUPPORTED,
    WRONG,
    Records,
    key_of,
)
from efficient_attn.benchmarking.worker import Outcome, Unsupported, Worker
from efficient_attn.cli import bench, measuring
from efficient_attn.cli.measuring import cells_of, measure, mechanism_of
from efficient_attn.cli.progress import Remaining, rough
from efficient_attn.planning import MechanismSpec
from tests.benchmarks.measurers import behave
from tests.cli.running import ran, refused

ROOT = Path(__file__).parent.parent.parent
SMALL = ("--heads", "1", "--head-dim", "8", "--threads", "1", "--quick")
CELL = Cell("bench", "full", FORWARD, 32, heads=1, head_dim=8, effort="dry")

STILL = """\
import sys

from efficient_attn.benchmarking import environment
from efficient_attn.cli.main import main

environment.sources_digest = lambda origin: "still"
if __name__ == "__main__":
    sys.exit(main({arguments!r}))
"""
"""The command, as if nobody edited a source meanwhile."""


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources that nobody edits while a test runs."""
    monkeypatch.setattr(environment, "sources_digest", lambda origin: "still")


def told(monkeypatch: pytest.MonkeyPatch, *behaviours: str) -> None:
    """Cells that behave as they are called, measured by the stand-in."""
    cells = [replace(CELL, subject=behaviour) for behaviour in behaviours]
    monkeypatch.setattr(bench, "planned", lambda options: cells)
    monkeypatch.setattr(bench, "measure", behave)
    monkeypatch.setattr(bench, "flops_of", lambda cell: 1)


@pytest.mark.usefixtures("still")
def test_cells_are_measured_checked_recorded_and_not_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench.jsonl"
    arguments = ("bench", "linear", "full", "--length", "32", *SMALL, "--out", out)
    first = ran(*arguments, "--json")
    assert first.code == 0, first.err
    records = first.json["records"]
    assert [(r["cell"]["subject"], r["cell"]["work"]) for r in records] == [
        (subject, work) for subject in ("linear", "full") for work in (FORWARD, TRAINING)
    ], "a mechanism at a time"
    for record in records:
        assert record["status"] in (OK, UNSTABLE), record
        assert max(record["result"]["errors"].values()) < 1e-5
        assert all(s > 0 for s in record["result"]["seconds"])
        assert record["environment"]["cpu"]
        assert record["result"]["peak_bytes"] > 0
    assert "[4/4, " in first.err
    assert " left] " in first.err, "how long it will still take"

    listed = ran(*arguments, "--list", "--json").json["cells"]
    assert [cell["recorded"] for cell in listed] == [True] * 4
    before = out.read_bytes()
    again = ran(*arguments)
    assert again.err.count("(recorded)") == 4
    assert out.read_bytes() == before
    assert "linear" in again.out and str(out) in again.out


@pytest.mark.usefixtures("still")
def test_whatever_becomes_of_a_cell_is_a_record_and_the_next_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bench.jsonl"
    told(monkeypatch, "unsupported", "killed", "raises")
    found = ran("bench", "--out", out, "--json")
    assert [record["status"] for record in found.json["records"]] == [UNSUPPORTED, OOM, ERROR]
    assert found.code == 1, "an error is no success"
    told(monkeypatch, "hangs")
    (hung,) = ran("bench", "--out", out, "--timeout", "1", "--json").json["records"]
    assert hung["status"] == TIMEOUT
    told(monkeypatch, "unsupported", "killed", "raises")
    monkeypatch.setattr(Worker, "run", lambda self, cell: Outcome(UNSUPPORTED, "again"))
    assert ran("bench", "--out", out).err.count("(recorded)") == 2, "only the error is measured again"
    assert ran("bench", "--out", out, "--again", "oom").err.count("(recorded)") == 2
    assert ran("bench", "--out", out, "--again").err.count("(recorded)") == 0


def test_each_mechanism_has_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, "one", "two")
    cells = [replace(CELL, subject=name, length=n) for name in ("one", "two") for n in (32, 64)]
    monkeypatch.setattr(bench, "planned", lambda options: cells)
    monkeypatch.setattr(bench, "said_of", lambda record: "")
    monkeypatch.setattr(bench, "_numbers", lambda record, full: [""] * 5)
    found = ran("bench", "--out", tmp_path / "bench.jsonl", "--json").json["records"]
    processes = [record["result"]["pid"] for record in found]
    assert processes[0] == processes[1] != processes[2] == processes[3]
    assert os.getpid() not in processes


class Wrong(LinearAttention):
    """Off by a hundredth, but only where nobody looks at a single row."""

    def forward(self, *args: Any, **masks: Any) -> Tensor:
        return super().forward(*args, **masks) * 1.01


class LosesItsGradient(SlidingWindowAttention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
        return super().forward(q, k.detach() + 0 * k, v, **masks)


@pytest.mark.parametrize(
    ("mechanism", "work", "off"),
    [(Wrong(), FORWARD, "output"), (LosesItsGradient(8), TRAINING, "gradient")],
)
def test_what_is_wrong_is_not_timed(
    mechanism: Any, work: str, off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "times_of", lambda *works: pytest.fail("timed"))
    outcome = measure_alone(replace(CELL, work=work, length=300, heads=2), mechanism)
    assert outcome.status == WRONG
    assert f"{off} off by" in outcome.reason
    assert "seconds" not in outcome.result


def test_a_long_sequence_is_checked_on_a_part_that_can_be_afforded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "LARGEST_COPY", 1)
    for work in (FORWARD, TRAINING):
        cell = replace(CELL, work=work, length=200, heads=3, batch=2)
        assert measure_alone(cell, SlidingWindowAttention(16)).status in (OK, UNSTABLE)
        assert measure_alone(cell, Wrong()).status == WRONG


def test_samples_that_lie_far_apart_are_unstable() -> None:
    assert judged({}, [1.0, 1.0, 1.1, 1.0]).status == OK
    outcome = judged({}, [1.0, 1.0, 3.0, 3.0])
    assert outcome.status == UNSTABLE
    assert "span 100% of the median" in outcome.reason


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("work", [FORWARD, TRAINING])
def test_every_mechanism_can_be_measured(name: str, work: str) -> None:
    outcome = measure(replace(CELL, subject=name, work=work, length=100, heads=2))
    assert outcome.status in (OK, UNSTABLE), outcome
    assert outcome.result["declared"]["flops"] > 0


def test_a_mistake_of_ours_is_an_error_and_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(cell: Cell, mechanism: Any) -> Outcome:
        raise NotImplementedError("Cannot copy out of meta tensor")

    monkeypatch.setattr(measuring, "measure_alone", mistaken)
    with pytest.raises(NotImplementedError):
        measure(CELL)


def test_what_a_mechanism_refuses_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="causal"):
        measure(replace(CELL, subject="linformer causal"))


def test_the_name_of_a_subject_says_how_to_build_it() -> None:
    spec = MechanismSpec("sliding_window", {"window_size": 16})
    sizes: dict[str, Any] = {"heads": 2, "head_dim": 8}
    cells = cells_of([spec], [FORWARD, DECODE], [32], False, **sizes)
    assert [cell.subject for cell in cells] == [
        "sliding_window:window_size=16",
        "sliding_window:window_size=16 causal",
    ]
    built = [mechanism_of(cell) for cell in cells]
    assert [str(each) for each in built] == [
        str(SlidingWindowAttention(16, is_causal=c)) for c in (False, True)
    ]
    assert cells[1].positions == (32,)


def test_decoding_is_recorded_as_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(cell: Cell, mechanism: Any) -> Outcome:
        return Outcome(
            WRONG, "ours is wrong", {"what": "", "errors": {"at 32": float("nan")}, "positions": {}}
        )

    cell = replace(CELL, subject="linear causal", work=DECODE, positions=(32,))
    found = measure(cell).result
    assert found["state_bytes"] == LinearAttention(is_causal=True).init_state(1, 1, 8).nbytes
    assert len(found["seconds"]) >= 3
    monkeypatch.setattr(measuring, "measure_decode", nan)
    outcome = measure(cell)
    assert (outcome.status, outcome.result["errors"]) == (WRONG, {"at 32": None}), "JSON has no NaN"


def test_kill_9_in_the_middle_loses_no_finished_cell(tmp_path: Path) -> None:
    out = tmp_path / "bench.jsonl"
    arguments = [
        "bench",
        "linear",
        "--length",
        "16,24,32,48",
        "--work",
        "forward",
        *SMALL,
        "--out",
        str(out),
    ]
    script = tmp_path / "command.py"
    script.write_text(STILL.format(arguments=arguments))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    finished = []
    for line in process.stderr:
        finished.append(line)
        if line.startswith("[2/"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    kept, complaints = Records(out).read()
    assert len(kept) >= len(finished) == 2
    with open(out, "ab") as file:
        file.write(b'{"key": "a line that the kill cut sh')

    run = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("(recorded)") >= 2
    assert "not JSON; skipped" in run.stderr, "the torn line is reported"
    records, complaints = Records(out).read()
    assert records[: len(kept)] == kept
    assert len({record["key"] for record in records}) == len(records) == 4, "nothing was measured twice"
    assert len(complaints) == 1


@pytest.mark.usefixtures("still")
def test_ctrl_c_prints_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, "unsupported", "one")

    def interrupted(cell: Cell) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_all", _after_one(bench.measure_all, interrupted))
    found = ran("bench", "--out", tmp_path / "bench.jsonl")
    assert found.code == 130
    assert "stopped after 1 of 2 cells; the same command continues" in found.err
    assert "unsupported" in found.out


def _after_one(measure_all: Callable[..., Any], stop: Callable[[Cell], Any]) -> Callable[..., Any]:
    def until(cells: list[Cell], records: Records, measure: Any, **options: Any) -> Any:
        measure_all(cells[:1], records, measure, **options)
        stop(cells[1])

    return until


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_file_that_holds_no_records_is_refused_and_left_alone(tmp_path: Path) -> None:
    for content in (b"name,seconds\nfull,1\n", b"\x00\xff\x00\n\x01", b'{"a": 1}\n{"b": 2}\n'):
        path = _written(tmp_path / "other.csv", content)
        refused("holds no records, and is left as it is", "bench", "full", "--out", path)
        assert path.read_bytes() == content
    torn = _written(tmp_path / "torn.jsonl", b'{"key": "the very first li')
    assert bench.opened(torn).read()[1], "a first line that was cut short is no other file"


@pytest.mark.parametrize(
    ("complaint", "arguments"),
    [
        ("unknown mechanism 'nystrom'", ["nystrom"]),
        ("at least 1, got 0", ["full", "--length", "0"]),
        ("window_size must be", ["sliding_window:window_size=-1", "--length", "16", "--list"]),
        ("cannot write", ["full", "--out", "/dev/null/bench.jsonl"]),
        ("is a directory", ["full", "--out", "/tmp"]),
        ("this process may use", ["full", "--threads", "4096"]),
        ("as many key and value heads", ["full", "--kv-heads", "2"]),
        ("invalid choice: 'sideways'", ["full", "--work", "sideways"]),
        ("invalid choice: 'fine'", ["full", "--again", "fine"]),
    ],
)
def test_bad_arguments_are_refused(complaint: str, arguments: list[str]) -> None:
    refused(complaint, "bench", *arguments)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="only where there is no GPU is asking for one a mistake"
)
def test_a_gpu_that_is_not_there_is_refused() -> None:
    refused("torch finds no CUDA device here", "bench", "full", "--device", "cuda")


def test_the_time_that_is_left_grows_with_the_flops_of_what_is_left() -> None:
    cells = [replace(CELL, length=n) for n in (32, 64, 128)]
    remaining = Remaining(cells, lambda cell: cell.length**2, most=100.0)
    assert remaining.seconds is None, "nothing is known yet"
    remaining.finished(cells[0], 2.0)
    assert remaining.seconds == 2.0 * 4 + 2.0 * 16
    remaining.finished(cells[1], 50.0)
    assert remaining.seconds == 100.0, "no cell takes longer than the timeout"
    remaining.finished(cells[2], None)
    assert remaining.seconds == 0
    assert (rough(14.2), rough(130), rough(9000)) == ("14 s", "2 min", "2.5 h")


def test_the_key_is_that_of_the_benchmarks() -> None:
    """One way to record: what `bench` writes is what Records reads, under the same key."""
    described = environment.environment()
    later = described | {"load": [9]}
    assert key_of(CELL, environment.fingerprint(described)) == key_of(CELL, environment.fingerprint(later))
    sources = environment.Origin(("efficient_attn",), without=()), environment.PACKAGE
    assert len({environment.sources_digest(origin) for origin in sources}) == 2
