"""What is shipped of decoding, for the screen: the step of one token, of maps that press hardest on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..chunked_linear.configs import DECODE_BLOCKS, padded
from ..screening import Variant

_CASES = (("exp", 64, 64), ("favor_softmax", 128, 256), ("exp", 128, 128), ("favor_softmax", 256, 256))
"""(feature, head size, features)."""

_OPTIONAL = {"valid": "*i8", "exponent": "*fp32", "new_exponent": "*fp32", "projection": "*fp32"}


def variants() -> Iterator[Variant]:
    """In bf16; without products of matrices, so that what is listed for sm_90 is screened everywhere."""
    # Here, because listing what is shipped is what imports Triton.
    from .linear import linear_step_kernel

    for feature, width, size in _CASES:
        block_m, block_v = DECODE_BLOCKS
        constexprs: dict[str, Any] = {
            "GROUPS": 4, "FEATURE": feature, "E": width, "EV": width, "M": size,
            "BLOCK_M": block_m, "BLOCK_X": padded(width), "BLOCK_V": block_v,
        }  # fmt: skip
        if not feature.startswith("favor"):
            constexprs["projection"] = None
        signature = {}
        for name in linear_step_kernel.arg_names:
            if name in constexprs:
                continue
            if name in ("q", "k", "v", "out"):
                signature[name] = "*bf16"
            elif name in ("kv", "new_kv"):
                signature[name] = "*fp32"
            else:
                signature[name] = _OPTIONAL.get(name, "fp32" if name == "scale" else "i32")
        yield Variant(
            kernel=linear_step_kernel,
            arch=90,
            head_size=width,
            signature=signature,
            constexprs=constexprs,
            num_warps=4,
            num_stages=3,
            has_dot=False,
            multiples=[name for name in signature if name.endswith(("_batch", "_head"))],
        )
