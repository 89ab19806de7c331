"""Run one case again: `PYTHONPATH=tests python -m fuzz "Case(...)"`."""

from __future__ import annotations

import sys

from . import Case, CaseFailed, run


def main(arguments: list[str]) -> int:
    """Run the case that the only argument describes; 1 if it fails."""
    if len(arguments) != 1:
        print('usage: PYTHONPATH=tests python -m fuzz "Case(...)"', file=sys.stderr)
        return 2
    try:
        made = run(Case.parse(arguments[0]))
    except CaseFailed as failure:
        print(failure)
        return 1
    print(f"holds: {', '.join(made)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
