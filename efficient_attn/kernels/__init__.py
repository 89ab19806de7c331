"""Triton kernels. Importing this package imports no Triton: a kernel's module is imported when it runs."""

from .availability import refusals

__all__ = ["refusals"]
