"""The linter, the formatter, the type checker and the import contracts all pass."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINT_IMPORTS = str(Path(sysconfig.get_path("scripts")) / "lint-imports")

TOOLS = {
    "style": [sys.executable, "-m", "ruff", "check"],
    "format": [sys.executable, "-m", "ruff", "format", "--check", "--diff"],
    "types": [sys.executable, "-m", "pyright", "--pythonpath", sys.executable],
    "imports": [LINT_IMPORTS, "--no-cache"],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_tool_finds_nothing(tool: str) -> None:
    # pyright's wrapper would otherwise ask the network for a newer version of itself.
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    run = subprocess.run(TOOLS[tool], cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.fail(f"{' '.join(TOOLS[tool])}\n{run.stdout}{run.stderr}", pytrace=False)
