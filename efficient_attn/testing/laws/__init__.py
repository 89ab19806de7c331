"""The laws that every mechanism obeys. Importing this package registers all of them."""

from . import causality, costs, decoding, exactness, layout, masking, numerics, structure, tracing
from .law import LAWS, Law, LawViolation

__all__ = [
    "LAWS",
    "Law",
    "LawViolation",
    "causality",
    "costs",
    "decoding",
    "exactness",
    "layout",
    "masking",
    "numerics",
    "structure",
    "tracing",
]
