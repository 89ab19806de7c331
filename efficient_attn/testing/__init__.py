"""The laws, for this package's tests and for the mechanisms of others."""

from .budgets import within_budget
from .check import LawReport, check_mechanism
from .laws import LAWS, Law, LawViolation

__all__ = ["LAWS", "Law", "LawReport", "LawViolation", "check_mechanism", "within_budget"]
