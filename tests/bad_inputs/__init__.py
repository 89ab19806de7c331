"""The table of bad inputs: every call must raise exactly this type with this message."""

from __future__ import annotations

from . import calls, constructors, decoding, layers
from .subjects import Case

CASES: list[Case] = calls.CASES + constructors.CASES + decoding.CASES + layers.CASES
