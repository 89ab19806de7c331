"""Counting what really happens: matrix products, allocations, saved tensors."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..ops import IMPLEMENTATIONS


class Counter(TorchDispatchMode):
    """Counts FLOPs in matrix products and remembers the largest tensor that any operation made.

    It looks inside the package's own custom operators, so that nothing is believed of what they declare.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in IMPLEMENTATIONS:
            with self:
                return IMPLEMENTATIONS[func](*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            # Inside an operator nothing has been taken apart yet: matmul is still matmul.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        fresh = [t for t in tree_leaves(out) if isinstance(t, Tensor) and not t._is_view()]
        self.largest = max([self.largest, *(t.numel() for t in fresh)])
        return out


def count(run: Callable[[], Any]) -> Counter:
    """The counter after `run`, SDPA opened up into its matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), Counter() as counter:
        run()
    return counter


def saved_bytes(run: Callable[[], Any], besides: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the storages that `run` keeps for its backward pass, each counted once, `besides` excepted."""
    known = {t.untyped_storage()._cdata for t in besides}
    kept: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    del out
    return sum(kept.values())


@contextmanager
def untouched_rng(when: str) -> Iterator[None]:
    """Raise AssertionError if a global generator, torch's, Python's or NumPy's, moves inside; none has moved after."""
    numpy = sys.modules.get("numpy")

    def states() -> dict[str, str]:
        found = {"torch": str(torch.get_rng_state().tolist()), "Python": str(random.getstate())}
        return found if numpy is None else found | {"NumPy": str(numpy.random.get_state(legacy=False))}

    kept = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        # From a state that no one who reseeds would fall upon.
        for seed in (torch.manual_seed, random.seed, *([] if numpy is None else [numpy.random.seed])):
            seed(987_654_321)
        try:
            before = states()
            yield
            used = [name for name, state in states().items() if state != before[name]]
        finally:
            random.setstate(kept[0])
            if numpy is not None:
                numpy.random.set_state(kept[1])
    if used:
        raise AssertionError(f"{' and '.join(used)}'s global random generator was used {when}")
