"""The parser, and what every command has in common: exit status 2 and one line for what the caller got wrong."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import bench, calibrate, compare, cost, crossover, describe, plan, plot, report, verify
from .arguments import CommandError

COMMANDS = (describe, cost, compare, crossover, plan, calibrate, bench, verify, plot, report)

DESCRIPTION = """\
Efficient attention: what mechanisms claim, what they cost, and what they do on this machine.

A mechanism is written NAME or NAME:OPTION=VALUE,..., such as sliding_window:window_size=256; lengths are written
4096, 64k (k is 1024, M is 1024k), 1k,2k or 1k:1M:x2.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    whole = argparse.ArgumentParser(
        prog="efficient-attn", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_to(commands)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 if what was checked does not hold, or 2 if the caller is wrong."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except CommandError as error:
        print(f"efficient-attn: error: {error}", file=sys.stderr)
        return 2
    except (OverflowError, MemoryError) as error:
        print(f"efficient-attn: error: too large: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has seen enough. Nothing may be flushed into the pipe any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"efficient-attn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("efficient-attn: stopped", file=sys.stderr)
        return 130
