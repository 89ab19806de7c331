"""Every law over one mechanism, for the mechanisms of others too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..mechanisms import Mechanism
from .laws import LAWS, LawViolation
from .sampling import LENGTH


@dataclass
class LawReport:
    """What held, what did not, and what does not apply; `str` is a table."""

    mechanism: str
    held: dict[str, int] = field(default_factory=dict)
    """Cases tried, by law."""
    broken: dict[str, str] = field(default_factory=dict)
    """What was violated, and by how much, by law."""
    inapplicable: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every law that applies holds."""
        return not self.broken

    @property
    def cases(self) -> int:
        """Cases tried under laws that held."""
        return sum(self.held.values())

    def __str__(self) -> str:
        lines = [
            f"{self.mechanism}: {len(self.held)} laws hold in {self.cases} cases, {len(self.broken)} broken"
        ]
        lines += [f"  broken  {name}: {message}" for name, message in self.broken.items()]
        lines += [f"  holds   {name} ({cases} cases)" for name, cases in self.held.items()]
        lines += [f"  n/a     {name}" for name in self.inapplicable]
        return "\n".join(lines)


def check_mechanism(
    mechanism: Mechanism, *, laws: Sequence[str] | None = None, raise_on_failure: bool = True
) -> LawReport:
    """Run every law, or those named, on sequences of up to 37 tokens, a few laws on longer ones.

    Heads are 4 over 2 of size 8, or what the mechanism declares that it was built for.

    A law is selected out only by what the mechanism declares (`is_causal`, `supports_segments`, `rows_sum_to_one`,
    `max_seq_len` ...), and the report says so. Any other exception than a violation counts as a violation.

    Args:
        mechanism: what to check; it is copied, never changed.
        laws: names in `efficient_attn.testing.LAWS`; all if None.
        raise_on_failure: raise at the end, with the whole report, if a law is broken.
    Raises:
        LawViolation: if a law is broken.
        ValueError: if a law is unknown, or the mechanism takes fewer than 37 tokens.
    """
    if not isinstance(mechanism, Mechanism):
        raise TypeError(f"mechanism must be a Mechanism, got {type(mechanism).__name__}")
    unknown = [name for name in laws or () if name not in LAWS]
    if unknown:
        raise ValueError(f"unknown laws {unknown}; known ones are {list(LAWS)}")
    if mechanism.max_seq_len is not None and mechanism.max_seq_len < LENGTH:
        raise ValueError(
            f"mechanism must take at least {LENGTH} tokens, its max_seq_len is {mechanism.max_seq_len}: "
            "pass one built alike for more"
        )
    report = LawReport(repr(mechanism))
    for name in LAWS if laws is None else laws:
        if not LAWS[name].applies(mechanism):
            report.inapplicable.append(name)
            continue
        try:
            report.held[name] = LAWS[name].run(mechanism)
        except Exception as error:
            kind = "" if isinstance(error, LawViolation) else f"{type(error).__name__}: "
            report.broken[name] = f"{kind}{error}"
    if raise_on_failure and not report.ok:
        raise LawViolation(str(report))
    return report
