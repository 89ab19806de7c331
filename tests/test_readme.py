"""The README says nothing that was not run.

Every python block runs, in order, in one namespace. A text block right after one is what that block printed:
equal, but that a number with a decimal point may differ by one in its last digit.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d+(?![\w.])")


class Example(NamedTuple):
    line: int
    code: str
    shown: str | None


def examples(readme: str) -> Iterator[Example]:
    """The python blocks, each with what the README says that it prints."""
    blocks = list(FENCE.finditer(readme))
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block[1] != "python":
            continue
        is_output = following is not None and following[1] == "text" and following.start() == block.end()
        shown = following[2] if following is not None and is_output else None
        yield Example(readme[: block.start(2)].count("\n"), block[2], shown)


def run(example: Example, namespace: dict[str, Any]) -> str:
    # Empty lines put the block where it stands in the README, for tracebacks.
    code = compile("\n" * example.line + example.code, README.name, "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


def same_output(printed: str, shown: str) -> bool:
    if NUMBER.split(printed) != NUMBER.split(shown):
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return all(abs(float(a) - float(b)) <= 1.5 * 10.0 ** -len(b.partition(".")[2]) for a, b in pairs)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module docs/<name>.py, imported as Python does when it is run as a script."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module(name)


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_every_example_runs_and_prints_what_is_shown(
    monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    found = list(examples(README.read_text()))
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # where pickle finds the classes defined there
    for example in found:
        printed = run(example, vars(module))
        where = f"README.md, line {example.line}"
        if example.shown is None:
            assert printed == "", f"{where}: prints what the README does not show"
        else:
            assert same_output(printed, example.shown), f"{where} prints\n{printed}but shows\n{example.shown}"
    assert len(found) > 5
    record_property("cases", len(found))


def test_the_comparison_of_outputs_notices_differences() -> None:
    assert same_output("a 0.12 b\n", "a 0.11 b\n")
    assert not same_output("a 0.13 b\n", "a 0.11 b\n")
    assert not same_output("a 12 b\n", "a 11 b\n")
    assert not same_output("a 0.12 c\n", "a 0.12 b\n")
    assert not same_output("a 0.12\n", "a 0.12 0.12\n")


def test_every_output_belongs_to_an_example() -> None:
    readme = README.read_text()
    outputs = [block for block in FENCE.finditer(readme) if block[1] == "text"]
    assert outputs
    assert len(outputs) == sum(example.shown is not None for example in examples(readme))


def test_the_tables_are_what_the_generator_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = README.read_text()
    filled_in = script("tables", monkeypatch).filled_in(readme)
    assert filled_in == readme, "python docs/tables.py --write brings the README up to date"


def test_the_examples_of_the_command_are_what_it_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = README.read_text()
    filled_in = script("command", monkeypatch).filled_in(readme)
    assert filled_in == readme, "python docs/command.py --write brings the README up to date"


def test_the_generator_replaces_what_is_between_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = script("tables", monkeypatch)
    monkeypatch.setattr(tables, "sections", lambda: {"a": "new"})
    assert tables.filled_in("1\n<!-- a:begin -->\nold\n<!-- a:end -->\n2\n") == (
        "1\n<!-- a:begin -->\nnew\n<!-- a:end -->\n2\n"
    )
    with pytest.raises(LookupError, match="a:begin"):
        tables.filled_in("no markers")


def test_the_picture_is_what_its_script_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = script("picture", monkeypatch)
    picture.draw(tmp_path / "drawn.png")
    assert picture.PICTURE == ROOT / "docs" / "mechanisms.png"
    assert png_size(tmp_path / "drawn.png") == png_size(picture.PICTURE)
    assert "](docs/mechanisms.png)" in README.read_text()


def test_every_link_and_command_leads_somewhere() -> None:
    readme = README.read_text()
    prose = FENCE.sub("", readme)
    headings = {
        re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", prose, re.M)
    }
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert path or anchor in headings, link
    for path in re.findall(r"`(?:python )?((?:docs|tests|examples|efficient_attn)/[\w/.]+)`?", prose):
        assert (ROOT / path).exists() or path == "efficient_attn/mechanisms/chunked.py", path
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    made = set(re.findall(r"^make (\w+)", readme, re.M)) | set(re.findall(r"`make (\w+)", prose))
    assert {"demo", "test"} <= made <= targets


def test_every_public_mechanism_has_a_row_and_the_demo_has_its_place() -> None:
    readme = README.read_text()
    assert [readme.count(f"<!-- demo:{end} -->") for end in ("begin", "end")] == [1, 1]
    assert readme.index("demo:begin") < readme.index("demo:end")
    for name in importlib.import_module("efficient_attn").MECHANISMS:
        assert readme.count(f"\n| `{name}` |") == 2, name
