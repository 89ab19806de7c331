"""What is printed: with rich for people on a terminal, as plain lines for everybody else, as JSON for programs."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from efficient_attn.benchmarking import tables
from efficient_attn.cli import progress
from efficient_attn.cli.output import as_json, count_text, seconds_text
from efficient_attn.cli.progress import Progress, Remaining
from tests.cli.running import ran

ROOT = Path(__file__).parent.parent.parent


def on_a_terminal(*arguments: str) -> str:
    """What a terminal is sent."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "COLUMNS": "160", "TERM": "xterm"}
    command = [sys.executable, "-m", "efficient_attn.cli", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=theirs, stderr=theirs)
    os.close(theirs)
    sent = b""
    try:
        while more := os.read(ours, 4096):
            sent += more
    except OSError:  # how Linux says that nobody writes any more
        pass
    os.close(ours)
    assert process.wait() == 0, sent
    return sent.decode()


def test_a_terminal_gets_a_table_of_rich_and_a_file_plain_lines() -> None:
    assert "\N{BOX DRAWINGS LIGHT HORIZONTAL}" * 3 in on_a_terminal("list")
    assert "\N{BOX DRAWINGS LIGHT HORIZONTAL}" not in ran("list").out


def test_without_rich_a_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    terminal: Any = Terminal()
    assert tables.rich_on(terminal)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not tables.rich_on(terminal)


def test_progress_with_rich_says_the_same_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "rich_on", lambda stream: True)
    with Progress(1, Remaining([], lambda cell: 1, 1.0)) as shown:
        shown.begin("linear forward at 32")
        shown.end("linear forward at 32: 1 ms [not markup]")
    assert "linear forward at 32: 1 ms [not markup]" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m efficient_attn.cli list --json | head -1; echo ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert run.stderr == ""
    assert run.stdout.split() == ["{", "0"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (count_text(412_000_000_000), "412 G"),
        (count_text(3.2e15), "3.2 P"),
        (count_text(999), "999"),
        (count_text(0), "0"),
        (seconds_text(3.21e-3), "3.21 ms"),
        (seconds_text(12e-6), "12 µs"),
        (seconds_text(4e-9), "4 ns"),
        (seconds_text(90), "90 s"),
        (seconds_text(300), "5 min"),
        (seconds_text(9000), "2.5 h"),
        (tables.size_text(127 * 1024), "127 KiB"),
        (tables.size_text(5 * 2**40), "5,120 GiB"),
    ],
)
def test_numbers_for_people(text: str, shown: str) -> None:
    assert text == shown


def test_everything_becomes_json() -> None:
    @dataclass
    class Pair:
        left: Any
        right: Any

    value = Pair({1: (float("nan"), torch.bfloat16)}, Pair(Path("a"), True))
    assert as_json(value) == {"left": {"1": [None, "bfloat16"]}, "right": {"left": "a", "right": True}}
