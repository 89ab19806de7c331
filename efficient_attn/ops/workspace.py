"""Memory that loops over blocks use again: fresh pages cost more than the products that go into them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Buffers by name on one device; each holds until the next request for its name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of that shape."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            held = self._held[name] = torch.empty(size, dtype=dtype, device=self._device)
        return held[:size].view(shape)

    def product(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        """The batched product x @ y."""
        return torch.bmm(x, y, out=self.take(name, len(x), x.shape[1], y.shape[2], dtype=x.dtype))
