"""How the kernels of linear attention are cut: by kernel, architecture, size of an operand and head size.

FEATURES is how many features one launch takes at most, so that its part of the state fits into registers: more are
taken by several launches, which add to one another's sums.
"""

from __future__ import annotations

from ..configs import ARCHITECTURES, INTERPRETER, Config, Key

LONGEST_SPAN, SHORTEST_SPAN = 4096, 256
"""Tokens whose keys one program sums up, or whose rows it walks."""

PROGRAMS = 1024
"""Spans are as long as leaves at least that many programs."""

LARGEST_PROJECTED = 128
"""The largest head size whose random features are computed in registers; in bf16 without spilling."""

COLUMNS = 32
"""Columns of a head that are projected onto random features at once."""

DECODE_BLOCKS = 64, 32
"""Features, and columns of values, that are read at once for one new token."""


def named(kernel: str, projected: bool) -> str:
    """The entry of TABLE for a kernel: walks have one of their own for random features, which they project."""
    return f"{kernel}_projected" if projected and f"{kernel}_projected" in TABLE else kernel


def padded(size: int) -> int:
    """The width of the tile that holds `size` columns."""
    return max(16, 1 << (size - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def span_of(heads: int, tokens: int, interpreted: bool) -> int:
    """The tokens of a span, for so many heads of so many tokens."""
    if interpreted:
        return 32
    span = LONGEST_SPAN
    while span > SHORTEST_SPAN and heads * ceil_div(tokens, span) < PROGRAMS:
        span //= 2
    return span


def _everywhere(interpreter: Config, table: dict[Key, Config]) -> dict[Key, Config]:
    small = {(INTERPRETER, width, size): interpreter for width in (2, 4) for size in (64, 128, 256)}
    return {**small, **table}


def _alike(
    two: dict[int, Config], four: dict[int, Config], elsewhere: dict[int, dict[int, Config]] | None = None
) -> dict[Key, Config]:
    """One config for all architectures: `two` and `four` are by head size, for operands of so many bytes.

    `elsewhere` replaces some of `two`, by architecture and head size.
    """
    table: dict[Key, Config] = {}
    for arch in ARCHITECTURES:
        table |= {(arch, 2, size): config for size, config in two.items()}
        table |= {(arch, 4, size): config for size, config in four.items()}
    for arch, configs in (elsewhere or {}).items():
        table |= {(arch, 2, size): config for size, config in configs.items()}
    return table


_INTERPRETED = Config.of(4, 1, CHUNK=16, BLOCK_M=32, FEATURES=32, BLOCK_V=32)

TABLE: dict[str, dict[Key, Config]] = {
    "exponents": _everywhere(
        Config.of(4, 1, CHUNK=16, BLOCK_M=32),
        _alike(
            {size: Config.of(4, 2, CHUNK=64, BLOCK_M=64) for size in (64, 128, 256)},
            {size: Config.of(4, 2, CHUNK=32, BLOCK_M=32) for size in (64, 128, 256)},
        ),
    ),
    "states": _everywhere(
        Config.of(4, 1, CHUNK=16, BLOCK_M=32, BLOCK_V=32),
        _alike(
            {
                64: Config.of(4, 2, CHUNK=64, BLOCK_M=64, BLOCK_V=64),
                128: Config.of(8, 2, CHUNK=64, BLOCK_M=64, BLOCK_V=128),
                256: Config.of(8, 2, CHUNK=64, BLOCK_M=128, BLOCK_V=128),
            },
            {size: Config.of(8, 1, CHUNK=32, BLOCK_M=32, BLOCK_V=64) for size in (64, 128, 256)},
            {86: {128: Config.of(8, 1, CHUNK=64, BLOCK_M=64, BLOCK_V=128)}},
        ),
    ),
    "rows": _everywhere(
        _INTERPRETED,
        _alike(
            {
                64: Config.of(8, 2, CHUNK=64, BLOCK_M=64, FEATURES=64, BLOCK_V=64),
                128: Config.of(8, 1, CHUNK=64, BLOCK_M=64, FEATURES=64, BLOCK_V=64),
                256: Config.of(4, 1, CHUNK=32, BLOCK_M=64, FEATURES=64, BLOCK_V=64),
            },
            {size: Config.of(8, 1, CHUNK=16, BLOCK_M=32, FEATURES=32, BLOCK_V=64) for size in (64, 128, 256)},
            {
                arch: dict.fromkeys((64, 128), Config.of(4, 1, CHUNK=32, BLOCK_M=64, FEATURES=64, BLOCK_V=64))
                for arch in (80, 86, 100)
            },
        ),
    ),
    "rows_projected": _everywhere(
        _INTERPRETED,
        _alike(
            {
                64: Config.of(8, 1, CHUNK=32, BLOCK_M=32, FEATURES=32, BLOCK_V=64),
                128: Config.of(8, 1, CHUNK=32, BLOCK_M=32, FEATURES=32, BLOCK_V=64),
                256: Config.of(4, 1, CHUNK=32, BLOCK_M=32, FEATURES=32, BLOCK_V=64),
            },
            {size: Config.of(8, 1, CHUNK=16, BLOCK_M=32, FEATURES=32, BLOCK_V=64) for size in (64, 128, 256)},
            {
                arch: {64: Config.of(4, 1, CHUNK=32, BLOCK_M=32, FEATURES=32, BLOCK_V=64)}
                for arch in (80, 86, 100)
            },
        ),
    ),
    "row_gradients": _everywhere(
        Config.of(4, 1, CHUNK=16, BLOCK_M=32, FEATURES=32),
        _alike(
            {
                64: Config.of(4, 1, CHUNK=32, BLOCK_M=64, FEATURES=64),
                128: Config.of(8, 1, CHUNK=16, BLOCK_M=64, FEATURES=64),
                256: Config.of(8, 1, CHUNK=16, BLOCK_M=64, FEATURES=64),
            },
            {size: Config.of(8, 1, CHUNK=16, BLOCK_M=64, FEATURES=64) for size in (64, 128, 256)},
        ),
    ),
    "row_gradients_projected": _everywhere(
        Config.of(4, 1, CHUNK=16, BLOCK_M=32, FEATURES=32),
        _alike(
            {
                64: Config.of(4, 1, CHUNK=32, BLOCK_M=64, FEATURES=64),
                128: Config.of(8, 1, CHUNK=16, BLOCK_M=64, FEATURES=64),
                256: Config.of(8, 1, CHUNK=16, BLOCK_M=64, FEATURES=64),
            },
            {size: Config.of(8, 1, CHUNK=16, BLOCK_M=16, FEATURES=16) for size in (64, 128, 256)},
        ),
    ),
    "key_gradients": _everywhere(
        Config.of(4, 1, CHUNK=16, BLOCK_M=32, FEATURES=32),
        _alike(
            {
                64: Config.of(4, 1, CHUNK=16, BLOCK_M=32, FEATURES=32),
                128: Config.of(8, 1, CHUNK=16, BLOCK_M=32, FEATURES=32),
                256: Config.of(8, 1, CHUNK=16, BLOCK_M=32, FEATURES=32),
            },
            {size: Config.of(8, 1, CHUNK=16, BLOCK_M=16, FEATURES=16) for size in (64, 128, 256)},
        ),
    ),
    "key_gradients_projected": _everywhere(
        Config.of(4, 1, CHUNK=16, BLOCK_M=32, FEATURES=32),
        _alike(
            {
                64: Config.of(4, 1, CHUNK=16, BLOCK_M=32, FEATURES=32),
                128: Config.of(4, 1, CHUNK=16, BLOCK_M=32, FEATURES=32),
                256: Config.of(8, 1, CHUNK=16, BLOCK_M=16, FEATURES=16),
            },
            {
                64: Config.of(8, 1, CHUNK=16, BLOCK_M=32, FEATURES=32),
                128: Config.of(8, 1, CHUNK=16, BLOCK_M=16, FEATURES=16),
                256: Config.of(8, 1, CHUNK=16, BLOCK_M=16, FEATURES=16),
            },
        ),
    ),
}
