"""Every shipped kernel, compiled for the GPUs that it is shipped for, where there is none.

Triton compiles for a target that is only named, and NVIDIA's tools, which come with it, say of the result how many
registers it takes, whether they spill into memory, and which instructions it is made of. So a config that would fail,
spill or leave the tensor cores idle is noticed without a GPU. `python -m efficient_attn.kernels.screening` prints all.

Each family lists what it ships as `variants()` in a module `variants.py` of its own. Triton is imported in functions
alone, and must not interpret: this needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .configs import SHARED_MEMORY

FAMILIES = ("block_sparse", "chunked_linear", "decode")

SPILL_FREE_UP_TO = 128
"""The head size up to which nothing may spill on sm_90, but for what a variant says that it spills."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way in which a kernel is launched.

        Variant(kernel=forward_kernel, arch=90, head_size=128, num_warps=8, num_stages=2, has_dot=True,
                signature={"Q": "*bf16", "stride": "i32"}, constexprs={"BLOCK_Q": 128, "Seed": None})

    `signature` and `constexprs` together name every parameter of the kernel, once. A pointer that is not given (None)
    is a constexpr, as it is for Triton's launcher. Pointers count as aligned to 16 bytes, as torch's are; `multiples`
    names the integers that are multiples of 16 in ordinary launches (strides and lengths, mostly).
    """

    kernel: Any
    """The `@triton.jit` function."""
    arch: int
    """80, 86, 89, 90 or 100."""
    head_size: int
    """The largest head size that this is launched for."""
    signature: Mapping[str, str]
    """Parameter -> Triton's name of its type: "*bf16", "*i64", "i32", "fp32" ..."""
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    has_dot: bool
    """Whether it multiplies matrices, by `tl.dot`."""
    known_spills: int = 0
    """Bytes that it spills where no config was found that spills less; more is a fault."""
    wgmma: bool = True
    """Whether such products must be Hopper's own on sm_90, which take 64 rows; False for those of fewer."""
    multiples: Sequence[str] = field(default=())

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def element(self) -> str:
        """The element type of its first floating pointer."""
        types = (type_.removeprefix("*") for type_ in self.signature.values() if type_.startswith("*"))
        return next((type_ for type_ in types if type_ in ("fp16", "bf16", "fp32")), "none")

    @property
    def needs_tensor_cores(self) -> bool:
        """Whether Hopper's matrix instructions must appear: fp32 is multiplied exactly, without them."""
        return self.arch == 90 and self.has_dot and self.wgmma and self.element in ("fp16", "bf16")

    @property
    def config(self) -> str:
        """What tells it from the other variants of its kernel."""
        given = [
            (name, value)
            for name, value in self.constexprs.items()
            if value is not None and value is not False
        ]
        constants = [name if value is True else f"{name}={value}" for name, value in given]
        return f"{' '.join(constants)} warps={self.num_warps} stages={self.num_stages}"


@dataclass(frozen=True, kw_only=True)
class Screened:
    """What a variant compiled to."""

    kernel: str
    arch: int
    element: str
    head_size: int
    config: str
    registers: int = 0
    shared: int = 0
    """Bytes of shared memory for one program."""
    spills: int = 0
    """Bytes of stack for one thread: what did not fit into its registers."""
    hgmma: int = 0
    """How many of Hopper's matrix instructions there are."""
    seconds: float = 0.0
    faults: tuple[str, ...] = ()
    """Why it must not be shipped, in words."""

    def __str__(self) -> str:
        figures = f"{self.registers:4} {self.shared:7} {self.spills:6} {self.hgmma:5} {self.seconds:5.1f}"
        row = f"{self.kernel:24} {self.arch:4} {self.element:5} {self.head_size:4} {figures}  {self.config}"
        return "\n".join([row, *(f"    FAULT: {fault}" for fault in self.faults)])


_COLUMNS = f"{'regs':>4} {'shared':>7} {'spills':>6} {'HGMMA':>5} {'s':>5}"
HEADING = f"{'kernel':24} {'arch':>4} {'type':5} {'head':>4} {_COLUMNS}  config"


def variants() -> list[Variant]:
    """What every family ships, always in one order."""
    return list(_variants())


@lru_cache(maxsize=1)
def _variants() -> tuple[Variant, ...]:
    return tuple(_everywhere([variant for family in FAMILIES for variant in _of_family(family)]))


