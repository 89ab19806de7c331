"""The mechanisms, by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..inputs import check_positive
from .base import Mechanism
from .bigbird import BigBirdAttention
from .families import LinearMechanism, SoftmaxMechanism
from .flash import FlashAttention
from .full import FullAttention
from .linear import LinearAttention
from .linformer import LinformerAttention
from .longformer import LongformerAttention
from .performer import PerformerAttention
from .sliding_window import SlidingWindowAttention
from .sparse_transformer import SparseTransformerAttention

MECHANISMS: Mapping[str, type[Mechanism]] = MappingProxyType(
    {
        "full": FullAttention,
        "flash": FlashAttention,
        "sliding_window": SlidingWindowAttention,
        "longformer": LongformerAttention,
        "bigbird": BigBirdAttention,
        "sparse_transformer": SparseTransformerAttention,
        "linformer": LinformerAttention,
        "performer": PerformerAttention,
        "linear": LinearAttention,
    }
)
"""Every mechanism by its name; laws, benchmarks and tables follow from this table."""


def create_mechanism(
    name: str,
    *,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int | None = None,
    max_seq_len: int | None = None,
    is_causal: bool = False,
    **options: Any,
) -> Mechanism:
    """The mechanism `name`, given what any attention layer knows and the options of that mechanism.

    Args:
        name: a key of MECHANISMS.
        num_heads, head_dim, num_kv_heads, max_seq_len, is_causal: passed on where the constructor names them.
        options: further arguments of the constructor.
    Raises:
        ValueError: if the name is unknown (the message suggests one), a size is out of range, or an argument is
            missing.
        TypeError: if the name is no string, or the constructor has no such option.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, one of {list(MECHANISMS)}, got {name!r}")
    if name not in MECHANISMS:
        close = difflib.get_close_matches(name, MECHANISMS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name must be one of {list(MECHANISMS)}, got {name!r}{hint}")
    for size_name, size in (("num_heads", num_heads), ("head_dim", head_dim)):
        check_positive(size_name, size)
    for size_name, size in (("num_kv_heads", num_kv_heads), ("max_seq_len", max_seq_len)):
        if size is not None:
            check_positive(size_name, size)
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
    cls = MECHANISMS[name]
    parameters = inspect.signature(cls).parameters
    unknown = [option for option in options if option not in parameters]
    if unknown:
        raise TypeError(
            f"{name} has no option {', '.join(map(repr, unknown))}; it has {', '.join(parameters)}"
        )
    generic = {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "num_kv_heads": num_kv_heads,
        "max_seq_len": max_seq_len,
        "is_causal": is_causal,
    }
    given = {
        key: value for key, value in generic.items() if key in parameters and value is not None
    } | options
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in given]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}: pass it to create_mechanism as an option")
    return cls(**given)


__all__ = [
    "MECHANISMS",
    "BigBirdAttention",
    "FlashAttention",
    "FullAttention",
    "LinearAttention",
    "LinearMechanism",
    "LinformerAttention",
    "LongformerAttention",
    "Mechanism",
    "PerformerAttention",
    "SlidingWindowAttention",
    "SoftmaxMechanism",
    "SparseTransformerAttention",
    "create_mechanism",
]
