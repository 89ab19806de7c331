"""What is screened of the block-sparse kernels: every config, with the options that ask most of the registers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from ..configs import ARCHITECTURES, SIZES
from ..screening import Variant
from .backward import delta_kernel, dkdv_kernel, dq_kernel
from .configs import CONFIGS
from .forward import forward_kernel
from .merge import merge_kernel, sum_kernel

_KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}

_PLAIN: dict[str, bool] = {}
_SEGMENTS = {"HAS_SEGMENT": True, "HAS_ROW_SEGMENT": True}
_PADDING = {"HAS_SEGMENT": True, "HAS_ANCHOR": True}
_FEATURES: dict[str, tuple[dict[str, bool], ...]] = {
    "band": (
        _PLAIN,
        _SEGMENTS,
        {**_PADDING, "SINKS": True},
    ),
    "dropout": ({"DROPOUT": True},),
    "strided": ({"RESUME": True, "OFFSET_ON_DEVICE": True, "STRIDED": True},),
    "table": (_PLAIN, {**_PADDING, "HAS_ROWS": True}, {**_PADDING, "RESUME": True, "GATHERED": True}),
}
_ELEMENTS = {2: "bf16", 4: "fp32"}
_BITS = ("PATTERN", "PATTERNS")
_POSITIONS = ("ITEMS", "BLOCKS", "MERGES", "Q_SEGMENT", "K_SEGMENT", "ANCHOR", "ROWS")
_SUMS = ("LSE", "DELTA", "SLOT_OUT", "SLOT_LSE", "SLOT_DQ", "SLOT_DK", "SLOT_DV", "SLOTS")
_ELEMENTWISE = ("Q", "K", "V", "GRAD", "OUT", "DQ", "DK", "DV")
_FLOATS = ("SCALE", "OUT_SCALE", "KEPT_SCALE")
_FLAGS = (
    "TABLE", "GATHERED", "WIDE", "SINKS", "RESUME", "HAS_ROWS", "HAS_ANCHOR", "HAS_SEGMENT", "HAS_ROW_SEGMENT",
    "OFFSET_ON_DEVICE", "DROPOUT",
)  # fmt: skip


def variants() -> list[Variant]:
    """Every config once, and on sm_90 with each option that its kernel must have registers for."""
    return [*_walking(), *_putting_together()]


def _walking() -> Iterator[Variant]:
    for name in CONFIGS:
        walk, kernel = name.split("_")
        for architecture in ARCHITECTURES:
            # The blocks of these are screened elsewhere, on other architectures.
            alike = walk in ("strided", "dropout")
            for size in SIZES if not alike else (64, 128) if architecture == 90 else ():
                options = _FEATURES[walk][: {64: 2, 128: None, 256: 1}[size] if architecture == 90 else 1]
                for features in options:
                    if not (features.get("SINKS") and kernel == "dkdv"):
                        yield _variant(name, kernel, architecture, 2, size, features)
        yield _variant(name, kernel, 86, 4, 128, _FEATURES[walk][-1])
        # Of the options the heaviest; the blocks of smaller heads are those of larger ones, or smaller.
        heaviest = _FEATURES[walk][-2 if name == "band_dkdv" else -1]
        yield _variant(name, kernel, 90, 4, 128, heaviest)
        if name == "table_forward":
            yield _variant(name, kernel, 90, 4, 64, heaviest)


def _variant(
    name: str, kernel: str, architecture: int, itemsize: int, size: int, features: dict[str, bool]
) -> Variant:
    config = CONFIGS[name][architecture, itemsize, size]
    constants: dict[str, Any] = {
        **config.constants, "ACC": tl.float32, "PRECISION": "ieee",
        "BLOCK_E": size, "BLOCK_EV": size, "EVEN_E": True, "EVEN_EV": True, "TABLE": name.startswith("table"),
        # Where they are 1, as they mostly are, Triton compiles for that.
        **({} if features.get("STRIDED") else {"STEP": 1}),
        **({} if features.get("GATHERED") else {"RUN": 1}),
    }  # fmt: skip
    if features.get("GATHERED"):
        del constants["STEP"]
    on_device = features.get("OFFSET_ON_DEVICE", False)
    return _launched(_KERNELS[kernel], architecture, itemsize, size, constants, features, on_device, config)


def _launched(
    kernel: Any,
    architecture: int,
    itemsize: int,
    size: int,
    constants: dict[str, Any],
    features: dict[str, bool],
    on_device: bool,
    config: Any,
) -> Variant:
    names = kernel.arg_names
    constants = {**constants, **{flag: features.get(flag, constants.get(flag, False)) for flag in _FLAGS}}
    constants = {name: value for name, value in constants.items() if name in names}
    element = f"*{_ELEMENTS[itemsize]}"
    resumed = "*fp32" if features.get("RESUME") else element

    def type_of(name: str) -> str:
        if name in _ELEMENTWISE:
            return resumed if name in ("OUT", "DQ", "DK", "DV") else element
        if name in _SUMS:
            return "*fp32"
        if name in _BITS:
            return "*i32"
        if name in _POSITIONS:
            return "*i64"
        if name == "OFFSET" and on_device:
            return "*i64"
        return "fp32" if name in _FLOATS else "i64" if name in ("SEED", "THRESHOLD") else "i32"

    return Variant(
        kernel=kernel,
        arch=architecture,
        head_size=size,
        signature={name: type_of(name) for name in names if name not in constants},
        constexprs=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        has_dot=kernel in _KERNELS.values(),
        wgmma=kernel is not forward_kernel or config["BLOCK_Q"] >= 64,
        multiples=[
            name
            for name in names
            if (name.startswith("stride_") or name in ("E", "EV", "WIDTH")) and name not in constants
        ],
    )


def _putting_together() -> Iterator[Variant]:
    common = {"ACC": tl.float32, "BLOCK_Q": 64, "BLOCK": 64, "BLOCK_EV": 128, "BLOCK_WIDTH": 128}
    ordinary = CONFIGS["table_forward"][90, 2, 64]
    for kernel in (delta_kernel, merge_kernel, sum_kernel):
        ones = {} if kernel is not sum_kernel else {"STEP": 1, "RUN": 1}
        yield _launched(kernel, 90, 2, 128, {**common, **ones}, _PADDING, False, ordinary)
