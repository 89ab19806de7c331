"""Runs the command in this process, and says what came of it."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any, NamedTuple

from efficient_attn.cli.main import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def ran(*arguments: object) -> Ran:
    """`efficient-attn` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def refused(complaint: str, *arguments: object) -> None:
    """The command ends with status 2, says why on standard error in words, and prints nothing else."""
    found = ran(*arguments)
    assert found.code == 2, found
    assert complaint in found.err, found.err
    assert "Traceback" not in found.err
    assert found.out == ""
