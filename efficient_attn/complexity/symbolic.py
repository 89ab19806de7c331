"""The growth of a mechanism, as formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EXACTNESS = ("exact", "exact within a pattern", "approximate", "different operator")
FORMULAS = ("time", "memory", "sequential_steps", "decode_time", "state", "path", "sent")
GENERAL = {"L": "length", "E": "head size", "P": "ranks"}
"""The symbols that have a meaning for every mechanism."""
LETTERS = "LEPwgsbrmk"


@dataclass(frozen=True)
class Complexity:
    """How a mechanism's cost grows with L, per batch row and head, as formulas that sympy reads.

    Symbols: L length; E head size; P ranks; w window; g global tokens; s stride; b block; r blocks a row; m features;
    k rank. Constant factors are kept where they are the mechanism's own parameters, and dropped otherwise.

    Args:
        time: multiply-accumulates of one forward pass over L tokens.
        memory: numbers held beyond inputs and output, forward and backward.
        decode_time: multiply-accumulates of one more token after L.
        state: numbers kept between tokens; "0" if the mechanism cannot decode.
        path: the layers that information needs between two far positions, without causality.
        exactness: one of `EXACTNESS`, against full softmax attention.
        knob: the constructor argument that trades cost for fidelity, if there is one.
        sequential_steps: steps of a forward pass that must wait for each other.
        sent: numbers that each of P ranks sends in a forward pass, the sequence split among them, constants kept: keys
            and values around a ring (Liu et al. 2023, arXiv:2310.01889), the edge of a window to a neighbour, or the
            sum of a state (a ring's all-reduce sends it twice). Derived: nothing here runs on several ranks.
        symbols: the attribute of the mechanism that says what a letter is, by letter; positions count as many.
    Raises:
        ValueError: if the exactness or a letter is unknown.
    """

    time: str
    memory: str
    decode_time: str
    state: str
    path: str
    exactness: str
    knob: str | None = None
    sequential_steps: str = "1"
    sent: str = "2*L*E*(P-1)/P"
    symbols: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.exactness not in EXACTNESS:
            raise ValueError(f"exactness must be one of {EXACTNESS}, got {self.exactness!r}")
        unknown = sorted(set(self.symbols) - set(LETTERS) | set(self.symbols) & set(GENERAL))
        if unknown:
            raise ValueError(f"symbols must be letters of {LETTERS[3:]!r}, got {unknown}")

    def expression(self, name: str) -> Any:
        """The formula `name` ("time", "memory", ...) as a sympy expression in positive symbols."""
        import sympy

        if name not in FORMULAS:
            raise ValueError(f"name must be one of {list(FORMULAS)}, got {name!r}")
        symbols = {letter: sympy.Symbol(letter, positive=True) for letter in LETTERS}
        return sympy.sympify(getattr(self, name), locals=symbols)  # pyright: ignore[reportCallIssue]

    def degree(self, name: str) -> float:
        """The exponent of L in the formula `name`, its other symbols held fixed."""
        import sympy

        expression = self.expression(name)
        length = sympy.Symbol("L", positive=True)
        return float(sympy.limit(sympy.log(sympy.Abs(expression)) / sympy.log(length), length, sympy.oo))

    def state_per_token(self) -> Any:
        """By how much the state grows with each token: the derivative of `state`, a sympy expression."""
        import sympy

        return sympy.diff(self.expression("state"), sympy.Symbol("L", positive=True))

    def evaluate(self, name: str, values: Mapping[str, float]) -> float:
        """The formula `name` with numbers for its symbols.

        Raises:
            ValueError: if the formula has a symbol without a value.
        """
        expression = self.expression(name)
        missing = sorted(str(s) for s in expression.free_symbols if str(s) not in values)
        if missing:
            raise ValueError(
                f"values must say what {', '.join(missing)} is in {getattr(self, name)!r}, got {values}"
            )
        value = expression.subs({symbol: values[str(symbol)] for symbol in expression.free_symbols})
        return math.inf if value.is_infinite else float(value)
