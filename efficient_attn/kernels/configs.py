"""How a kernel is cut and launched: a table of data for each family, and how it is looked up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .availability import interpreted

INTERPRETER = 0
"""The architecture class of Triton's interpreter, whose blocks are small so that short tests cross many of them."""

ARCHITECTURES = (80, 86, 90, 100)
"""Classes of GPUs that share configs: A100; those with 99 KB of shared memory (8.6, 8.9, 12.x); Hopper; Blackwell."""

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may have."""

SIZES = (64, 128, 256)
"""Classes of head sizes: up to each of these."""


@dataclass(frozen=True)
class Config:
    """The blocks of a kernel, by the names of its constants, and how many warps and pipeline stages run it."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, num_warps: int, num_stages: int, **blocks: int) -> Config:
        """`Config.of(8, 2, BLOCK_Q=128, BLOCK_K=64)`."""
        return cls(tuple(sorted(blocks.items())), num_warps, num_stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    @property
    def constants(self) -> dict[str, int]:
        """The blocks, as keyword arguments of a launch."""
        return dict(self.blocks)

    @property
    def launch(self) -> dict[str, int]:
        """Everything, as keyword arguments of a launch."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


Key = tuple[int, int, int]
"""(architecture class, bytes of an element, class of the head size)."""

Table = Mapping[str, Mapping[Key, Config]]
"""Kernel -> key -> config."""


def architecture(capability: tuple[int, int]) -> int:
    """The class of a compute capability; what is not known gets the blocks that fit everywhere."""
    major, minor = capability
    if major == 8:
        return 80 if minor == 0 else 86
    return {9: 90, 10: 100}.get(major, 86)


def architecture_of(device: torch.device) -> int:
    """The class of the machine that runs kernels on tensors of `device`."""
    if interpreted() or device.type != "cuda":
        return INTERPRETER
    return architecture(torch.cuda.get_device_capability(device))


def size_class(*head_dims: int) -> int:
    """The class of the largest of these head sizes."""
    return next(size for size in SIZES if max(head_dims) <= size)


def lookup(table: Table, kernel: str, device: torch.device, dtype: torch.dtype, *head_dims: int) -> Config:
    """The config of `kernel` for tensors of this device, dtype and these head sizes."""
    return table[kernel][architecture_of(device), dtype.itemsize, size_class(*head_dims)]
