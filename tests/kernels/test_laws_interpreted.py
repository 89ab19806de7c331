"""Every law of kernels over every example that they serve, in Triton's interpreter, which needs no GPU.

In an interpreter of its own, because Triton decides when it is imported whether it interprets, and here it must not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from efficient_attn.mechanisms import MECHANISMS
from efficient_attn.testing.sampling import HEAD_DIM, HEADS, LENGTH

from .judging import KERNEL

ROOT = Path(__file__).parent.parent.parent

SERVED = [name for name, cls in MECHANISMS.items() if any(backend.name == KERNEL for backend in cls.backends)]
"""The mechanisms that have the kernels among their backends."""


def interpreted(program: list[str]) -> subprocess.CompletedProcess[str]:
    """A Python process in which Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    return subprocess.run(
        [sys.executable, *program], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_a_kernel_serves_each_family() -> None:
    """Without this, nothing below would run and nothing would fail."""
    expected = {
        "flash",
        "sliding_window",
        "longformer",
        "bigbird",
        "sparse_transformer",
        "performer",
        "linear",
    }
    assert set(SERVED) == expected


@pytest.mark.parametrize("name", SERVED)
def test_laws(name: str, record_property: Any) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run = interpreted(["-m", "kernels", name])
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    failures = [
        f"{line['example']} {line['law']}: {line['failure']}" for line in lines if line.get("failure")
    ]
    failures += [
        f"{line['example']} is not served: {line['unserved']}" for line in lines if "unserved" in line
    ]
    failures += [
        f"{line['example']} {line['law']}: {line['refused']}" for line in lines if line.get("refused")
    ]
    if not lines or "broken" not in lines[-1]:
        failures.append(f"the run broke off with exit status {run.returncode}:\n{run.stderr[-3000:]}")
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    cases: Counter[str] = Counter()
    for line in lines[:-1]:
        cases[line["law"]] += line["cases"]
    judged = {line["example"] for line in lines[:-1]}
    examples = MECHANISMS[name].examples(LENGTH, HEADS, HEAD_DIM)
    assert len(judged) == sum(example.backend == "auto" for example in examples) > 0
    assert cases.total() == lines[-1]["held"] > 0
    assert run.returncode == 0, run.stderr[-3000:]
    record_property("laws", dict(cases))
    record_property("launched", lines[-1]["launches"])


def test_every_law_applies_somewhere() -> None:
    """A law that no example is subject to would go unnoticed."""
    from .laws import LAWS

    examples = [m for name in SERVED for m in MECHANISMS[name].examples(LENGTH, HEADS, HEAD_DIM)]
    assert [law.name for law in LAWS.values() if not any(law.applies(m) for m in examples)] == []


def test_bfloat16_is_refused_where_it_would_be_wrong() -> None:
    """In the interpreter the kernels refuse bfloat16 in words, and the portable backend is chosen."""
    pytest.importorskip("triton", reason="triton is not installed")
    program = (
        "import torch, triton\n"
        "from efficient_attn.mechanisms import MECHANISMS\n"
        f"for name in {SERVED!r}:\n"
        f"    m = MECHANISMS[name].examples({LENGTH}, {HEADS}, {HEAD_DIM})[0].to(torch.bfloat16)\n"
        f"    x = torch.zeros(2, {HEADS}, {LENGTH}, {HEAD_DIM}, dtype=torch.bfloat16)\n"
        "    said = m.explain(x, x, x)\n"
        f"    assert '{KERNEL}: refused' in said and 'computes bfloat16 wrongly' in said, said\n"
        f"    assert 'backend: none' not in said, said\n"
        "print('refused')\n"
    )
    run = interpreted(["-c", program])
    assert run.stdout == "refused\n", run.stdout + run.stderr


def test_nothing_is_interpreted_here() -> None:
    """In this process, on the CPU, everything is as if there were no kernels."""
    x = torch.zeros(2, HEADS, LENGTH, HEAD_DIM)
    for name in SERVED:
        for m in MECHANISMS[name].examples(LENGTH, HEADS, HEAD_DIM):
            if m.backend == "auto":
                said = m.explain(x, x, x)
                assert f"{KERNEL}: refused: runs on NVIDIA GPUs, not cpu" in said, said
