"""Strategies: which cases there are, simple choices first, for that is the way in which hypothesis shrinks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st

from efficient_attn.mechanisms import MECHANISMS, Mechanism

from .case import Case
from .contents import FILLERS

T = TypeVar("T")

DTYPES = ("float64", "float64", "float32", "float32", "bfloat16", "float16")
KEY_MASKS = ("all", "holes", "left", "right", "left right", "left right holes", "one", "holes row", "nothing")
SEGMENTS = ("ascending", "descending", "padded", "interleaved")
BIASES = ("float", "infinite", "bool")
LAYOUTS = ("transposed", "columns", "sliced", "expanded")
SIZES = (2, 1, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 64, 65, 100)
"""Of windows, blocks and strides."""
SHORT = (0, 0, *range(1, 19), *range(1, 19), *range(1, 19))
LONG = (31, 32, 33, 61, 63, 64, 65, 66, 97, 127, 128, 129, 130, 151, 192, 193, 199)
"""Lengths about the tiles and chunks of the kernels, and primes."""
VERY_LONG = (1023, 1024, 1025, 1026, 1100)
"""About the keys that a tile takes at once."""
FEW = 2500
"""Batch x heads x pairs x head size up to which the matrix is compared with the paper's definition in loops."""

CHANCES = {
    "steps": 35,
    "future": 50,
    "padding": 50,
    "neighbours": 30,
    "paper": 60,
    "gradients": 45,
    "derivative": 30,
    "repeat": 10,
}
"""How often, in per cent, a check is made where it can be made; `output` always is."""


