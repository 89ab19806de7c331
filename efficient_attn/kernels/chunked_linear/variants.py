"""What is shipped, for the screen: every config, for the widths and feature maps that press hardest on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..configs import ARCHITECTURES, Config
from ..screening import Variant
from .configs import TABLE, named

_NUMBERS = {
    "valid": "*i8", "segment": "*i32", "row_shift": "*fp32", "shift": "*fp32", "exponent": "*fp32",
    "peak": "*fp32", "projection": "*fp32", "states": "*fp32", "part": "*fp32", "part_total": "*fp32",
    "part_v": "*fp32",
    "total": "*fp32", "delta": "*fp32", "factors": "*fp32", "scale": "fp32",
}  # fmt: skip
_INPUTS = ("q", "k", "v", "x", "out", "lost", "grad", "dq", "dk", "dv")
_ALIGNED = ("batch", "head", "row", "feature", "span")  # the ends of strides' names, and what configs say

_CASES = (
    ("elu", 64, 64),
    ("exp", 64, 64),
    ("elu", 128, 128),
    ("exp", 128, 128),
    ("favor_softmax", 64, 256),
    ("favor_softmax", 128, 512),
    ("exp", 256, 256),
)
"""(feature, head size, features): those of sm_90; of the others, the heaviest of each head size."""

_LADEN = (
    ("elu", 64, 64),
    ("squared_relu", 64, 64),
    ("exp", 64, 64),
    ("exp", 128, 128),
    ("favor_softmax", 64, 256),
    ("favor_softmax", 128, 512),
)
"""Those that are screened on sm_90 with everything that a call may have besides: padding, documents, grouped heads."""

_EXACT = (("exp", 128, 128), ("favor_softmax", 64, 256), ("favor_softmax", 128, 512))
"""Those of fp32, and of fp16, which is multiplied as tf32: with all of that, and the same configs for both."""

_OPTIONS: dict[str, Any] = {"given": ("valid", "segment", "offset"), "GROUPS": 4}

_KNOWN_SPILLS = {
    ("key_gradients", "fp32", "exp", 128): 288,
    ("key_gradients", "fp32", "favor_softmax", 128): 328,
    ("key_gradients", "fp16", "favor_softmax", 128): 64,
    ("row_gradients", "fp32", "favor_softmax", 128): 16,
}
"""Of (kernel, element, feature, head size): what has 4 bytes is multiplied with whole heads in registers."""

_ELSEWHERE = (("exp", 128, 128), ("favor_softmax", 128, 512), ("exp", 256, 256))


def _precision(element: str) -> str:
    return {"bf16": "bf16", "fp16": "tf32", "fp32": "ieee"}[element]


def build(
    kernel: Any,
    name: str,
    arch: int,
    element: str,
    feature: str,
    width: int,
    size: int,
    given: tuple[str, ...] = (),
    **extra: Any,
) -> Variant:
    """The launch of `kernel` for heads of `width`, with the config of that name; `given` are optional tensors."""
    bytes_ = 2 if element == "bf16" else 4
    key = arch if arch in ARCHITECTURES else 86, bytes_, next(s for s in (64, 128, 256) if width <= s)
    config: Config = TABLE[named(name, feature.startswith("favor"))][key]
    constants = dict(config.constants)
    features = min(constants.pop("FEATURES", size), size)
    constants["BLOCK_M"] = block = min(constants["BLOCK_M"], size)
    constants |= {"BLOCK_X": width, "NUM_BLOCKS": -(-features // block), "E": width, "EV": width, "M": size}
    constants.setdefault("BLOCK_V", width)
    constants["BLOCK_V"] = min(constants["BLOCK_V"], width)
    constants |= {
        "BEGIN": features == size,
        "END": True,
        "FEATURE": feature,
        "PRECISION": _precision(element),
    }
    constants |= {"GROUPS": 1, "IS_CAUSAL": True, "STRICT": False, "REVERSE": False, **extra}
    favor, exponent = feature.startswith("favor"), feature in ("favor_softmax", "exp", "squared_relu")
    absent = {"valid", "segment", "factors"} - {*given}
    absent |= set() if favor else {"projection"}
    absent |= set() if exponent else {"row_shift", "shift", "exponent", "peak"}
    if features == size:
        absent |= {"part", "part_total", "part_v"}
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for parameter in kernel.arg_names:
        if parameter in absent:
            constexprs[parameter] = None
        elif parameter in constants:
            constexprs[parameter] = constants[parameter]
        elif parameter in _INPUTS:
            signature[parameter] = f"*{element}"
        elif parameter in given and parameter == "offset":
            signature[parameter] = "*i64"
        elif parameter == "projection":
            signature[parameter] = "*bf16" if element == "bf16" else "*fp32"
        else:
            signature[parameter] = _NUMBERS.get(parameter, "i32")
    return Variant(
        kernel=kernel,
        arch=arch,
        head_size=width,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        has_dot=name != "exponents" or favor,
        known_spills=_KNOWN_SPILLS.get((name, element, feature, width), 0),
        # No product of this kernel has more rows than features or tokens.
        wgmma=name != "row_gradients" or max(config["BLOCK_M"], config["CHUNK"]) >= 64,
        multiples=[
            name for name in signature if name.split("_")[-1] in _ALIGNED and signature[name] == "i32"
        ],
    )


def variants() -> Iterator[Variant]:
    """Every kernel in bf16 on every architecture, in the other dtypes and with all options on sm_90."""
    # Here, because listing what is shipped is what imports Triton.
    from .backward import delta_kernel, row_gradients_kernel
    from .features import exponents_kernel
    from .forward import rows_kernel
    from .key_gradients import key_gradients_kernel
    from .states import key_states_kernel, row_states_kernel, running_sum_kernel

    walks = {
        "rows": (rows_kernel,),
        "row_gradients": (row_gradients_kernel,),
        "key_gradients": (key_gradients_kernel,),
        "states": (key_states_kernel, row_states_kernel),
        "exponents": (exponents_kernel,),
    }
    for name, kernels in walks.items():
        for kernel in kernels:
            for arch in (90, 80, 86, 89, 100):
                for feature, width, size in _CASES if arch == 90 else _ELSEWHERE:
                    if name != "exponents" or feature in ("exp", "favor_softmax"):
                        yield build(kernel, name, arch, "bf16", feature, width, size)
            if name == "exponents":
                yield build(kernel, name, 90, "fp32", "favor_softmax", 64, 256, **_OPTIONS)
                continue
            # The sums over spans have few registers to lose.
            sums = name == "states"
            for feature, width, size in _LADEN[-3:] if sums else _LADEN:
                yield build(kernel, name, 90, "bf16", feature, width, size, **_OPTIONS)
            for element in ("fp16", "fp32"):
                for feature, width, size in _EXACT[-1:] if sums else _EXACT:
                    yield build(kernel, name, 90, element, feature, width, size, **_OPTIONS)
    yield from _elementwise(delta_kernel, running_sum_kernel)


def _elementwise(delta_kernel: Any, running_sum_kernel: Any) -> Iterator[Variant]:
    """What has no products, and is cut in one way."""
    for width in (64, 128, 256):
        constants: dict[Any, dict[str, Any]] = {
            delta_kernel: {"EV": width, "CHUNK": 64, "BLOCK_V": width},
            running_sum_kernel: {"SIZE": width * (width + 1), "REVERSE": True, "KEEP": True, "BLOCK": 512},
        }
        for kernel, constexprs in constants.items():
            names = [name for name in kernel.arg_names if name not in constexprs]
            signature = {name: "*bf16" if name in _INPUTS else _NUMBERS.get(name, "i32") for name in names}
            yield Variant(
                kernel=kernel,
                arch=90,
                head_size=width,
                signature=signature,
                constexprs=constexprs,
                num_warps=4,
                num_stages=3,
                has_dot=False,
                multiples=[name for name in names if name.split("_")[-1] in _ALIGNED],
            )
