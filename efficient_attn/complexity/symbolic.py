"""The growth of a mechanism, as formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXACTNESS = ("exact", "exact within a pattern", "approximate", "different operator")


@dataclass(frozen=True)
class Complexity:
    """How a mechanism's cost grows with L, per batch row and head, as formulas that sympy reads.

    Symbols: L length; E head size; w window; g global tokens; s stride; b block; r blocks a row; m features;
    k rank. Constant factors are kept where they are the mechanism's own parameters, and dropped otherwise.

    Args:
        time: multiply-accumulates of one forward pass over L tokens.
        memory: numbers held beyond inputs and output, forward and backward.
        decode_time: multiply-accumulates of one more token after L.
        state: numbers kept between tokens; "0" if the mechanism cannot decode.
        path: the layers that information needs between two far positions, without causality.
        exactness: one of `EXACTNESS`, against full softmax attention.
        knob: the constructor argument that trades cost for fidelity, if there is one.
    """

    time: str
    memory: str
    decode_time: str
    state: str
    path: str
    exactness: str
    knob: str | None = None

    def __post_init__(self) -> None:
        if self.exactness not in EXACTNESS:
            raise ValueError(f"exactness must be one of {EXACTNESS}, got {self.exactness!r}")

    def expression(self, name: str) -> Any:
        """The formula `name` ("time", "memory", ...) as a sympy expression in positive symbols."""
        import sympy

        symbols = {letter: sympy.Symbol(letter, positive=True) for letter in "LEwgsbrmk"}
        return sympy.sympify(getattr(self, name), locals=symbols)  # pyright: ignore[reportCallIssue]

    def degree(self, name: str) -> float:
        """The exponent of L in the formula `name`, its other symbols held fixed."""
        import sympy

        expression = self.expression(name)
        length = sympy.Symbol("L", positive=True)
        return float(sympy.limit(sympy.log(sympy.Abs(expression)) / sympy.log(length), length, sympy.oo))
