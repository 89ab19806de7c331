"""The parts of `long_context_lm.py`: data, model, training, audit, measurements and the report.

Nothing here is part of the library: it is what a user of the library writes around it.
"""

from __future__ import annotations


class DemoError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""
