"""Counting the FLOPs of anything that runs, in the basis "torch", without silent zeros."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

FORMULAS: dict[str, Callable[..., int]] = {}
"""FLOPs of the package's own operators, "efficient_attn::name": a function of the arguments, tensors as shapes.

`efficient_attn.ops` fills it in: what multiplies stands above what it costs.
"""

# What multiplies matrices in torch, by the words of the operator's name; and what has such a word and does not.
_MULTIPLIES = re.compile(
    r"mm$|mm_|attention|conv(?!ert)|linear(?!1d)|mv_?$|dot|^addr|rnn|lstm|gru|matmul|cdist|euclidean_dist|geqrf|transformer|(^|_)lu_|"
    r"linalg|cholesky|solve|svd|qr$|inverse|fft|semi_structured|pinv|hspmm|smm|matrix_(exp|power)"
)
_DOES_NOT = re.compile(
    r"upsample|linalg_(vector_norm|diagonal|cross|vander|_powsum|check_errors)|_linalg_check_errors|relu|resolve|reorder|"
    r"fft(freq|shift)|cufft|flatten_weight|slice_inverse|_search$|_pack|prepack"
)
_HARMLESS_NAMESPACES = ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional")


@dataclass(frozen=True)
class FlopCount:
    """What `count_flops` counted.

    Attributes:
        total: FLOPs in matrix products, 2 for each multiply-accumulate.
        by_operator: the same by operator, such as "aten::mm".
        unknown: calls of operators whose FLOPs are not known, hence not counted; empty if `strict`.
    """

    total: int
    by_operator: dict[str, int]
    unknown: dict[str, int]


def count_flops(run: Callable[..., Any], *args: Any, strict: bool = True) -> FlopCount:
    """The FLOPs in matrix products of `run(*args)`, in the basis "torch": what the operators that ran multiply.

    Like torch.utils.flop_counter.FlopCounterMode, but for what that counts as nothing: scaled_dot_product_attention
    on a CPU (pytorch#195460), products with a vector, products in place, and custom operators. Attention in torch's
    kernels is counted as if nothing were masked, causal or not, as torch does. Nothing in torch is patched.
    Kernels that are launched without an operator cannot be seen by anyone. flex_attention cannot run under a counter.

    Args:
        run: a model or a function; for a backward pass, a function that calls it.
        args: its arguments, on any device, "meta" included.
        strict: raise for operators that multiply and have no formula, rather than list them.
    Raises:
        NotImplementedError: if `strict`, naming the operators; torch.utils.flop_counter.register_flop_formula
            teaches torch, and so this function, yours.
        TypeError: if run cannot be called.
    """
    if not callable(run):
        raise TypeError(f"run must be a module or a function, got {type(run).__name__}")
    with _Counter() as counter:
        run(*args)
    if strict and counter.unknown:
        names = ", ".join(sorted(counter.unknown))
        raise NotImplementedError(
            f"no formula says how many FLOPs these take: {names}; teach torch with "
            "torch.utils.flop_counter.register_flop_formula, or pass strict=False to leave them out"
        )
    return FlopCount(sum(counter.flops.values()), dict(counter.flops), dict(counter.unknown))


class _Counter(TorchDispatchMode):
    """Sums formulas over the operators that reach the dispatcher, each taken apart where torch can."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self._formulas = _formulas_of_torch()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        formula = self._formula(func, name)
        if formula is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops[name] += formula(*args, **kwargs, out_val=out)
        elif _multiplies(name):
            self.unknown[name] += 1
        return out

    def _formula(self, func: Any, name: str) -> Callable[..., int] | None:
        if name in FORMULAS:
            return _of_shapes(FORMULAS[name])
        formula = self._formulas.get(func._overloadpacket)
        if formula is None and name.endswith("_") and name.startswith("aten::"):
            packet = getattr(torch.ops.aten, name.removeprefix("aten::")[:-1], None)
            formula = self._formulas.get(packet)
        return formula


def _multiplies(name: str) -> bool:
    """Whether the operator may well multiply matrices. Of other people's operators nothing is known."""
    namespace, _, word = name.partition("::")
    if namespace not in _HARMLESS_NAMESPACES:
        return True
    return namespace == "aten" and bool(_MULTIPLIES.search(word)) and not _DOES_NOT.search(word)


def _formulas_of_torch() -> dict[Any, Callable[..., int]]:
    """torch's own formulas, and those that it lacks.

    Imported here because torch.utils.flop_counter imports Triton.
    """
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten
    return {
        **{operator: _of_shapes(formula) for operator, formula in _LACKING.items()},
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
            aten._scaled_dot_product_flash_attention
        ],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
            aten._scaled_dot_product_flash_attention_backward
        ],
        **flop_registry,
    }


def _of_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    """`formula`, which takes shapes, as a function of tensors."""

    def of_tensors(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        shaped = tree_map(lambda x: x.shape if isinstance(x, Tensor) else x, (args, kwargs))
        return formula(*shaped[0], **shaped[1])

    return of_tensors


_LACKING: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: lambda matrix, vector: 2 * matrix[0] * matrix[1],
    torch.ops.aten.addmv: lambda bias, matrix, vector, **scales: 2 * matrix[0] * matrix[1],
    torch.ops.aten.dot: lambda a, b: 2 * a[0],
    torch.ops.aten.vdot: lambda a, b: 2 * a[0],
    torch.ops.aten.addr: lambda bias, a, b, **scales: 2 * a[0] * b[0],
    torch.ops.aten.addbmm: lambda bias, a, b, **scales: 2 * a[0] * a[1] * a[2] * b[2],
}
