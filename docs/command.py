"""Prints the README's examples of the command, with what they print.

python docs/command.py           # print them
python docs/command.py --write   # put them between the README's markers
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex

from tables import README, put

from efficient_attn.cli.main import main

COMMANDS = (
    "efficient-attn compare --length 64k --causal --on H100",
    "efficient-attn crossover full linear --causal",
    "efficient-attn plan --model llama-3-8b --length 128k --on H100 --decode",
)


def shown(command: str) -> str:
    """The command and what it prints. Raises RuntimeError if it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(shlex.split(command)[1:])
    if code:
        raise RuntimeError(f"{command} ended with status {code}")
    lines = [line.rstrip() for line in printed.getvalue().strip().splitlines()]
    return "\n".join([f"$ {command}", *lines])


def filled_in(readme: str) -> str:
    """`readme` with its examples run afresh."""
    outputs = "\n\n".join(map(shown, COMMANDS))
    return put(readme, {"command": f"```\n{outputs}\n```"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put them into the README")
    if parser.parse_args().write:
        README.write_text(filled_in(README.read_text()))
    else:
        print("\n\n".join(map(shown, COMMANDS)))
