"""What a mutant is, and how a fresh interpreter comes to import the mutated source."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).parents[2]
PACKAGE = "efficient_attn"


@dataclass(frozen=True)
class Mutant:
    """One mistake that a programmer might make, as an edit of one file of the package."""

    file: str
    """Path inside the package."""
    before: str
    """Text that occurs exactly once in the file."""
    after: str
    why: str
    """What is wrong with it."""
    survives: str = ""
    """Why no test can tell it from the true code; empty for a mutant that must be killed."""

    @property
    def path(self) -> Path:
        return ROOT / PACKAGE / self.file

    @property
    def module(self) -> str:
        parts = [PACKAGE, *Path(self.file).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def source(self) -> str:
        """The mutated file.

        Raises:
            ValueError: if the file no longer has `before` exactly once, or the edit changes nothing.
        """
        true = self.path.read_text()
        if (times := true.count(self.before)) != 1:
            raise ValueError(f"stale mutant, {self.file} has this {times} times, not once: {self.before!r}")
        mutated = true.replace(self.before, self.after)
        if ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(true)):
            raise ValueError(f"the mutant of {self.file} changes nothing: {self.before!r} to {self.after!r}")
        return mutated

    def install(self) -> None:
        """Make this process import the mutated source; the package must not have been imported yet."""
        if self.module in sys.modules or PACKAGE in sys.modules:
            raise RuntimeError(f"{self.module} has been imported already")
        sys.meta_path.insert(0, _Finder(self.module, str(self.path), self.source()))


class _Finder(importlib.machinery.SourceFileLoader):
    """Finds and loads one module, from a string in place of its file."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        return (
            importlib.util.spec_from_file_location(name, self.path, loader=self)
            if name == self.name
            else None
        )

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec", dont_inherit=True)


@dataclass(frozen=True)
class Subject:
    """Mutants that the same tests should kill."""

    name: str
    mutants: tuple[Mutant, ...]
    tests: tuple[str, ...] = ()
    """Test files to run first: those written for this code."""
    mechanisms: tuple[str, ...] = ()
    """The mechanisms that the laws are run over."""
    first: tuple[str, ...] = ()
    """The laws to run before the others."""
    others: tuple[str, ...] = ()
    """Test files to run when the laws have let it pass."""
