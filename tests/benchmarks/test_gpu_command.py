"""benchmarks/gpu.py: without a GPU it runs dry, whole and in less than a minute; with one it would do the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, page, plan_gpu
from benchmarks.harness.gpu_tables import gpu_tables
from efficient_attn.benchmarking import environment, run
from efficient_attn.benchmarking.cells import BACKWARD, CAPACITY, FORWARD, TABLES, TRAINING, TUNE, Cell
from efficient_attn.benchmarking.environment import ROOT
from efficient_attn.benchmarking.records import Record, Records, key_of
from efficient_attn.benchmarking.worker import Worker
from tests.benchmarks.measurers import behave
from tests.benchmarks.test_tables import ENVIRONMENT

SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_dry_run_goes_from_end_to_end_in_less_than_a_minute(tmp_path: Path) -> None:
    out = tmp_path / "dry.jsonl"
    command = [*SCRIPT, "--out", str(out)]
    command += ["--dry-run"] if torch.cuda.is_available() else []
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert "judges nothing" in done.stdout
    records, complaints = Records(out).read()
    assert complaints == []
    cells = plan_gpu.cells(plan_gpu.SECTIONS, "dry")
    assert [Cell.from_identity(record["cell"]) for record in records] == cells
    failed = [f"{r['cell']['subject']}: {r['reason']}" for r in records if r["status"] == "error"]
    assert failed == []
    wrong = {r["cell"]["peer"] for r in records if r["status"] == "wrong"}
    assert wrong <= {"performer-pytorch"}, "its features are not those of the paper"
    assert len([r for r in records if r["status"] == "ok"]) >= 30
    for section in plan_gpu.SECTIONS:
        assert f"\n{section}" in done.stdout
    for missing in ("has kernels for GPUs, not for cpu", "has no backward pass on a CPU"):
        assert missing in done.stdout
    assert took < 60 or os.getloadavg()[0] > 2, f"{took:.0f} s"


def test_when_the_time_is_up_the_rest_is_left_for_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    left = run.measure_all(
        [Cell("run", "fine", FORWARD, n) for n in (1, 2, 3)],
        Records(tmp_path / "run.jsonl"),
        behave,
        timeout=30,
        again=False,
        report=lambda cell, record, fresh: seen.append(cell.label),
        complain=lambda text: pytest.fail(text),
        seconds=1e-9,
    )
    assert seen == []
    assert [cell.length for cell in left] == [1, 2, 3]


@pytest.mark.parametrize("behaviour", ["allocates", "raises"])
def test_after_a_failure_on_a_gpu_the_next_cell_gets_a_fresh_process(behaviour: str) -> None:
    def cell(subject: str, device: str = "cuda") -> Cell:
        return Cell("worker", subject, FORWARD, 16, device=device)

    with Worker(behave, timeout=30) as worker:
        first = worker.run(cell("fine")).result["pid"]
        assert worker.run(cell("fine")).result["pid"] == first
        assert worker.run(cell("unsupported")).status == "unsupported"
        assert worker.run(cell("fine")).result["pid"] == first
        worker.run(cell(behaviour))
        second = worker.run(cell("fine")).result["pid"]
        assert second != first
        assert worker.run(cell("spent")).status == "ok"
        assert worker.run(cell("fine")).result["pid"] not in (first, second)
        assert worker.run(cell("limit")).result["limit"] is None, "CUDA needs more addresses than memory"
        assert worker.run(cell("limit", "cpu")).result["limit"] is not None or sys.platform != "linux"


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_records_are_kept_apart(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--quick"], ["--dry-run"]):
        options = gpu._options(arguments)
        assert (options.effort, options.out.name) == ("dry", "gpu-dry.jsonl")
    assert gpu._options(["--tune"]).out.name == "tune-dry.jsonl"
    with pytest.raises(SystemExit):
        gpu._options(["--judged"])
    assert "a dry run has no targets" in capsys.readouterr().err


def test_with_a_gpu_the_plan_is_the_full_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu._options([]).out.name == "gpu.jsonl"
    assert gpu._options(["--quick"]).out.name == "gpu-quick.jsonl"
    assert gpu._options(["--dry-run"]).effort == "dry"
    assert gpu._options(["--only", "linear", "full"]).sections == ["full", "linear"]
    with pytest.raises(SystemExit):
        gpu._options(["--tune", "--judged"])
    assert "tuning has no targets" in capsys.readouterr().err

    described = {
        "name": "A Certain GPU",
        "memory_bytes": 141 << 30,
        "capability": "9.0",
        "cuda": "13",
        "cudnn": 9,
    }
    monkeypatch.setattr(environment, "gpu", lambda: described)
    monkeypatch.setattr(environment, "gpu_now", lambda: {"clocks.sm": "1980 MHz"})
    assert gpu.main(["--list", "--judged"]) == 0
    listed = capsys.readouterr().out.splitlines()
    planned = [c for c in plan_gpu.cells(plan_gpu.SECTIONS, "full") if c.target is not None]
    assert len(listed) == len(planned) > 40
    assert all("target" in line for line in listed)
    assert any("D128" in line and line.split(",")[-2].endswith("cuda") for line in listed)
    heading = gpu._heading(environment.environment("cuda"), "full")
    assert "A Certain GPU, 141 GiB, compute capability 9.0, CUDA 13, cuDNN 9" in heading
    assert "clocks.sm 1980 MHz" in heading


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "windows"], "--only windows: the sections are full, window_1024"),
        (["--minutes", "0"], "must be at least 1"),
        (["--quick", "--dry-run"], "not allowed with"),
        (["--out", "."], "is a directory"),
    ],
)
def test_a_bad_argument_is_refused_by_name(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


ON_GPU = ENVIRONMENT | {
    "gpu": {"name": "A Certain GPU", "memory_bytes": 141 << 30, "cuda": "13.0", "cudnn": 91300},
}


def planned(section: str, work: str, peer: str = "", length: int = 65_536, subject: str = "") -> Cell:
    wanted = section, work, peer, length, 64
    return next(
        cell
        for cell in [*plan_gpu.cells(plan_gpu.SECTIONS, "full"), *plan_gpu.tuning("full")]
        if (cell.section, cell.work, cell.peer, cell.length, cell.head_dim) == wanted
        and cell.subject == (subject or cell.subject)
    )


def record(cell: Cell, result: dict[str, Any], status: str = "ok", reason: str = "") -> Record:
    about = {"cell": cell.identity, "target": None, "environment": ON_GPU}
    return {"key": key_of(cell, {}), "status": status, "reason": reason, "result": result, **about}


def side(milliseconds: float, error: float = 2e-3) -> dict[str, Any]:
    about = {"what": "W", "backend": "triton", "remark": "", "peak_bytes": 3 << 20}
    return {**about, "errors": {"output": error}, "seconds": [milliseconds / 1e3] * 3}


ROOF = {
    "flops": 4e11,
    "bytes": 5e8,
    "floor_seconds": 5e-4,
    "fraction": 0.5,
    "flops_per_second": 8e14,
    "bytes_per_second": 4.3e12,
}


def race(cell: Cell, median: float, graph: float | None = None, wrong: tuple[str, ...] = ()) -> Record:
    result: dict[str, Any] = {"wrong": list(wrong), "ours": side(1.0), "roofline": ROOF}
    if cell.peer:
        result["peer"] = side(median)
        result["ratio"] = {"median": median, "low": median * 0.99, "high": median * 1.01}
    if graph is not None:
        result["graph"] = {"ratio": {"median": graph}, "seconds": {"ours": [4e-4]}}
    return record(cell, result, "wrong" if wrong else "ok")


SHORT, OTHER = "BLOCK_K=64 num_warps=4 num_stages=2", "BLOCK_K=64 num_warps=8 num_stages=2"
RECORDS = [
    race(planned("window_1024", FORWARD, "flex", 4096), 1.1, graph=1.6),
    race(planned("window_1024", FORWARD, "flex", 16_384), 1.2),
    race(planned("window_1024", FORWARD, "flex"), 1.5),
    race(planned("window_1024", BACKWARD, "flex"), 0.9),
    record(planned("window_1024", FORWARD, "xformers"), {}, "unsupported", "xformers is not installed"),
    record(planned("bigbird", BACKWARD, "flex"), {}, "oom", "flex: OutOfMemoryError: CUDA out of memory"),
    race(planned("linear", FORWARD, "fla raw"), 2.0, wrong=("ours",)),
    race(planned("alone", FORWARD, "", 4096, "linear, causal"), 0, graph=0),
    race(planned("alone", FORWARD, "", 16_384, "linear, causal"), 0),
    record(planned("alone", TRAINING, "", 262_144), {}, "oom", "ours: OutOfMemoryError"),
    record(
        planned("tables", TABLES),
        {"built_seconds": 0.001, "forward_seconds": 0.0005, "table_share": 2.0},
    ),
    record(
        planned("capacity", CAPACITY, "", 1_048_576),
        {
            "backend": "triton",
            "seconds": 0.1,
            "error": 1e-3,
            "peak_ratio": 1.25,
            "inputs_bytes": 6 << 30,
            "peak_bytes": 9 << 30,
        },
    ),
    record(
        planned("tune", TUNE, "chunked_linear.states"),
        {
            "shipped": SHORT,
            "best": OTHER,
            "configs": {SHORT: {}, OTHER: {}},
            "rejected": {"x": "spills"},
            "gain": {"median": 1.2, "low": 1.1, "high": 1.3},
        },
    ),
]


def test_tables_show_what_was_found_and_what_was_not() -> None:
    made = {table.title: table for table in gpu_tables(RECORDS, plan_gpu.targets("full"))}
    for table in made.values():
        assert {len(row) for row in table.rows} == {len(table.headings)}, table.title
    short, _, met, missed, unsupported = made["window_1024"].rows
    assert short[5:12] == ["1", "1.1", "1.1x", "±0.011", "1.6x", "", ""]
    assert met[5:] == ["1", "1.5", "1.5x", "±0.015", "", "≥ 1.25", "met", "50%", "3", "3", "2e-03", "2e-03"]
    assert missed[10:12] == ["≥ 1.2", "MISSED"]
    assert unsupported[7] == "unsupported"
    assert "xformers is not installed" in made["window_1024"].note
    assert made["bigbird"].rows[0][7] == "oom"
    assert made["bigbird"].note == "flex: OutOfMemoryError: CUDA out of memory"
    assert made["linear"].rows[0][-2] == "2e-03 WRONG"
    alone = made["alone"].rows
    assert alone[0][4:] == ["triton", "1", "0.4", "400", "50%", "3", "2e-03"]
    assert alone[2][4:6] == ["oom", "ours: OutOfMemoryError"]
    assert "800 to 800 TFLOP/s; copy: 4.3 to 4.3 TB/s" in made["alone"].note
    assert made["tables"].rows[0][3:] == ["1", "0.5", "2", "≤ 0.05", "MISSED"]
    assert made["capacity"].rows[0][-4:] == ["1.25x", "≤ 1.3", "met", "1e-03"]
    tuned = made["tune"].rows[0]
    assert tuned[3:8] == [SHORT, f"change to {OTHER}: 1.2x as fast", "1.2x", "±0.1", "2 + 1"]
    assert tuned[8] == RECORDS[-1]["key"], "the record that a committed config names"


def test_the_page_has_a_part_about_the_gpu(tmp_path: Path) -> None:
    records, tune = Records(tmp_path / "gpu.jsonl"), Records(tmp_path / "tune.jsonl")
    records.append(race(planned("window_1024", FORWARD, "flex"), 99.0))
    for each in RECORDS[:-1]:
        records.append(each)
    tune.append(RECORDS[-1])
    records.append(race(replace(planned("window_1024", FORWARD, "flex"), effort="quick"), 77.0))
    with open(records.path, "a") as file:
        file.write("{damaged\n")
    arguments = ["--out", str(tmp_path), "--gpu-records", str(records.path), str(tune.path)]
    assert page.main(arguments) == 0
    text = (tmp_path / "README.md").read_text()
    cpu, _, on_gpu = text.partition("# On a GPU\n")
    assert "## window\n" in cpu
    assert "A Certain GPU, 141 GiB, CUDA 13.0, cuDNN 91300" in on_gpu
    assert "2 met, 2 missed, 1 not measured." not in cpu
    assert "3 met, 2 missed, 1 not measured." in on_gpu
    assert "- window_1024: window 1024, causal bfloat16 backward at 65,536 vs flex, cuda: 0.9x" in on_gpu
    assert "99" not in on_gpu.partition("## window_1024")[2].partition("## bigbird")[0], "the newest counts"
    assert "77x" not in on_gpu
    assert "not JSON" in on_gpu
    assert f"change to {OTHER}" in on_gpu
    for picture in ("gpu-forward.png", "gpu-roofline.png"):
        assert f"](results/{picture})" in on_gpu
        assert (tmp_path / "results" / picture).read_bytes().startswith(b"\x89PNG")
    assert "gpu-backward.png" not in on_gpu, "one length is no line"


def test_without_records_of_a_gpu_the_page_says_so(tmp_path: Path) -> None:
    assert page.main(["--out", str(tmp_path), "--gpu-records", str(tmp_path / "none.jsonl")]) == 0
    assert (
        "# On a GPU\n\nNot measured yet. `python benchmarks/gpu.py`" in (tmp_path / "README.md").read_text()
    )


def test_a_line_says_what_was_measured() -> None:
    from benchmarks.harness.command import line

    def said(number: int) -> str:
        found = RECORDS[number]
        cell = Cell.from_identity(found["cell"])
        return line(replace(cell, target=plan_gpu.target_of(cell)), found, True)

    assert said(2) == "1.5x, quartiles 1.48 to 1.52, target ≥ 1.25: met"
    assert said(4) == "unsupported: xformers is not installed"
    assert said(7) == "50% of the roofline"
    assert said(10) == "built once in 2 forward passes, target ≤ 0.05: MISSED ~".removesuffix(" ~")
    assert said(11) == "peak 1.25x the least, target ≤ 1.3: met"
    assert said(12) == f"change to {OTHER}: 1.2x as fast"
    json.dumps(RECORDS)
