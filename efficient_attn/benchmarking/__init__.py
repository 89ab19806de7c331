"""Measuring: cells in processes of their own, checked before they are timed, recorded so that nothing is lost."""