@cache
def _table(name: str, choices: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    return st.sampled_from([(name, choice) for choice in choices])


class Chooser:
    """Named choices. No two are alike to hypothesis, which would else spend most of its cases on copying one choice
    to the place of another, and those are the same case again more often than not."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw

    def of(self, name: str, *choices: T) -> T:
        """One of `choices`, the simplest first; repeat what should come more often."""
        return self._draw(_table(name, choices))[1]

    def seed(self) -> int:
        """A number to make contents from."""
        return self._draw(st.integers(0, (1 << 16) - 1))

    def chance(self, name: str, percent: int) -> bool:
        """True in that many of 100 cases."""
        return self.of(name, *[False] * ((100 - percent) // 5), *[True] * (percent // 5))


def _softmax(c: Chooser) -> dict[str, Any]:
    return {"is_causal": c.of("is_causal", False, True)}


def _window(c: Chooser) -> dict[str, Any]:
    sinks = c.of("num_sinks", 0, 0, 1, 2, 5, 70)
    return {"window_size": c.of("window_size", *SIZES), "num_sinks": sinks, **_softmax(c)}


def _longformer(c: Chooser) -> dict[str, Any]:
    number, listed = c.of("globals", 0, 1, 2, 3, 6), c.of("listed", False, True)
    positions = tuple(c.of(f"global{i}", *range(21), *range(21, 150, 9)) for i in range(min(number, 4)))
    tokens = positions if listed else number
    return {"window_size": c.of("window_size", *SIZES), "global_tokens": tokens, **_softmax(c)}


def _bigbird(c: Chooser) -> dict[str, Any]:
    return {
        "block_size": c.of("block_size", *SIZES),
        "num_window_blocks": c.of("num_window_blocks", 1, 3, 3, 5),
        "num_global_blocks": c.of("num_global_blocks", 0, 1, 1, 2),
        "num_random_blocks": c.of("num_random_blocks", 0, 1, 2, 3, 6),
        "seed": c.of("draw", *range(6)),
        **_softmax(c),
    }


def _sparse_transformer(c: Chooser) -> dict[str, Any]:
    pattern, stride = c.of("pattern", "strided", "fixed"), c.of("stride", *SIZES)
    summary = c.of("summary", *[1] * 9, *range(1, stride + 1)) if pattern == "fixed" else 1
    return {"pattern": pattern, "stride": stride, "summary": summary, **_softmax(c)}


def _linformer(c: Chooser) -> dict[str, Any]:
    return {
        "rank": c.of("rank", 1, 2, 3, 5, 8, 20),
        "sharing": c.of("sharing", "headwise", "key-value", "none"),
    }


def _performer(c: Chooser) -> dict[str, Any]:
    return {
        "num_features": c.of("num_features", None, 1, 2, 5, 16, 31),
        "kernel": c.of("kernel", "softmax", "softmax", "relu"),
        "seed": c.of("draw", *range(6)),
        **_softmax(c),
    }


def _linear(c: Chooser) -> dict[str, Any]:
    return {"feature_map": c.of("feature_map", "elu", "elu", "exp", "relu", "squared_relu"), **_softmax(c)}


OPTIONS: dict[str, Callable[[Chooser], dict[str, Any]]] = {
    "full": _softmax,
    "flash": _softmax,
    "sliding_window": _window,
    "longformer": _longformer,
    "bigbird": _bigbird,
    "sparse_transformer": _sparse_transformer,
    "linformer": _linformer,
    "performer": _performer,
    "linear": _linear,
}
"""What each mechanism's constructor may be given, besides what the sizes decide."""


def _sizes(c: Chooser) -> dict[str, int]:
    kv_heads, group = c.of("kv_heads", 1, 1, 2, 3), c.of("group", 1, 1, 2, 3)
    head_dim = c.of("head_dim", 1, 2, 3, 4, 5, 8, 8, 16, 17)
    v_head_dim = c.of("v_head_dim", *[0] * 8, 1, 2, 3, 7, 12)
    return {
        "batch": c.of("batch", 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0),
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "v_head_dim": v_head_dim or head_dim,
    }


def _lengths(c: Chooser, options: dict[str, Any], sizes: dict[str, int], square: bool) -> dict[str, Any]:
    """Mostly short, else about a size that matters to the mechanism or to a kernel."""
    own = [n for n in options.values() if isinstance(n, int) and n > 1]
    near = [m * n + d for n in own for m in (1, 2) for d in (-1, 0, 1)]
    rows = sizes["batch"] * sizes["heads"]
    table = sorted(n for n in (*SHORT, *near, *LONG) if n <= (200 if rows <= 6 else 67))
    kv_len, q_len = c.of("kv_len", *table), c.of("q_len", *table)
    oblong, placed, tensor = c.chance("oblong", 40), c.chance("placed", 35), c.chance("tensor", 50)
    offset, huge = c.of("q_offset", *range(211)), c.of("huge", *[0] * 40, *VERY_LONG)
    if square or not oblong:
        q_len = kv_len
    elif huge and rows <= 2:
        q_len, kv_len = min(q_len, 3), huge
    lengths: dict[str, Any] = {"q_len": q_len, "kv_len": kv_len}
    if not square and (placed or (options.get("is_causal") and q_len > kv_len)):
        lengths |= {"q_offset": offset % (kv_len + 4), "tensor_offset": tensor}
    return lengths


def _chunks(c: Chooser, length: int) -> tuple[int, ...]:
    if c.chance("singles", 25) and length <= 40:
        return (1,) * length
    cuts = [c.of(f"chunk{i}", *range(201)) for i in range(c.of("chunks", 0, 1, 1, 2, 2, 3, 4, 5))]
    return tuple(b - a for a, b in pairwise([0, *sorted(cut % (length + 1) for cut in cuts), length]))


@cache
def _backends(cls: type[Mechanism]) -> tuple[str, ...]:
    """Those that can run something on this machine."""
    x = torch.randn(1, 1, 8, 8)
    problem = cls.examples(8, 1, 8)[0]._problem(x, x, x, None, None, None, None)
    return tuple(backend.name for backend in cls.backends if not backend.refuse(problem))


def _contents(c: Chooser, cls: type[Mechanism]) -> dict[str, Any]:
    limits = [x for x in (1.0, 30.0, 1000.0, 65504.0) if x <= cls.largest_input]
    magnitudes = tuple(c.of(f"magnitude of {name}", *limits) for name in "qkv")
    large, shift = c.chance("large", 25), c.of("shift", *[0.0] * 12, -6.0, 6.0)
    return {
        "dtype": c.of("dtype", *DTYPES),
        "cast": c.chance("cast", 50),
        "backend": c.of("backend", "auto", "auto", *_backends(cls)),
        "training": c.chance("training", 20),
        "layout": c.of("layout", *[""] * 4, *LAYOUTS),
        "seed": c.seed(),
        "magnitudes": magnitudes if large else (1.0, 1.0, 1.0),
        "shift": 0.0 if large else shift,
    }


def _fit(c: Chooser, case: dict[str, Any], options: dict[str, Any], cls: type[Mechanism]) -> None:
    """Complete `options` with what depends on the sizes, and with what most mechanisms have."""
    takes = inspect.signature(cls).parameters
    room, scale = c.of("room", 0, 0, 1, 9), c.of("scale", *[None] * 9, 0.3, 1.0, 0.01)
    if "head_dim" in takes:
        options["head_dim"] = case["head_dim"]
    if "max_seq_len" in takes:
        options["max_seq_len"] = max(1, case["kv_len"] + room)
    if "num_heads" in takes:
        options |= {"num_heads": case["heads"], "num_kv_heads": case["kv_heads"]}
    if scale:
        options["scale"] = scale
    if c.chance("dropout", 10) and "dropout_p" in takes and not case["training"]:
        options["dropout_p"] = 0.5


def _masks(c: Chooser, mechanism: Mechanism, stepped: bool) -> dict[str, str]:
    key_mask, segments = c.of("key_mask", *[""] * 7, *KEY_MASKS), c.of("segments", *[""] * 7, *SEGMENTS)
    bias, masked = c.of("bias", *[""] * 7, *BIASES), c.of("masked", *FILLERS)
    segments = segments if mechanism.supports_segments and not stepped else ""
    return {
        "key_mask": key_mask,
        "segments": segments,
        "bias": bias if mechanism.supports_bias and not stepped else "",
        "masked": masked if key_mask or segments else "",
    }


def _applicable(case: dict[str, Any], options: dict[str, Any], stepped: bool) -> dict[str, bool]:
    """Whether a check says anything about the case; `steps` is decided before there is one."""
    pairs = case["batch"] * case["heads"] * case["q_len"] * case["kv_len"]
    # A difference steps over the kinks of relu.
    smooth = "relu" not in (options.get("kernel"), options.get("feature_map"))
    return {
        "steps": stepped,
        "future": options.get("is_causal", False) and case["kv_len"] > 1,
        "padding": bool(case["key_mask"] or case["segments"]),
        "neighbours": case["batch"] > 1,
        "paper": pairs * case["head_dim"] <= FEW,
        "derivative": smooth and case["dtype"] == "float64" and case["magnitudes"] == (1.0, 1.0, 1.0),
    }


@st.composite
def cases(draw: Callable[[st.SearchStrategy[Any]], Any], mechanism: str) -> Case:
    """A case of the mechanism of that name. What is drawn hardly depends on what was: then shrinking goes far."""
    c, cls = Chooser(draw), MECHANISMS[mechanism]
    wanted = [name for name, percent in CHANCES.items() if c.chance(name, percent)]
    options, case = OPTIONS[mechanism](c), _sizes(c)
    stepped = options.get("is_causal", False) and "steps" in wanted
    case |= _contents(c, cls) | _lengths(c, options, case, stepped)
    chunks, cut = _chunks(c, case["kv_len"]), c.of("cut", *range(201))
    _fit(c, case, options, cls)
    case |= _masks(c, cls(**options), stepped)
    applies = _applicable(case, options, stepped)
    checks = ("output", *(name for name in wanted if applies.get(name, True)))
    if stepped:
        case["chunks"] = chunks
    if "future" in checks:
        case["cut"] = 1 + cut % (case["kv_len"] - 1)
    return Case(mechanism, options, checks, **case)
