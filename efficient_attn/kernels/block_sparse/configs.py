"""The configs of the block-sparse kernels. Those of sm_90 for head sizes up to 128 spill nothing."""

from __future__ import annotations

from ..configs import ARCHITECTURES, INTERPRETER, SIZES, Config, Key, Table

_Row = tuple[int, int, int, int]
"""BLOCK_Q, BLOCK_K, warps, stages."""

_BAND: dict[str, dict[int, dict[int, _Row]]] = {
    "forward": {
        80: {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        86: {64: (128, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 1)},
        90: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
        100: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
    },
    "dq": {
        80: {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 4, 1)},
        86: {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 1)},
        90: {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 1)},
        100: {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 1)},
    },
    "dkdv": {
        80: {64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 4, 1)},
        86: {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 4, 1)},
        90: {64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 64, 8, 1)},
        100: {64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 64, 8, 1)},
    },
}

# Blocks of 64 for tables: a pattern's own blocks are rarely larger, and what a tile holds besides is wasted.
_TABLE: dict[str, dict[int, dict[int, _Row]]] = {
    "forward": {
        80: {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
        86: {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 1)},
        90: {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
        100: {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
    },
    "dq": {
        80: {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 4, 1)},
        86: {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 1)},
        90: {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 64, 8, 1)},
        100: {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 64, 8, 1)},
    },
    "dkdv": {
        80: {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 4, 1)},
        86: {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 4, 1)},
        90: {64: (64, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 64, 8, 1)},
        100: {64: (64, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 64, 8, 1)},
    },
}

# Drawing takes registers, so that blocks are smaller.
_DROPOUT: dict[str, dict[int, dict[int, _Row]]] = {
    "forward": _BAND["forward"],
    "dq": _TABLE["dq"] | {a: _TABLE["dq"][a] | {64: (64, 64, 8, 2)} for a in (90, 100)},
    "dkdv": _TABLE["dkdv"] | {a: _TABLE["dkdv"][a] | {64: (32, 64, 8, 2)} for a in (90, 100)},
}

# So does a step that is known at run time; and a residue class is a short sequence.
_STRIDED: dict[str, dict[int, dict[int, _Row]]] = {
    **_DROPOUT,
    "forward": _TABLE["forward"]
    | {a: _TABLE["forward"][a] | dict.fromkeys((64, 128), (64, 64, 8, 2)) for a in (90, 100)},
}

# fp32 is multiplied without tensor cores, from registers: small blocks, the same everywhere.
_SINGLE: dict[int, _Row] = {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 4, 1)}

# Smaller ones where a sum that was begun elsewhere, or a draw, takes registers as well.
_SMALL_SINGLE: dict[str, dict[int, _Row]] = {
    "table_forward": {64: (16, 32, 4, 1), 128: (16, 16, 8, 1)},
    "table_dkdv": {128: (16, 32, 4, 1)},
    "strided_forward": {128: (16, 16, 8, 1)},
    "dropout_dkdv": {128: (16, 16, 4, 1)},
}


def _config(row: _Row) -> Config:
    block_q, block_k, num_warps, num_stages = row
    return Config.of(num_warps, num_stages, BLOCK_Q=block_q, BLOCK_K=block_k)


def _entries(name: str, half: dict[int, dict[int, _Row]]) -> dict[Key, Config]:
    tiny = {
        (INTERPRETER, itemsize, size): _config((16, 32, 4, 1)) for itemsize in (2, 4, 8) for size in SIZES
    }
    rows = _SINGLE | _SMALL_SINGLE.get(name, {})
    single = {(a, 4, size): _config(rows[size]) for a in ARCHITECTURES for size in SIZES}
    return tiny | single | {(a, 2, size): _config(half[a][size]) for a in ARCHITECTURES for size in SIZES}


CONFIGS: Table = {
    f"{walk}_{kernel}": _entries(f"{walk}_{kernel}", half)
    for walk, configs in (("band", _BAND), ("table", _TABLE), ("strided", _STRIDED), ("dropout", _DROPOUT))
    for kernel, half in configs.items()
}
