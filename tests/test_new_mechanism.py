"""A new mechanism is one file and one line of the table: everything else follows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

# The README's own example, and one of the other family.
CHUNKED = re.search(r"<!-- chunked\.py -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SOFTPLUS = '''"""Linear attention over softplus features."""

import torch

from efficient_attn.complexity import Complexity
from efficient_attn.feature_maps import FeatureMap, Features
from efficient_attn.mechanisms.families import LinearMechanism


class Softplus(FeatureMap):
    """phi(x) = log(1 + exp(x))."""

    name = "softplus"

    def forward(self, x):
        return Features(torch.nn.functional.softplus(x), None)

    def saved(self, head_dim):
        return head_dim


class SoftplusAttention(LinearMechanism):
    """Linear attention over softplus features."""

    complexity = Complexity(
        time="L*E**2", memory="L*E", decode_time="E**2", state="E**2", path="1", exactness="different operator"
    )

    def __init__(self, *, is_causal=False, scale=None, backend="auto"):
        super().__init__(Softplus(), is_causal=is_causal, scale=scale, backend=backend)

    @classmethod
    def examples(cls, seq_len, num_heads, head_dim):
        return [cls(is_causal=causal) for causal in (False, True)]
'''

PROGRAM = """
import json, sys
import tables, picture
from efficient_attn import MECHANISMS, Shape, create_mechanism
from efficient_attn.testing import check_mechanism
from efficient_attn.testing.sampling import HEAD_DIM, HEADS, LENGTH

name, options = sys.argv[1], json.loads(sys.argv[2])
created = create_mechanism(name, num_heads=8, head_dim=64, is_causal=True, **options)
cost = created.cost(Shape(1, 8, 4096, 4096, 64), training=True)
picture.draw(picture.PICTURE)
reports = [check_mechanism(m, raise_on_failure=False) for m in MECHANISMS[name].examples(LENGTH, HEADS, HEAD_DIM)]
print(json.dumps({
    "names": list(MECHANISMS),
    "created": type(created).__name__,
    "flops": cost.flops.forward,
    "state": cost.state_bytes,
    "tables": tables.sections(),
    "picture": picture.PICTURE.stat().st_size,
    "broken": [str(report) for report in reports if not report.ok],
    "laws": [len(report.held) for report in reports],
}))
"""


def add(copy: Path, name: str, cls: str, source: str) -> None:
    """One file, and one line of the table, with the import that it needs."""
    (copy / "efficient_attn" / "mechanisms" / f"{name}.py").write_text(source)
    table = copy / "efficient_attn" / "mechanisms" / "__init__.py"
    before = table.read_text()
    last = '        "linear": LinearAttention,\n'
    first_import = "from .base import Mechanism\n"
    assert before.count(last) == before.count(first_import) == 1
    after = before.replace(last, f'{last}        "{name}": {cls},\n')
    table.write_text(after.replace(first_import, f"{first_import}from .{name} import {cls}\n"))


@pytest.mark.parametrize(
    ("name", "cls", "source", "options", "flops", "state"),
    [
        # 16 chunks of 256 tokens: 256 * 257 / 2 pairs each, 2 FLOPs a number of k and one of v.
        (
            "chunked",
            "ChunkedAttention",
            CHUNKED and CHUNKED[1],
            {"chunk_size": 256},
            8 * 16 * 32_896 * 256,
            None,
        ),
        # A token updates the state and reads it: 64 x 64 products each. The state has the normaliser's column.
        ("softplus", "SoftplusAttention", SOFTPLUS, {}, 8 * 4096 * 4 * 64 * 64, 8 * 64 * 65 * 4),
    ],
)
def test_one_file_and_one_line(
    name: str, cls: str, source: str, options: dict[str, Any], flops: int, state: int | None, tmp_path: Path
) -> None:
    without_caches = shutil.ignore_patterns("__pycache__")
    for folder in ("efficient_attn", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=without_caches)
    add(tmp_path, name, cls, source)

    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, json.dumps(options)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'docs'}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["names"][-1] == name
    assert result["created"] == cls
    assert result["broken"] == []
    assert min(result["laws"]) > 20
    assert result["flops"] == flops
    assert state is None or result["state"] == state
    assert result["picture"] != (ROOT / "docs" / "mechanisms.png").stat().st_size

    readme = (ROOT / "README.md").read_text()
    for table in result["tables"].values():
        *others, last = table.splitlines()
        assert "\n".join(others) in readme, "the other rows are untouched"
        assert last.startswith(f"| `{name}` |")
