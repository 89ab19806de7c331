"""What a swap did, or would do: one row for each attention module of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..complexity import Cost, Shape
from ..mechanisms.base import Mechanism
from .sites import Site, Undo


@dataclass(frozen=True)
class Row:
    """What became of one attention module.

    Attributes:
        path: its name in the model.
        before: what was there.
        site: where; None for a module that no adapter knows.
        mechanism: what attends there now; None if it was left alone.
        reason: why it was left alone.
        refused: whether it was to be swapped, and could not be.
        notes: what changes beside the mechanism.
    """

    path: str
    before: str
    site: Site | None = None
    mechanism: Mechanism | None = None
    reason: str | None = None
    refused: bool = False
    notes: tuple[str, ...] = ()

    @property
    def exactness(self) -> str:
        """Of the mechanism, against full softmax attention."""
        return "" if self.mechanism is None else self.mechanism.complexity.exactness


@dataclass
class SwapReport:
    """What `swap_attention` did: a row for each attention module; printed, a table.

    Attributes:
        rows: in the order of the model's modules.
        dry_run: whether the model was left as it was.
        undo: what `restore` calls, last first.
    """

    rows: list[Row]
    dry_run: bool
    undo: list[Undo] = field(default_factory=list, repr=False)

    @property
    def swapped(self) -> list[Row]:
        """The rows of the modules that have a mechanism now, or would have."""
        return [row for row in self.rows if row.mechanism is not None]

    def restore(self) -> None:
        """Put everything back: the model is bit for bit what it was. A second call does nothing."""
        while self.undo:
            self.undo.pop()()

    def costs(self, seq_len: int) -> list[Cost | None]:
        """What one sequence of `seq_len` tokens costs at each row in `swapped`; None if it is too long for it."""
        return [_cost(row, seq_len) for row in self.swapped]

    def table(self, seq_len: int = 4096) -> str:
        """The report in lines: layer, before, after, exactness, FLOPs and state at `seq_len` tokens, and reasons."""
        heading = ("layer", "before", "after", "exactness", f"GFLOP at {seq_len:,}", "state, KiB", "")
        lines = [heading, *(_line(row, seq_len) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def __str__(self) -> str:
        return self.table()


def _cost(row: Row, seq_len: int) -> Cost | None:
    site, mechanism = row.site, row.mechanism
    if site is None or mechanism is None or (mechanism.max_seq_len or seq_len) < seq_len:
        return None
    shape = Shape(1, site.num_heads, seq_len, seq_len, site.head_dim, num_kv_heads=site.num_kv_heads)
    return mechanism.cost(shape)


def _line(row: Row, seq_len: int) -> tuple[str, ...]:
    cost = _cost(row, seq_len)
    if row.mechanism is None:
        after = "refused" if row.refused else "kept"
    else:
        after = str(row.mechanism).replace("\n", " ")
    numbers = (
        ("", "") if cost is None else (f"{cost.flops.forward / 1e9:,.3g}", f"{cost.state_bytes / 1024:,.4g}")
    )
    said = "; ".join((*(() if row.reason is None else (row.reason,)), *row.notes))
    return (row.path, row.before, after, row.exactness, *numbers, said)