def _everywhere(listed: list[Variant]) -> Iterator[Variant]:
    """What is listed, and each also for the architectures that it is shipped to without being listed for them."""
    architectures: dict[str, set[int]] = {}
    for variant in listed:
        architectures.setdefault(variant.name, set()).add(variant.arch)
    for variant in listed:
        yield variant
        mine = architectures[variant.name]
        if variant.arch == 86 and 89 not in mine:
            # They share one class of configs.
            yield replace(variant, arch=89)
        if not variant.has_dot and mine == {90}:
            # Without a product there is nothing to tune, so that one config serves all.
            yield from (replace(variant, arch=arch) for arch in SHARED_MEMORY if arch != 90)


def _of_family(family: str) -> Iterator[Variant]:
    module = f"{__package__}.{family}"
    if importlib.util.find_spec(module) and importlib.util.find_spec(f"{module}.variants"):
        yield from importlib.import_module(f"{module}.variants").variants()


def compiled(variant: Variant) -> Any:
    """Triton's compiled kernel, from its cache if it is there."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter is on (TRITON_INTERPRET): nothing can be compiled")
    parameters = variant.kernel.arg_names
    given = [*variant.signature, *variant.constexprs]
    if sorted(given) != sorted(parameters):
        missing, extra = set(parameters) - set(given), set(given) - set(parameters)
        raise ValueError(
            f"{variant.name}: signature and constexprs must name each parameter once; "
            f"missing {sorted(missing)}, unknown {sorted(extra)}"
        )
    aligned = [name for name, type_ in variant.signature.items() if type_.startswith("*")]
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in parameters},
        constexprs={(parameters.index(name),): value for name, value in variant.constexprs.items()},
        attrs={
            (parameters.index(name),): [["tt.divisibility", 16]] for name in (*aligned, *variant.multiples)
        },
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=options)


def screen(variant: Variant) -> Screened:
    """Compile and measure; what goes wrong is a fault, never an exception."""
    about: dict[str, Any] = {
        "kernel": variant.name,
        "arch": variant.arch,
        "element": variant.element,
        "head_size": variant.head_size,
        "config": variant.config,
    }
    start = time.perf_counter()
    try:
        kernel = compiled(variant)
        registers, spills, hgmma = _inside(kernel.asm["cubin"], variant.needs_tensor_cores)
    except Exception as error:
        seconds = time.perf_counter() - start
        return Screened(**about, seconds=seconds, faults=(f"{type(error).__name__}: {error}",))
    shared, limit, faults = kernel.metadata.shared, SHARED_MEMORY[variant.arch], []
    if shared > limit:
        faults.append(f"takes {shared} bytes of shared memory, sm_{variant.arch} has {limit}")
    if spills > variant.known_spills and variant.arch == 90 and variant.head_size <= SPILL_FREE_UP_TO:
        beyond = f", {variant.known_spills} are known" if variant.known_spills else ""
        faults.append(f"spills {spills} bytes of registers for each thread{beyond}")
    if variant.needs_tensor_cores and not hgmma:
        faults.append("multiplies matrices without Hopper's matrix instructions")
    return Screened(
        **about,
        registers=registers,
        shared=shared,
        spills=spills,
        hgmma=hgmma,
        seconds=time.perf_counter() - start,
        faults=tuple(faults),
    )


def _inside(cubin: bytes, count_instructions: bool) -> tuple[int, int, int]:
    """Registers, bytes of stack, and the number of Hopper's matrix instructions, if asked for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("--dump-resource-usage", path))
        code = _cuobjdump("--dump-sass", path) if count_instructions else ""
    if usage is None:
        raise RuntimeError("cuobjdump says nothing of registers")
    return int(usage[1]), int(usage[2]), len(re.findall(r"\bHGMMA\b", code))


def _cuobjdump(option: str, path: Path) -> str:
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    run = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return run.stdout


def _screen_number(number: int) -> Screened:
    return screen(_variants()[number])


def screen_all(jobs: int = 2, numbers: Sequence[int] | None = None) -> Iterator[Screened]:
    """Every variant of `variants()`, or those of these numbers, in that order."""
    chosen = range(len(_variants())) if numbers is None else numbers
    # A variant holds a function that cannot be sent, so that a fresh process finds it by its number.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_screen_number, chosen)


def main() -> int:
    """Screen everything, or the kernels whose names contain an argument; 1 if anything has a fault."""
    wanted = [
        number
        for number, variant in enumerate(_variants())
        if len(sys.argv) < 2 or any(part in variant.name for part in sys.argv[1:])
    ]
    print(HEADING)
    faulty = 0
    for row in screen_all(numbers=wanted):
        print(row, flush=True)
        faulty += bool(row.faults)
    print(f"{len(wanted)} variants, {faulty} with faults")
    return 1 if faulty or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
