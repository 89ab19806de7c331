"""Runs `block_sparse_cases` where Triton interprets: in a process of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from .test_laws_interpreted import interpreted

CASES = re.findall(
    r"^@case\ndef (\w+)", (Path(__file__).parent / "block_sparse_cases.py").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, record_property: Any) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run = interpreted(["-m", "kernels.block_sparse_cases", name])
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert lines, run.stderr[-3000:]
    assert "failure" not in lines[-1], lines[-1]["failure"]
    assert run.returncode == 0, run.stderr[-3000:]
    record_property("cases", lines[-1]["comparisons"])
