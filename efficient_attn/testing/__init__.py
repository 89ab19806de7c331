"""The laws, for this package's tests and for the mechanisms of others."""

from .check import LawReport, check_mechanism
from .laws import LAWS, Law, LawViolation
from .laws.budgets import within_budget

__all__ = ["LAWS", "Law", "LawReport", "LawViolation", "check_mechanism", "within_budget"]
