"""What figures are drawn from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...benchmarking.records import OK, UNSTABLE, Record, Records
from ...planning import DEVICES, Device, MechanismSpec, Model
from ..arguments import CommandError

ELSEWHERE = "H100"
"""The device of estimates where none is named."""

OF_A_DEMO = ("settings", "data", "bigram_bits_per_character")
OF_A_MODEL = (
    *("bits_per_character", "delta_to_full", "delta_standard_error", "crossover_length", "history", "audit"),
    *("train_tokens_per_second", "train_step_peak_bytes", "scaling", "state_bytes", "sample"),
)
"""What figures and tables read of the demo's results."""


class NoData(Exception):
    """This figure cannot be drawn from what there is, and why."""


@dataclass
class Data:
    """
    Args:
        records: of `bench`.
        demo: the results.json of the demo of language models.
        device: for estimates.
        mechanisms: those to draw; None: every one.
        layer: whose sizes the theory is drawn for.
        complaints: about damaged lines.
    """

    records: list[Record] = field(default_factory=list)
    demo: dict[str, Any] | None = None
    device: Device = DEVICES[ELSEWHERE]
    mechanisms: list[MechanismSpec] | None = None
    layer: Model = field(default_factory=lambda: Model(1, 768, 12, ffn_dim=0, norm="none", is_causal=False))
    complaints: list[str] = field(default_factory=list)

    @property
    def timed(self) -> list[Record]:
        """Records with seconds that one may believe, or at least look at."""
        return [r for r in self.records if r["status"] in (OK, UNSTABLE) and "seconds" in r["result"]]


def read_records(paths: list[Path], section: str) -> tuple[list[Record], list[str]]:
    """The newest record of each cell of `section` in all files, and complaints. Raises CommandError for a bad file."""
    newest: dict[str, Record] = {}
    complaints: list[str] = []
    for path in paths:
        if not path.is_file():
            raise CommandError(f"{path}: no such file; efficient-attn bench writes records")
        try:
            found, more = Records(path).read()
        except OSError as error:
            raise CommandError(f"cannot read {path}: {error}") from error
        if not found:
            raise CommandError(f"{path} holds no records{': ' + more[0] if more else ''}")
        complaints += more
        mine = [record for record in found if record["cell"]["section"] == section]
        if not mine:
            raise CommandError(f"{path} holds no records of efficient-attn bench")
        newest |= {json.dumps(record["cell"], sort_keys=True): record for record in mine}
    return list(newest.values()), complaints


def read_demo(path: Path) -> dict[str, Any]:
    """The results of the demo. Raises CommandError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {path}: {error}") from error
    rows = found.get("mechanisms") if isinstance(found, dict) else None
    if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in rows.values()):
        raise CommandError(f"{path} does not hold results of examples/long_context_lm.py")
    lacking = {name for name in OF_A_DEMO if name not in found}
    lacking |= {name for name in OF_A_MODEL for row in rows.values() if name not in row}
    if lacking:
        raise CommandError(f"{path} lacks {', '.join(sorted(lacking))}: it is of another version of the demo")
    return found
