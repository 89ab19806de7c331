"""Counting what really happens: matrix products, allocations, saved tensors."""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
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


class Peak(TorchDispatchMode):
    """The most bytes that are allocated at once inside, by operators; `known` tensors do not count.

    Storages are counted from the operator that makes them until they are freed, whatever the device. What a kernel
    takes and gives back before it returns is not seen, but in the package's own operators, which are opened.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.bytes = 0
        self._counted = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in IMPLEMENTATIONS:
            with self:
                return IMPLEMENTATIONS[func](*args, **kwargs)
        out = func(*args, **kwargs)
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if storage._cdata not in self._counted:
                self._counted.add(storage._cdata)
                self.live += storage.nbytes()
                self.bytes = max(self.bytes, self.live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, address: int, size: int) -> None:
        self._counted.discard(address)
        self.live -= size


def peak_bytes(mechanism: Callable[..., Tensor], inputs: Sequence[Tensor], learnt: Sequence[Tensor]) -> int:
    """The peak of a forward pass, and of the backward pass if the inputs want gradients; what is given not counted."""
    training = any(x.requires_grad for x in inputs)
    grad = torch.ones_like(mechanism(*inputs))
    with torch.set_grad_enabled(training), Peak([*inputs, *learnt, grad]) as peak:
        out = mechanism(*inputs)
        if training:
            torch.autograd.grad(out, [*inputs, *(x for x in learnt if x.requires_grad)], grad)
    return peak.bytes


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
