"""Random cases of every mechanism: what they are, how they are drawn, what is checked, and how to rerun one."""

from __future__ import annotations

from .case import Case
from .checks import CHECKS, CaseFailed, run
from .search import search

__all__ = ["CHECKS", "Case", "CaseFailed", "run", "search"]
