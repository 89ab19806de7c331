"""Which config of a kernel is the fastest: that which is shipped, or one that differs from it in one number.

Each candidate is compiled and screened first, as the shipped ones are; then compared with fp64; then all that are left
are timed in turns. Repeating it after a change climbs to the best config that single steps reach.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from benchmarks.peers import Race
from efficient_attn.benchmarking.cells import BACKWARD, FORWARD, Cell
from efficient_attn.benchmarking.contender import work_of
from efficient_attn.benchmarking.gate import is_wrong, said
from efficient_attn.benchmarking.inputs import normal_inputs
from efficient_attn.benchmarking.instruments import INSTRUMENTS
from efficient_attn.benchmarking.records import WRONG
from efficient_attn.benchmarking.timing import EFFORTS, Sampler, interleaved, ratio, warmed_up
from efficient_attn.benchmarking.worker import Outcome, Unsupported
from efficient_attn.kernels.configs import SHARED_MEMORY, Config, Key, architecture, size_class

from .races import gate, ours_in

ConfigTable = MutableMapping[str, dict[Key, Config]]

TABLES = {"block_sparse": "CONFIGS", "chunked_linear": "TABLE"}
"""Family -> the name of its table of configs."""

WIDE, BIGBIRD, STRIDED, LINEAR, PERFORMER = (
    "window 1024, causal",
    "bigbird b64",
    "strided 512, causal",
    "linear, causal",
    "performer 256, causal",
)
TIMED_BY: Mapping[str, tuple[str, str]] = {
    "block_sparse.band_forward": (WIDE, FORWARD),
    "block_sparse.band_dq": (WIDE, BACKWARD),
    "block_sparse.band_dkdv": (WIDE, BACKWARD),
    "block_sparse.table_forward": (BIGBIRD, FORWARD),
    "block_sparse.table_dq": (BIGBIRD, BACKWARD),
    "block_sparse.table_dkdv": (BIGBIRD, BACKWARD),
    "block_sparse.strided_forward": (STRIDED, FORWARD),
    "block_sparse.strided_dq": (STRIDED, BACKWARD),
    "block_sparse.strided_dkdv": (STRIDED, BACKWARD),
    "chunked_linear.exponents": (PERFORMER, FORWARD),
    "chunked_linear.states": (LINEAR, FORWARD),
    "chunked_linear.rows": (LINEAR, FORWARD),
    "chunked_linear.rows_projected": (PERFORMER, FORWARD),
    "chunked_linear.row_gradients": (LINEAR, BACKWARD),
    "chunked_linear.row_gradients_projected": (PERFORMER, BACKWARD),
    "chunked_linear.key_gradients": (LINEAR, BACKWARD),
    "chunked_linear.key_gradients_projected": (PERFORMER, BACKWARD),
}
"""Our kernels: the subject and the pass by which their configs are timed."""

UNTIMED = ("block_sparse.dropout_forward", "block_sparse.dropout_dq", "block_sparse.dropout_dkdv")
"""Our kernels whose results are random: no reference says whether a candidate is right."""

WARPS, STAGES, LARGEST_BLOCK = (2, 4, 8, 16), (1, 2, 3, 4), 256
SCREENED_ARCH = 90
"""Where there is no GPU, candidates are screened for this one."""
SCREENED_VARIANTS = {"full": 3, "quick": 1, "dry": 1}
TRIED = {"full": None, "quick": 4, "dry": 1}
"""By effort: launches of a candidate that are compiled, and candidates; None: all."""
SHIPPED = "shipped"


def tables() -> dict[str, ConfigTable]:
    """The table of configs of each family that is there."""
    found = {}
    for family, name in TABLES.items():
        module = f"efficient_attn.kernels.{family}.configs"
        if importlib.util.find_spec(f"efficient_attn.kernels.{family}") and importlib.util.find_spec(module):
            found[family] = getattr(importlib.import_module(module), name)
    return found


def measure_tuning(cell: Cell, work: str) -> Outcome:
    """The candidates for the kernel `cell.peer`, "family.kernel", timed by the pass `work` of the cell's subject."""
    family, _, kernel = cell.peer.partition(".")
    if family not in (found := tables()):
        raise Unsupported(f"there are no kernels of {family}")
    table, key = found[family], _key(cell)
    if kernel not in table:
        raise Unsupported(f"{family} has no kernel {kernel}")
    shipped = table[kernel][key]
    candidates = [shipped, *neighbours(shipped)[: TRIED[cell.effort]]]
    rejected = {}
    for config in candidates[1:]:
        if faults := screened(family, table, kernel, key, config, cell):
            rejected[said_of(config)] = faults
    candidates = [config for config in candidates if said_of(config) not in rejected]
    result: dict[str, Any] = {
        "kernel": cell.peer,
        "pass": work,
        "key": list(key),
        SHIPPED: said_of(shipped),
        "rejected": rejected,
        "configs": {said_of(config): {"launch": config.launch} for config in candidates},
    }
    if cell.device == "cpu":
        return Outcome(reason="screened, not timed: there is no GPU", result=result)

    times = times_of_configs(cell, work, table, kernel, key, candidates, rejected)
    if result[SHIPPED] not in times:
        return Outcome(WRONG, f"the shipped config is {rejected[result[SHIPPED]]}", result)
    return Outcome(result=result | judged_by(times, result))


