"""Tuning: candidates differ in one number, what is wrong or spills is not timed, and only a clear gain is advised."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.harness.gpu_tables import tuned
from benchmarks.measure import accelerated, tuning
from benchmarks.measure.tuning import judged_by, neighbours, replaced, said_of
from benchmarks.subjects import subject
from efficient_attn.benchmarking.cells import FORWARD, TUNE, Cell
from efficient_attn.benchmarking.records import OK
from efficient_attn.benchmarking.worker import Unsupported
from efficient_attn.kernels.configs import Config

KEY = (90, 2, 64)
SHIPPED = Config.of(4, 2, BLOCK_Q=64, BLOCK_K=64)
CELL = Cell(
    *("tune", "window 256, causal", TUNE, 96, "block_sparse.one"), heads=1, dtype="bfloat16", effort="dry"
)


def table() -> dict[str, Any]:
    shared = {KEY: SHIPPED, (80, 2, 64): SHIPPED}
    return {"one": shared, "other": shared}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found = table()
    monkeypatch.setattr(tuning, "tables", lambda: {"block_sparse": found})
    return found


def test_neighbours_differ_in_one_number() -> None:
    found = neighbours(SHIPPED)
    assert len(set(found)) == len(found) == 8
    assert SHIPPED not in found
    for config in found:
        ours, theirs = SHIPPED.launch, config.launch
        assert ours.keys() == theirs.keys()
        assert len([name for name in ours if ours[name] != theirs[name]]) == 1
    smallest = neighbours(Config.of(2, 1, BLOCK_Q=16, BLOCK_K=256))
    assert {said_of(c) for c in smallest} == {
        "BLOCK_K=256 BLOCK_Q=32 num_warps=2 num_stages=1",
        "BLOCK_K=128 BLOCK_Q=16 num_warps=2 num_stages=1",
        "BLOCK_K=256 BLOCK_Q=16 num_warps=4 num_stages=1",
        "BLOCK_K=256 BLOCK_Q=16 num_warps=2 num_stages=2",
    }


def test_a_config_is_replaced_for_one_kernel_and_put_back() -> None:
    found, other = table(), neighbours(SHIPPED)[0]
    with replaced(found, "one", KEY, other):
        assert found["one"][KEY] is other
        assert found["one"][80, 2, 64] is SHIPPED
        assert found["other"][KEY] is SHIPPED, "kernels may share a row"
    assert found["one"][KEY] is SHIPPED
    with pytest.raises(RuntimeError, match="inside"), replaced(found, "one", KEY, other):
        raise RuntimeError("inside")
    assert found["one"][KEY] is SHIPPED


def test_only_a_clear_gain_is_advised() -> None:
    base, other = said_of(SHIPPED), said_of(neighbours(SHIPPED)[0])
    result = {"shipped": base, "configs": {base: {"launch": {}}, other: {"launch": {}}}}
    clear = judged_by({base: [2.0, 2.1, 1.9], other: [1.0, 1.0, 1.0]}, result)
    assert clear["best"] == other
    assert clear["gain"]["median"] == 2
    assert tuned(result | clear) == f"change to {other}: 2x as fast"
    noisy = judged_by({base: [1.0, 1.2, 0.9], other: [1.0, 1.1, 0.99]}, result)
    assert tuned(result | noisy) == f"keep {base}"
    same = judged_by({base: [1.0, 1.0, 1.0], other: [1.1, 1.1, 1.1]}, result)
    assert same["best"] == base
    assert tuned(result | same) == f"keep {base}"


def test_what_the_screen_finds_is_not_tried(tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TRIED", {"dry": None})
    asked = []

    def screened(family: str, table: Any, kernel: str, key: Any, config: Config, cell: Cell) -> str:
        asked.append((family, kernel, key))
        return "spills 8 bytes of registers" if config["BLOCK_Q"] > 64 else ""

    monkeypatch.setattr(tuning, "screened", screened)
    outcome = tuning.measure_tuning(CELL, FORWARD)
    assert outcome.status == OK
    assert set(asked) == {("block_sparse", "one", KEY)}
    assert list(outcome.result["rejected"]) == ["BLOCK_K=64 BLOCK_Q=128 num_warps=4 num_stages=2"]
    assert len(outcome.result["configs"]) == 8
    assert "there is no GPU" in outcome.reason
    json.dumps(outcome.result)


def test_the_screen_is_asked_about_the_launches_that_change(
    tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from efficient_attn.kernels import screening
    from efficient_attn.kernels.screening import Screened, Variant

    def kernel() -> None:
        """Its name is all that counts here."""

    def variant(name: str, config: Config, **changes: Any) -> Variant:
        about = {"arch": 90, "head_size": 64, "signature": {"Q": "*bf16"}, **changes}
        launch = {"num_warps": config.num_warps, "num_stages": config.num_stages, "has_dot": True}
        return Variant(kernel=kernel, constexprs=config.constants | {"NAME": name}, **launch, **about)

    def variants() -> list[Variant]:
        one, other = tables["one"][KEY], tables["other"][KEY]
        fp32, wide = {"signature": {"Q": "*fp32"}}, {"head_size": 128}
        first = [variant("one", one, **fp32), variant("one", one, **wide), variant("one", one, arch=80)]
        return [*first, variant("other", other), variant("one", one), variant("one again", one)]

    seen = []

    def screen(found: Variant) -> Screened:
        seen.append(found.constexprs["NAME"])
        about = {"kernel": "kernel", "arch": 90, "element": "bf16", "head_size": 64, "config": ""}
        return Screened(**about, faults=("spills",))  # type: ignore[arg-type]

    family = ModuleType("variants")
    family.variants = variants  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "efficient_attn.kernels.block_sparse.variants", family)
    monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(screening, "screen", screen)
    cell = replace(CELL, effort="full")
    other = neighbours(SHIPPED)[0]
    assert tuning.screened("block_sparse", tables, "one", KEY, other, cell) == "spills"
    assert seen == ["one", "one again"]


def test_configs_are_timed_in_turns_and_a_wrong_one_is_not(
    tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, wrong, fine = SHIPPED, *neighbours(SHIPPED)[:2]
    used: list[Config] = []

    def configured(cell: Cell) -> torch.nn.Module:
        def hook(module: Any, inputs: Any, out: torch.Tensor) -> torch.Tensor:
            used.append(tables["one"][KEY])
            return 1.5 * out if used[-1] is wrong else out

        mechanism = subject(cell)
        mechanism.register_forward_hook(hook)
        return mechanism

    monkeypatch.setattr(accelerated, "subject", configured)
    rejected: dict[str, str] = {}
    candidates = [shipped, wrong, fine]
    times = tuning.times_of_configs(CELL, FORWARD, tables, "one", KEY, candidates, rejected)
    assert list(times) == [said_of(shipped), said_of(fine)]
    assert {len(samples) for samples in times.values()} == {3}
    assert "output off by" in rejected[said_of(wrong)]
    assert {shipped, wrong, fine} == set(used)
    assert tables["one"][KEY] is SHIPPED


def test_a_family_or_a_kernel_that_is_not_there_is_unsupported(tables: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match="no kernels of decode"):
        tuning.measure_tuning(replace(CELL, peer="decode.step"), FORWARD)
    with pytest.raises(Unsupported, match="no kernel two"):
        tuning.measure_tuning(replace(CELL, peer="block_sparse.two"), FORWARD)
