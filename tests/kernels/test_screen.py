"""Every shipped config of every kernel, compiled for the GPUs that it is shipped for, where there is none."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest

from efficient_attn.kernels import screening
from efficient_attn.kernels.configs import ARCHITECTURES, SHARED_MEMORY
from efficient_attn.kernels.screening import Screened, Variant, screen, variants


def shipped() -> list[Any]:
    """The variants, or one that is skipped, and says why, where Triton cannot compile."""
    if importlib.util.find_spec("triton") is None:
        return [pytest.param(None, marks=pytest.mark.skip(reason="triton is not installed"))]
    from triton import knobs

    if knobs.runtime.interpret:
        return [pytest.param(None, marks=pytest.mark.skip(reason="Triton interprets (TRITON_INTERPRET)"))]
    return [
        pytest.param(variant, id=f"{variant.name}-sm{variant.arch}-{number}")
        for number, variant in enumerate(variants())
    ]


SHIPPED = shipped()


@pytest.mark.parametrize("variant", SHIPPED)
def test_compiles_without_faults(variant: Variant, record_property: Any) -> None:
    screened = screen(variant)
    if screened.faults:
        pytest.fail(f"{screening.HEADING}\n{screened}", pytrace=False)
    record_property("screened", str(screened))


def of_this_machine() -> list[Variant]:
    pytest.importorskip("triton", reason="triton is not installed")
    return [parameter.values[0] for parameter in SHIPPED if not parameter.marks]


def test_every_family_ships_for_every_architecture() -> None:
    """A family without variants, or a kernel that is missing for one GPU, would go unnoticed."""
    listed = of_this_machine()
    for family in ("block_sparse", "chunked_linear"):
        architectures = {v.arch for v in listed if f".{family}." in v.kernel.__module__}
        assert architectures >= {*ARCHITECTURES, 89}, f"{family}: {architectures}"
    for name in {v.name for v in listed}:
        mine = {v.arch for v in listed if v.name == name}
        assert mine == set(SHARED_MEMORY), f"{name}: {mine}"


def test_half_precision_and_every_head_size_are_screened_on_hopper() -> None:
    for name in {v.name for v in of_this_machine() if v.needs_tensor_cores}:
        mine = (v for v in of_this_machine() if v.name == name and v.arch == 90 and v.element == "bf16")
        sizes = {v.head_size for v in mine}
        assert sizes >= {64, 128, 256}, f"{name}: {sizes}"


def test_a_product_that_fits_has_no_fault() -> None:
    screened = screen(a_product())
    assert screened.faults == () and screened.hgmma > 0 and screened.registers > 0 < screened.shared


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"arch": 86, "num_stages": 6}, "of shared memory, sm_86 has 101376"),
        (
            {"constexprs": {"BLOCK": 128, "COLUMNS": 256}, "num_warps": 4, "num_stages": 1},
            "of registers for each",
        ),
        ({"constexprs": {"BLOCK": 16, "COLUMNS": 64}}, "without Hopper's matrix instructions"),
        ({"signature": {"A": "*bf16"}}, "must name each parameter once; missing ['B', 'C', 'N']"),
        ({"constexprs": {"BLOCK": 100, "COLUMNS": 64}}, "CompilationError"),
    ],
    ids=["memory", "spills", "no wgmma", "signature", "error"],
)
def test_faults_are_found(changes: dict, fault: str) -> None:
    screened: Screened = screen(dataclasses.replace(a_product(), **changes))
    assert any(fault in found for found in screened.faults), str(screened)


def a_product() -> Variant:
    pytest.importorskip("triton", reason="triton is not installed")
    from .faulty import product

    return Variant(
        kernel=product,
        arch=90,
        head_size=128,
        signature={"A": "*bf16", "B": "*bf16", "C": "*fp32", "N": "i32"},
        constexprs={"BLOCK": 128, "COLUMNS": 128},
        num_warps=8,
        num_stages=3,
        has_dot=True,
        multiples=("N",),
    )


def test_what_may_not_use_tensor_cores_need_not() -> None:
    """fp32 is multiplied exactly, and decoding has fewer rows than Hopper's instructions take."""
    exact = dataclasses.replace(a_product(), signature={"A": "*fp32", "B": "*fp32", "C": "*fp32", "N": "i32"})
    few = dataclasses.replace(a_product(), constexprs={"BLOCK": 16, "COLUMNS": 64}, wgmma=False)
    assert a_product().needs_tensor_cores
    assert not exact.needs_tensor_cores and not few.needs_tensor_cores
    assert screen(few).faults == ()


def test_every_option_is_screened_on_hopper() -> None:
    """Documents, padding, grouped heads and fp32 ask for registers of their own."""
    hopper = [v for v in of_this_machine() if v.arch == 90 and v.has_dot]
    for name in ("rows_kernel", "row_gradients_kernel", "key_gradients_kernel", "key_states_kernel"):
        laden = [v for v in hopper if v.name == name and {"valid", "segment"} <= {*v.signature}]
        assert {v.element for v in laden} == {"bf16", "fp16", "fp32"}, name
        assert all(v.constexprs.get("GROUPS", 4) > 1 for v in laden), name
    for name in ("forward_kernel", "dq_kernel", "dkdv_kernel"):
        assert any(v.name == name and v.element == "fp32" for v in hopper), name


def test_known_spills_are_a_bound() -> None:
    """More than what is known is a fault, and nothing in half precision is known to spill."""
    wide = dataclasses.replace(
        a_product(), constexprs={"BLOCK": 128, "COLUMNS": 256}, num_warps=4, num_stages=1
    )
    spilt = screen(wide).spills
    assert screen(dataclasses.replace(wide, known_spills=spilt)).faults == ()
    faults = screen(dataclasses.replace(wide, known_spills=spilt - 1)).faults
    assert any(f"{spilt - 1} are known" in fault for fault in faults)
    assert [v for v in of_this_machine() if v.known_spills and v.element == "bf16"] == []
