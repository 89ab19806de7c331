"""Choosing among implementations of the same mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class BackendError(RuntimeError):
    """The requested backend, or every backend, refused the problem; the message lists each one's reasons."""


@dataclass(frozen=True)
class Backend:
    """One implementation: `refuse` lists why it cannot run a problem, `run` runs one it did not refuse.

    `by_name_only` keeps an implementation whose cost exceeds the declared one out of "auto". `portable` says that
    it runs wherever torch does: costs that name no backend are those of the first such one.
    """

    name: str
    run: Callable[[Any], Any]
    refuse: Callable[[Any], list[str]]
    by_name_only: bool = False
    portable: bool = True


def check_backend(requested: str, backends: Sequence[Backend]) -> str:
    """`requested`, if it is "auto" or names one of `backends`."""
    names = ["auto", *(backend.name for backend in backends)]
    if requested not in names:
        raise ValueError(f"backend must be one of {names}, got {requested!r}")
    return requested


def select(backends: Sequence[Backend], problem: Any, requested: str) -> Backend:
    """The first backend, in the order of the page, that can run `problem`; an explicit one or nothing.

    Raises:
        BackendError: if none can.
    """
    refusals: list[str] = []
    for backend in backends:
        if backend.name != requested and (requested != "auto" or backend.by_name_only):
            continue
        reasons = backend.refuse(problem)
        if not reasons:
            return backend
        refusals.append(f"  {backend.name}: {'; '.join(reasons)}")
    raise BackendError(f"no backend can run this problem (backend={requested!r}):\n" + "\n".join(refusals))


def explain(backends: Sequence[Backend], problem: Any, requested: str) -> str:
    """One line a backend: chosen, next in order, or refused and why."""
    lines: list[str] = []
    chosen = None
    for backend in backends:
        reasons = backend.refuse(problem)
        if requested not in ("auto", backend.name):
            reasons = [f"backend={requested!r} was asked for", *reasons]
        elif requested == "auto" and backend.by_name_only:
            reasons = ["must be asked for by name: it exceeds the declared complexity", *reasons]
        if reasons:
            lines.append(f"  {backend.name}: refused: {'; '.join(reasons)}")
        elif chosen is None:
            chosen = backend.name
            lines.append(f"  {backend.name}: chosen")
        else:
            lines.append(f"  {backend.name}: could run, comes after {chosen}")
    return "\n".join([f"backend: {chosen or 'none'}", *lines])
