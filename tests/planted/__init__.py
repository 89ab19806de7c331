"""Mechanisms broken on purpose, most as a published library once was: the laws must notice each of them."""

from __future__ import annotations

from . import causality, citizens, costs, decoding, masking, patterns, precision
from .defect import DEFECTS, TWINS, Defect, violation

__all__ = [
    "DEFECTS",
    "TWINS",
    "Defect",
    "causality",
    "citizens",
    "costs",
    "decoding",
    "masking",
    "patterns",
    "precision",
    "violation",
]
