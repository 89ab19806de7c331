"""Records on disk: one JSON object a line, appended as soon as its cell is done, found again by its key."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cells import Cell

Record = dict[str, Any]

OK, WRONG, OOM, TIMEOUT, UNSUPPORTED, ERROR = "ok", "wrong", "oom", "timeout", "unsupported", "error"
UNSTABLE = "unstable"
"""Measured, but the samples lie too far apart for the number to be believed."""
STATUSES = (OK, WRONG, OOM, TIMEOUT, UNSUPPORTED, ERROR, UNSTABLE)
FIELDS = {
    "key": str,
    "cell": dict,
    "environment": dict,
    "status": str,
    "reason": str,
    "result": dict,
    "check": str,
}


def key_of(cell: Cell, fingerprint: Mapping[str, Any]) -> str:
    """The same for the same cell on the same machine, versions and sources."""
    return _digest({"cell": cell.identity, "fingerprint": dict(fingerprint)})


class Records:
    """The file at `path`. It is only ever appended to: a damaged line is skipped and stays where it is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[list[Record], list[str]]:
        """The records in order, and a complaint for each damaged line, with its number."""
        if not self.path.exists():
            return [], []
        records, complaints = [], []
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                records.append(_parse(line))
            except ValueError as error:
                complaints.append(f"{self.path}, line {number}: {error}; skipped")
        return records, complaints

    def by_key(self) -> tuple[dict[str, Record], list[str]]:
        """The last record of each key, and the complaints."""
        records, complaints = self.read()
        return {record["key"]: record for record in records}, complaints

    def append(self, record: Mapping[str, Any]) -> Record:
        """Write `record` with its checksum, and wait until it is on the disk."""
        sealed = dict(record) | {"check": _digest(record)}
        line = (json.dumps(sealed, sort_keys=True, allow_nan=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            # A line that an interruption cut short must not swallow this one.
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return sealed


def _parse(line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one, too
        raise ValueError("not JSON") from None
    if not isinstance(record, dict):
        raise ValueError(f"not an object but a {type(record).__name__}")
    for name, kind in FIELDS.items():
        if not isinstance(record.get(name), kind):
            raise ValueError(f"{name} must be a {kind.__name__}, got {record.get(name)!r:.40}")
    if record["check"] != _digest({name: value for name, value in record.items() if name != "check"}):
        raise ValueError("its checksum does not fit: it is not what was measured")
    if record["status"] not in STATUSES:
        raise ValueError(f"status must be one of {list(STATUSES)}, got {record['status']!r}")
    try:
        Cell.from_identity(record["cell"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"its cell is not one of this version: {error}") from None
    return record


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
