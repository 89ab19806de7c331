"""The report: one HTML page that loads nothing."""

from .contents import page_of, write_page

__all__ = ["page_of", "write_page"]
