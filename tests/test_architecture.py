"""What the tree promises: short files, a light import, exact public names, and no hidden switches."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import efficient_attn

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "efficient_attn"
MAX_LINES = 400


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in sources("efficient_attn", "tests", "examples", "benchmarks")
    }
    assert lengths
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_no_file_is_called_utils() -> None:
    vague = {"utils", "util", "helpers", "misc", "common"}
    files = sources("efficient_attn", "tests", "examples", "benchmarks")
    assert [str(path) for path in files if path.stem in vague or path.parent.name in vague] == []


def in_a_fresh_interpreter(program: str) -> Any:
    """The JSON that `program` prints where nothing has been imported, and no test has touched the package."""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_importing_the_package_loads_no_optional_library() -> None:
    # Relative to torch, which may import Triton on its own account.
    added = in_a_fresh_interpreter(
        "import json, sys, torch; before = set(sys.modules)\n"
        "import efficient_attn; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    optional = {"triton", "xformers", "flash_attn", "transformers", "timm", "matplotlib", "rich", "beartype"}
    assert optional & {name.partition(".")[0] for name in added} == set()


def test_all_is_exact() -> None:
    names = in_a_fresh_interpreter(
        "import json, efficient_attn\n"
        "print(json.dumps({name: type(value).__name__ + ' ' + getattr(value, '__name__', '')"
        " for name, value in vars(efficient_attn).items()}))"
    )
    submodules = {name for name, what in names.items() if what == f"module efficient_attn.{name}"}
    public = {name for name in names if not name.startswith("_")} - submodules - {"annotations"}
    declared = efficient_attn.__all__
    assert len(declared) == len(set(declared))
    assert set(declared) - set(names) == set(), "declared, but not there"
    assert public - set(declared) == set(), "there, but not declared"


def test_nothing_is_decided_by_the_environment() -> None:
    names = {"environ", "environb", "getenv", "getenvb"}

    def reads_the_environment(node: ast.AST) -> bool:
        if isinstance(node, ast.ImportFrom):
            return node.module == "os" and any(name.name in names for name in node.names)
        return isinstance(node, ast.Attribute) and node.attr in names

    found = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}"
        for path in sources("efficient_attn")
        for node in ast.walk(ast.parse(path.read_text()))
        if reads_the_environment(node)
    ]
    assert found == []


def test_no_law_names_a_mechanism() -> None:
    classes = "|".join(cls.__name__ for cls in efficient_attn.MECHANISMS.values())
    laws = sources("tests/laws")
    assert laws
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in laws
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(rf"\b({classes})\b", line)
    ]
    assert found == []
