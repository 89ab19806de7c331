"""Where the kernels cannot run, a portable backend is chosen, and `explain` says why.

No such machine is at hand: tensors that hold no data say that they are on it.
"""

from __future__ import annotations

import copy
import importlib.machinery
import json
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from efficient_attn.backends import BackendError
from efficient_attn.kernels import availability, refusals
from efficient_attn.mechanisms import MECHANISMS, Mechanism
from efficient_attn.testing.sampling import HEAD_DIM, HEADS, LENGTH

from .judging import KERNEL

HOPPER = (9, 0)


def served() -> Iterator[Any]:
    """A causal example of each mechanism that has the kernels among its backends."""
    for name, cls in MECHANISMS.items():
        if any(backend.name == KERNEL for backend in cls.backends):
            yield pytest.param(cls.examples(LENGTH, HEADS, HEAD_DIM)[1], id=name)


SERVED = list(served())


def stand_in(kind: str) -> Any:
    """For Triton, imported, of which only what became of a function is looked at."""
    zeros = type(kind, (), {})()
    spec = importlib.machinery.ModuleSpec("triton", None)
    return SimpleNamespace(__spec__=spec, language=SimpleNamespace(zeros=zeros))


COMPILING, INTERPRETING = stand_in("JITFunction"), stand_in("InterpretedFunction")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that PyTorch was built for a GPU of this capability, and that Triton can be imported."""

    def pretend(
        *, capability: tuple[int, int] = HOPPER, hip: str | None = None, triton: Any = COMPILING
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        if triton == "absent":
            monkeypatch.setattr(availability, "INSTALLED", False)
        else:
            # Of what is None there, an import fails.
            monkeypatch.setattr(availability, "INSTALLED", True)
            monkeypatch.setitem(sys.modules, "triton", None if triton == "broken" else triton)

    return pretend


def said_on(m: Mechanism, device: str, dtype: torch.dtype, head_dim: int = HEAD_DIM) -> str:
    """What `explain` says on a device that is not there."""
    with FakeTensorMode():
        x = torch.empty(2, HEADS, LENGTH, head_dim, device=device, dtype=dtype)
        return m.explain(x, x, x)


def refused(said: str) -> str:
    """Why the kernels are refused, where another backend is chosen."""
    lines = [line.strip() for line in said.splitlines()]
    mine = [line for line in lines if line.startswith(f"{KERNEL}: refused: ")]
    assert len(mine) == 1, said
    chosen = [line.removesuffix(": chosen") for line in lines if line.endswith(": chosen")]
    assert len(chosen) == 1 and chosen[0] not in (KERNEL, "reference"), said
    return mine[0].removeprefix(f"{KERNEL}: refused: ")


@pytest.mark.parametrize("mechanism", SERVED)
@pytest.mark.parametrize(
    ("device", "dtype", "pretended", "reason"),
    [
        ("cuda", torch.bfloat16, {"hip": "6.4"}, "not AMD's"),
        (
            "cuda",
            torch.bfloat16,
            {"capability": (7, 5)},
            "needs compute capability 8.0 or newer, this GPU has 7.5",
        ),
        ("cuda", torch.bfloat16, {"triton": "absent"}, "triton is not installed"),
        ("cuda", torch.bfloat16, {"triton": "broken"}, "triton does not import"),
        ("cuda", torch.float64, {}, "does not take torch.float64"),
        ("mps", torch.float16, {}, "runs on NVIDIA GPUs, not mps"),
        ("xpu", torch.bfloat16, {}, "runs on NVIDIA GPUs, not xpu"),
        ("cpu", torch.bfloat16, {}, "runs on NVIDIA GPUs, not cpu"),
        ("meta", torch.bfloat16, {}, "runs on NVIDIA GPUs, not meta"),
    ],
    ids=["rocm", "turing", "no triton", "broken triton", "fp64", "mps", "xpu", "cpu", "meta"],
)
def test_another_backend_is_chosen(
    mechanism: Mechanism, device: str, dtype: torch.dtype, pretended: dict, reason: str, machine: Any
) -> None:
    machine(**pretended)
    assert reason in refused(said_on(mechanism, device, dtype))


@pytest.mark.parametrize("mechanism", SERVED)
def test_wide_heads_are_refused(mechanism: Mechanism, machine: Any) -> None:
    if mechanism.head_dim is not None:
        mechanism = type(mechanism)(272, is_causal=True)
    machine()
    assert "takes head sizes up to 256, not 272" in refused(said_on(mechanism, "cuda", torch.bfloat16, 272))


@pytest.mark.parametrize("mechanism", SERVED)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernels_are_chosen_on_nvidia(
    mechanism: Mechanism, capability: tuple[int, int], dtype: torch.dtype, machine: Any
) -> None:
    machine(capability=capability)
    said = said_on(mechanism, "cuda", dtype)
    assert f"{KERNEL}: chosen" in said or f"{KERNEL}: could run, comes after sdpa" in said, said


@pytest.mark.parametrize("mechanism", SERVED)
def test_asked_for_by_name_they_run_or_raise(mechanism: Mechanism, machine: Any) -> None:
    machine()
    m = type(mechanism).examples(LENGTH, HEADS, HEAD_DIM)[1]
    m.backend = KERNEL
    x = torch.zeros(2, HEADS, LENGTH, HEAD_DIM)
    with pytest.raises(BackendError, match="runs on NVIDIA GPUs, not cpu"):
        m(x, x, x)


def test_the_interpreter_never_takes_a_gpus_tensors(machine: Any) -> None:
    """It would copy them to and fro and compute bfloat16 wrongly, all without a word."""
    machine(triton=INTERPRETING)
    assert "takes cpu tensors, not cuda" in "; ".join(refusals(torch.device("cuda"), torch.float32, 64))
    assert "bfloat16 wrongly" in "; ".join(refusals(torch.device("cpu"), torch.bfloat16, 64))
    assert refusals(torch.device("cpu"), torch.float32, 64) == []


@pytest.mark.parametrize("mechanism", SERVED)
def test_a_gpus_choice_is_compiled_into_one_graph(mechanism: Mechanism, machine: Any) -> None:
    """What asks whether the kernels run there is traced by torch.compile, too."""
    machine(triton=pytest.importorskip("triton", reason="triton is not installed"))
    m, called = copy.deepcopy(mechanism), set()
    m.backend = KERNEL

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.update(str(node.target).partition(".")[0] for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, HEADS, LENGTH, HEAD_DIM, device="cuda")
        torch.compile(m, backend=record, fullgraph=True, dynamic=True)(x, x, x)
    assert "efficient_attn" in called, called


def test_on_the_cpu_triton_is_not_even_imported() -> None:
    """Forward, backward, decoding and `explain` there load no Triton."""
    program = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "from efficient_attn.mechanisms import MECHANISMS\n"
        f"x = torch.zeros(2, {HEADS}, {LENGTH}, {HEAD_DIM}, requires_grad=True)\n"
        "for cls in MECHANISMS.values():\n"
        f"    for m in cls.examples({LENGTH}, {HEADS}, {HEAD_DIM}):\n"
        "        m(x, x, x).sum().backward() if m.num_kv_heads is None else None\n"
        "        m.explain(x, x, x)\n"
        "        if m.is_causal:\n"
        f"            m.step(x, x, x, m.init_state(2, {HEADS}, {HEAD_DIM}))\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "triton" not in json.loads(run.stdout)