def times_of_configs(
    cell: Cell,
    work: str,
    table: ConfigTable,
    kernel: str,
    key: Key,
    candidates: list[Config],
    rejected: dict[str, str],
) -> dict[str, list[float]]:
    """Samples of the pass `work` under each candidate, in turns; one that is wrong goes to `rejected`."""
    from .accelerated import blamed, prepared_subject, strips_of

    timed, effort = replace(cell, work=work), EFFORTS[cell.effort]
    given = Race(timed, prepared_subject(cell), *normal_inputs(timed, grad=work != FORWARD))
    ours, strips = ours_in(given), strips_of(timed)
    run, samplers, seconds = work_of(ours, work), {}, 0.0
    for config in candidates:
        name = said_of(config)
        with blamed(name), replaced(table, kernel, key, config):
            errors = gate(given, {name: ours}, strips)[name]
            if is_wrong(errors, given.q.dtype):
                rejected[name] = f"wrong: {said(errors)}"
                continue
            sampler, cost = warmed_up(run, INSTRUMENTS[cell.device].clock, effort.warm_up)
        samplers[name] = _under(table, kernel, key, config, sampler)
        seconds += cost
    return interleaved(samplers, effort.rounds(seconds))


def judged_by(times: dict[str, list[float]], result: dict[str, Any]) -> dict[str, Any]:
    """The fastest config, and how many times as fast as the shipped one each is, from samples of the same rounds."""
    base = times[result[SHIPPED]]
    configs = {
        name: found | {"seconds": times[name], "ratio": asdict(ratio(base, times[name]))}
        for name, found in result["configs"].items()
        if name in times
    }
    best = min(configs, key=lambda name: median(times[name]))
    return {"configs": configs, "best": best, "gain": configs[best]["ratio"]}


def neighbours(config: Config) -> list[Config]:
    """Those that differ in one number: a block half or twice as large, the next count of warps or of stages."""
    found = []
    for name, size in config.blocks:
        for other in (size // 2, size * 2):
            if 16 <= other <= LARGEST_BLOCK:
                blocks = tuple((n, other if n == name else s) for n, s in config.blocks)
                found.append(replace(config, blocks=blocks))
    for field, steps in (("num_warps", WARPS), ("num_stages", STAGES)):
        place = steps.index(getattr(config, field))
        found += [replace(config, **{field: other}) for other in steps[max(0, place - 1) : place + 2]]
    return [other for other in found if other != config]


def screened(family: str, table: ConfigTable, kernel: str, key: Key, config: Config, cell: Cell) -> str:
    """Why a candidate is not tried: what the screen finds in the launches that it changes; empty if nothing."""
    module = f"efficient_attn.kernels.{family}.variants"
    if importlib.util.find_spec(module) is None:
        return ""
    from efficient_attn.kernels.screening import screen

    variants: Callable[[], Iterator[Any]] = importlib.import_module(module).variants
    arch = _arch(cell.device)

    def concerned() -> dict[tuple[str, ...], Any]:
        return {
            (v.name, str(v.head_size), v.config, str(v.signature)): v
            for v in variants()
            if v.arch == arch and v.element == "bf16" and size_class(v.head_size) == key[2]
        }

    before = concerned()
    with replaced(table, kernel, key, config):
        changed = [variant for name, variant in concerned().items() if name not in before]
    found = [fault for v in changed[: SCREENED_VARIANTS[cell.effort]] for fault in screen(v).faults]
    return "; ".join(dict.fromkeys(found))


@contextmanager
def replaced(table: ConfigTable, kernel: str, key: Key, config: Config) -> Iterator[None]:
    """Launches inside find `config`. Other kernels may share the row that is replaced, and keep it."""
    before = table[kernel]
    table[kernel] = {**before, key: config}
    try:
        yield
    finally:
        table[kernel] = before


def said_of(config: Config) -> str:
    """In one line, as names of records."""
    return " ".join(f"{name}={value}" for name, value in config.launch.items())


def _under(table: ConfigTable, kernel: str, key: Key, config: Config, sampler: Sampler) -> Sampler:
    def sample() -> float:
        with replaced(table, kernel, key, config):
            return sampler()

    return sample


def _key(cell: Cell) -> Key:
    return (
        architecture(divmod(_arch(cell.device), 10)),
        getattr(torch, cell.dtype).itemsize,
        size_class(cell.head_dim),
    )


def _arch(device: str) -> int:
    """As the screen names it."""
    if device == "cpu":
        return SCREENED_ARCH
    capability = torch.cuda.get_device_capability()
    exact = 10 * capability[0] + capability[1]
    return exact if exact in SHARED_MEMORY else architecture(capability)
