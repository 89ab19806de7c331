"""What devices can do, each figure with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..complexity.cost import check_choice
from ..inputs import check_positive

GB = 10**9
GIB = 2**30
KINDS = ("datasheet", "measured")
TYPES = ("cuda", "rocm", "cpu")


@dataclass(frozen=True)
class Device:
    """A device, as far as estimates need it.

    Args:
        name: what it is called.
        flops_per_second: of dense matrix products, without structured sparsity, in `dtype`.
        bytes_per_second: between the device and its main memory.
        memory_bytes: of main memory.
        dtype: in which `flops_per_second` holds, such as "bfloat16".
        source: where the figures come from: a document, or how they were measured.
        type: "cuda" (NVIDIA), "rocm" (AMD) or "cpu": which backends are planned for; the kernels run on "cuda".
        kind: "datasheet": peaks that no program exceeds, so times are lower bounds. "measured": by `calibrate`
            or by you, so times are estimates.
        mechanism_flops_per_second: what a mechanism reached of `cost`'s FLOPs in the basis "model", by the name of
            its class, where that was measured; others are taken to reach `flops_per_second`.
    Raises:
        ValueError: if a figure is not positive, or `kind` is unknown.
        TypeError: if a figure is not an int, or a text is not a str.
    """

    name: str
    flops_per_second: int
    bytes_per_second: int
    memory_bytes: int
    dtype: str = field(default="bfloat16", kw_only=True)
    source: str = field(kw_only=True)
    type: str = field(default="cuda", kw_only=True)
    kind: str = field(default="measured", kw_only=True)
    mechanism_flops_per_second: Mapping[str, int] = field(default_factory=dict, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        for name in ("name", "dtype", "source"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a str, got {getattr(self, name)!r}")
        for name in ("flops_per_second", "bytes_per_second", "memory_bytes"):
            check_positive(name, getattr(self, name))
        rates = self.mechanism_flops_per_second
        if not isinstance(rates, Mapping):
            raise TypeError(f"mechanism_flops_per_second must be a mapping, got {rates!r}")
        for name, rate in rates.items():
            check_positive(f"mechanism_flops_per_second[{name!r}]", rate)
        check_choice("type", self.type, TYPES)
        check_choice("kind", self.kind, KINDS)

    @property
    def balance(self) -> float:
        """FLOPs per byte at which compute and traffic take equally long: the ridge of the roofline."""
        return self.flops_per_second / self.bytes_per_second


def _datasheet(name: str, tflops: int, gb_per_second: int, gb: int, source: str) -> Device:
    return Device(
        name, tflops * 10**12, gb_per_second * GB, gb * GB, source=f"NVIDIA, {source}", kind="datasheet"
    )


_ALL = (
    _datasheet("RTX 3090", 71, 936, 24, "Ampere GA102 GPU architecture whitepaper"),
    _datasheet("RTX 4090", 165, 1008, 24, "Ada GPU architecture whitepaper"),
    _datasheet("A100 40GB", 312, 1555, 40, "A100 Tensor Core GPU datasheet"),
    _datasheet("A100 80GB", 312, 2039, 80, "A100 Tensor Core GPU datasheet, SXM"),
    _datasheet("H100", 989, 3350, 80, "H100 Tensor Core GPU datasheet, SXM; half the figure with sparsity"),
    _datasheet("H200", 989, 4800, 141, "H200 Tensor Core GPU datasheet, SXM; half the figure with sparsity"),
    _datasheet("B200", 2250, 8000, 180, "DGX B200 datasheet, a GPU of eight; half the figure with sparsity"),
    Device(
        "MI300X", 1307 * 10**12, 5300 * GB, 192 * GB,
        source="AMD, Instinct MI300X accelerator datasheet, without sparsity", type="rocm", kind="datasheet",
    ),
)  # fmt: skip

DEVICES: Mapping[str, Device] = MappingProxyType({device.name: device for device in _ALL})
"""Accelerators by name, with their datasheets' peaks in dense bfloat16. A CPU is measured: see `calibrate`."""
