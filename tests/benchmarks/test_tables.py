"""Tables and the page: a miss is shown as a miss, and what has no number says why."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page, plan
from benchmarks.harness import tables as shown
from efficient_attn.benchmarking import tables as printing
from efficient_attn.benchmarking.cells import CAPACITY, DECODE, FORWARD, MEMORY, Cell, Target
from efficient_attn.benchmarking.records import Record, Records, key_of

ENVIRONMENT = {
    "cpu": "A Certain CPU",
    "cores": 2,
    "flags": ["avx512_bf16"],
    "system": "Linux x86_64",
    "python": "3.11.2",
    "libraries": {"torch": "2.13.0"},
    "commit": "0123456789abcdef",
    "dirty": True,
    "date": "2026-01-02T03:04:05+00:00",
    "load": [0.5, 0.4, 0.3],
}
WINDOW = Cell("window", "window 256, causal", FORWARD, 16_384, "masked SDPA", target=Target(28))


def record(cell: Cell, result: dict[str, Any], status: str = "ok", reason: str = "") -> Record:
    return {
        "key": key_of(cell, {}),
        "cell": cell.identity,
        "target": None,
        "environment": ENVIRONMENT,
        "status": status,
        "reason": reason,
        "result": result,
    }


def race(cell: Cell, median: float, low: float, high: float, wrong: tuple[str, ...] = ()) -> Record:
    result = {
        "ratio": {"median": median, "low": low, "high": high},
        "wrong": list(wrong),
        "ours": {"what": "W", "backend": "b", "errors": {"output": 1e-7}, "seconds": [0.1, 0.1, 0.1]},
        "peer": {
            "what": cell.peer,
            "remark": "",
            "errors": {"output": None if wrong else 2e-7},
            "seconds": [0.1 * median] * 3,
        },
    }
    return record(cell, result, "wrong" if wrong else "ok", "; ".join(f"{name} is wrong" for name in wrong))


RECORDS = [
    race(WINDOW, 30.0, 29.0, 31.0),
    race(replace(WINDOW, threads=2), 27.0, 26.5, 27.5),
    race(replace(WINDOW, peer="flex"), 1.7, 1.6, 1.9),
    race(replace(WINDOW, length=4096), 9.5, 9.4, 9.6),
    race(
        Cell("performer", "performer 256", FORWARD, 4096, "performer-pytorch"),
        2.0,
        1.9,
        2.1,
        ("performer-pytorch",),
    ),
    record(
        Cell("linear", "linear, causal", FORWARD, 16_384, "fast-transformers"),
        {},
        "unsupported",
        "is not installed",
    ),
    record(Cell("linear", "linear, causal", FORWARD, 16_384, "cumsum"), {}, "oom", "MemoryError"),
    *(
        record(
            Cell("memory", subject, MEMORY, n, heads=4),
            {
                "allocated_bytes": factor * n**power,
                "resident_bytes": factor * n**power * 2,
                "inputs_bytes": n,
            },
        )
        for subject, factor, power in (("linear, causal", 4096, 1), ("longformer 256 + 64", 1, 2))
        for n in (4096, 8192, 16_384)
    ),
    record(
        Cell("capacity", "linear, causal", CAPACITY, 262_144, heads=4),
        {"resident_bytes": 3 << 30, "inputs_bytes": 1 << 20, "seconds": 12.3, "error": 1e-7},
    ),
    record(
        Cell("capacity", "linformer 256", CAPACITY, 262_144, heads=4), {}, "timeout", "not done after 900 s"
    ),
    record(
        Cell("decode", "linear, causal", DECODE, 1000, positions=(100, 1000)),
        {
            "positions": {
                "100": {"seconds": [1e-4] * 3, "ratio": {"median": 1.0}},
                "1000": {"seconds": [1.1e-4] * 3, "ratio": {"median": 1.1}},
            }
        },
    ),
]


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (30, 29, 31, "met"),
        (29, 27, 31, "met ~"),
        (27, 26, 27.5, "MISSED"),
        (27, 26, 29, "MISSED ~"),
        (28, 28.0, 28.0, "met ~"),
    ],
)
def test_a_verdict_says_whether_the_spread_holds_the_target(
    value: float, low: float, high: float, said: str
) -> None:
    assert shown.verdict(value, Target(28), low, high) == said
    assert shown.verdict(value, None, low, high) == ""


def test_at_most_and_at_least_are_told_apart() -> None:
    assert Target(2).met(2)
    assert Target(2).met(3)
    assert not Target(2).met(1.9)
    assert Target(1.1, at_least=False).met(1.0)
    assert not Target(1.1, at_least=False).met(1.2)
    assert (str(Target(28)), str(Target(1.1, at_least=False))) == ("≥ 28", "≤ 1.1")


def table(name: str) -> shown.Table:
    made = shown.tables(RECORDS, plan.targets("full"))
    assert [t.title for t in made] == ["window", "performer", "linear", "memory", "capacity", "decode"]
    return next(t for t in made if t.title == name)


def test_a_race_shows_ratio_spread_target_and_verdict() -> None:
    rows = table("window").rows
    assert rows[0][-8:] == ["100", "3,000", "30x", "±1", "≥ 28", "met", "1e-07", "2e-07"]
    assert rows[1][-4:-2] == ["≥ 28", "MISSED"]
    assert rows[2][-4:-2] == ["≥ 1.8", "MISSED ~"]
    assert rows[3][-4:-2] == ["", ""]


def test_a_wrong_peer_and_a_missing_one_are_shown_as_such() -> None:
    assert table("performer").rows[0][-1] == "not finite WRONG"
    linear = table("linear")
    assert [row[7] for row in linear.rows] == ["unsupported", "oom"]
    assert "fast-transformers: is not installed" in linear.note
    assert "cumsum: MemoryError" in linear.note


def test_growth_is_the_exponent_and_is_held_against_its_target() -> None:
    assert shown.growth({1: 5, 2: 10, 4: 20}) == pytest.approx(1)
    assert shown.growth({10: 7, 20: 28}) == pytest.approx(2)
    assert shown.growth({10: 7}) is None
    assert shown.growth({}) is None
    rows = table("memory").rows
    assert rows[0] == ["linear, causal", "allocated", "16", "32", "64", "1.00", "≤ 1.1", "met"]
    assert rows[1] == ["", "resident", "32", "64", "128", "1.00", "", ""]
    assert rows[2][-3:] == ["2.00", "≤ 1.1", "MISSED"]


def test_capacity_and_decode_show_what_was_found() -> None:
    assert table("capacity").rows[0] == [
        *("linear, causal", "forward+backward", "262,144", "ok", "12.3", "1", "3,072", "1e-07"),
    ]
    assert table("capacity").rows[1][3:5] == ["timeout", "not done after 900 s"]
    assert table("decode").rows[0] == ["linear, causal", "ok", "1", "100 ±0", "1.00x", "110 ±0", "1.10x"]


@pytest.mark.parametrize("rich", [True, False])
def test_tables_are_printed_with_rich_and_without(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(printing, "rich_on", lambda stream: rich)
    monkeypatch.setenv("COLUMNS", "200")
    printing.show(shown.tables(RECORDS, plan.targets("full")))
    printed = capsys.readouterr().out
    for text in ("MISSED", "met", "30x", "≥ 28", "oom", "not finite WRONG", "110 ±0"):
        assert text in printed
    if not rich:
        lines = [line for line in printed.splitlines() if "masked SDPA" in line]
        assert len({line.index("masked SDPA") for line in lines}) == 1, "columns are aligned"
    assert ("───" in printed) == rich


def write(path: Path, records: list[Record]) -> Path:
    for each in records:
        Records(path).append(each)
    return path


def test_the_page_has_every_table_the_environment_the_targets_and_pictures(tmp_path: Path) -> None:
    older = race(WINDOW, 5.0, 5.0, 5.0)
    quick = race(replace(WINDOW, effort="quick"), 99.0, 99.0, 99.0)
    gone = race(Cell("window", "a mechanism of yesterday", FORWARD, 16_384, "flex"), 3.0, 3.0, 3.0)
    records = write(tmp_path / "cpu.jsonl", [older, *RECORDS, quick, gone])
    with open(records, "a") as file:
        file.write("{damaged\n")
    assert page.main(["--records", str(records), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "2 met, 2 missed, 2 not measured." in text
    assert "A Certain CPU, 2 cores (avx512_bf16)" in text
    assert "commit 0123456789ab, with uncommitted changes" in text
    assert "AMX no, AVX512 yes" in text
    assert "| 30x |" in text
    assert "| 5x |" not in text, "the newest record counts"
    assert "99" not in text.partition("## window")[2], "quick runs are left out"
    assert "a mechanism of yesterday" in text
    assert "**MISSED**" in text
    assert f"line {len(RECORDS) + 4}: not JSON" in text
    for picture in ("ratios.png", "memory.png"):
        assert f"](results/{picture})" in text
        assert (tmp_path / "results" / picture).read_bytes().startswith(b"\x89PNG")


def test_the_page_counts_targets() -> None:
    said = page.targets_met(RECORDS, plan.target_of)
    assert said.startswith("2 met, 2 missed, 2 not measured.")
    assert (
        "- window: window 256, causal forward at 16,384 vs masked SDPA, 2 threads: 27x, target ≥ 28" in said
    )


def test_the_page_does_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert page.main(["--records", str(write(tmp_path / "a.jsonl", RECORDS)), "--out", str(tmp_path)]) == 0
    assert ".png" not in (tmp_path / "README.md").read_text()


def test_a_page_of_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = race(replace(WINDOW, effort="quick"), 99.0, 99.0, 99.0)
    records = write(tmp_path / "cpu.jsonl", [quick])
    assert page.main(["--records", str(records), "--out", str(tmp_path)]) == 1
    assert "no records of a full run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        page.main(["--records", str(tmp_path / "none.jsonl")])
    assert stopped.value.code == 2
    assert "no such file" in capsys.readouterr().err
