"""Records: what was measured is found again, and what is damaged is named and left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from efficient_attn.benchmarking import environment
from efficient_attn.benchmarking.cells import FORWARD, Cell, Target
from efficient_attn.benchmarking.environment import Origin
from efficient_attn.benchmarking.records import Records, key_of

CELL = Cell("window", "window 256, causal", FORWARD, 1024, "masked SDPA", target=Target(28))


def record(number: float = 1.5, status: str = "ok") -> dict[str, Any]:
    return {
        "key": key_of(CELL, {"cpu": "x"}),
        "cell": CELL.identity,
        "target": "≥ 28",
        "environment": {"cpu": "x"},
        "status": status,
        "reason": "",
        "result": {"ratio": number},
    }


def test_records_come_back_in_order_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    records = Records(tmp_path / "new" / "cpu.jsonl")
    assert records.read() == ([], [])
    written = [records.append(record(number)) for number in (1.5, 2.5)]
    assert records.read() == (written, [])
    assert records.by_key()[0] == {written[1]["key"]: written[1]}
    assert len(records.path.read_text().splitlines()) == 2


def corrupt_digit(line: bytes) -> bytes:
    return line.replace(b"1.5", b"7.5")


def without(name: str) -> Callable[[bytes], bytes]:
    def damage(line: bytes) -> bytes:
        plain = json.loads(line)
        del plain[name]
        return json.dumps(plain).encode()

    return damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda line: line[: len(line) // 2],
    "a digit changed": corrupt_digit,
    "not text": lambda line: b"\xff\x00\xfe" + line,
    "another type": lambda line: b"[1, 2]",
    "a number": lambda line: b"12",
    "without a key": without("key"),
    "without a result": without("result"),
    "without a checksum": without("check"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_line_is_named_by_number_skipped_and_kept(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    records = Records(tmp_path / "cpu.jsonl")
    for number in (0.5, 1.5, 2.5):
        records.append(record(number))
    lines = records.path.read_bytes().split(b"\n")
    lines[1] = damage(lines[1])
    records.path.write_bytes(b"\n".join(lines))

    found, complaints = records.read()
    assert [r["result"]["ratio"] for r in found] == [0.5, 2.5]
    assert len(complaints) == 1
    assert "line 2: " in complaints[0]
    records.append(record(3.5))
    assert records.path.read_bytes().split(b"\n")[1] == lines[1], (
        "what is damaged stays, for whoever can mend it"
    )
    assert [r["result"]["ratio"] for r in records.read()[0]] == [0.5, 2.5, 3.5]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"status": "fine"}, "status must be one of"),
        ({"cell": {"section": "window"}}, "not one of this version"),
    ],
)
def test_a_record_that_was_never_one_of_ours_is_refused(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    records = Records(tmp_path / "cpu.jsonl")
    records.append(record() | change)
    found, complaints = records.read()
    assert found == []
    assert complaint in complaints[0]


def test_a_line_cut_short_by_a_crash_does_not_swallow_the_next_record(tmp_path: Path) -> None:
    records = Records(tmp_path / "cpu.jsonl")
    records.append(record(0.5))
    with open(records.path, "ab") as file:
        file.write(b'{"key": "abc", "ce')
    records.append(record(1.5))
    found, complaints = records.read()
    assert [r["result"]["ratio"] for r in found] == [0.5, 1.5]
    assert len(complaints) == 1


def test_numbers_that_are_none_are_refused_before_they_reach_the_file(tmp_path: Path) -> None:
    records = Records(tmp_path / "cpu.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        records.append(record(float("nan")))
    assert not records.path.exists() or records.read() == ([], [])


def test_the_key_changes_with_whatever_makes_it_another_number() -> None:
    key = key_of(CELL, {"cpu": "x"})
    assert key == key_of(Cell.from_identity(json.loads(json.dumps(CELL.identity))), {"cpu": "x"})
    assert key == key_of(replace(CELL, target=Target(1.0)), {"cpu": "x"}), "a target measures nothing"
    others = {
        "section": "every",
        "subject": "linear",
        "work": "forward+backward",
        "length": 2,
        "peer": "flex",
        "threads": 2,
        "effort": "quick",
        "dtype": "bfloat16",
        "batch": 2,
        "heads": 4,
        "head_dim": 32,
        "device": "cuda",
        "positions": (1,),
    }
    assert set(others) == set(CELL.identity)
    keys = {key_of(replace(CELL, **{name: value}), {"cpu": "x"}) for name, value in others.items()}
    assert len(keys | {key, key_of(CELL, {"cpu": "y"})}) == len(others) + 2


def test_the_environment_names_the_machine_and_only_what_lasts_is_its_fingerprint() -> None:
    described = environment.environment()
    for name in (
        "cpu",
        "cores",
        "usable_cores",
        "flags",
        "libraries",
        "commit",
        "dirty",
        "date",
        "load",
        "sources",
    ):
        assert name in described
    assert described["libraries"]["torch"]
    json.dumps(described, allow_nan=False)
    later = described | {
        "date": "another",
        "load": [99.0],
        "available_bytes": 1,
        "commit": "f00",
        "dirty": True,
    }
    assert environment.fingerprint(later) == environment.fingerprint(described)
    assert environment.fingerprint(described | {"sources": "f00"}) != environment.fingerprint(described)


def test_the_digest_of_the_sources_sees_every_change_of_a_source_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "package" / "deep").mkdir(parents=True)
    source, single = tmp_path / "package" / "deep" / "a.py", tmp_path / "single.py"
    source.write_text("x = 1\n")
    single.write_text("y = 1\n")

    def digest() -> str:
        return environment.sources_digest(Origin(("package", "single.py")), tmp_path)

    first = digest()
    (tmp_path / "package" / "notes.txt").write_text("no source")
    assert digest() == first
    source.write_text("x = 2\n")
    second = digest()
    single.write_text("y = 2\n")
    third = digest()
    source.rename(source.with_name("b.py"))
    assert len({first, second, third, digest()}) == 4
