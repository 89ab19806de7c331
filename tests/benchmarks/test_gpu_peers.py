"""The peers of a GPU. Where theirs cannot run, a stand-in computes what their documentation says, in their layout."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure.races import gate
from benchmarks.peers import PEERS, Race, contender, fla, flex_attention, windows
from benchmarks.subjects import SUBJECTS
from efficient_attn import FullAttention, SlidingWindowAttention
from efficient_attn.benchmarking.cells import FORWARD, TRAINING, Cell
from efficient_attn.benchmarking.gate import is_wrong
from efficient_attn.benchmarking.inputs import normal_inputs
from efficient_attn.benchmarking.worker import Unsupported
from efficient_attn.mechanisms import Mechanism

LENGTH, BATCH = 150, 2
WINDOWS = {
    "causal": SlidingWindowAttention(20, is_causal=True),
    "both sides": SlidingWindowAttention(20),
    "full, causal": FullAttention(is_causal=True),
    "full": FullAttention(),
}


def given(mechanism: Mechanism | str, work: str = TRAINING) -> Race:
    built = SUBJECTS[mechanism](LENGTH, 2, 16) if isinstance(mechanism, str) else mechanism
    cell = Cell("peers", "window 256, causal", work, LENGTH, batch=BATCH, heads=2, head_dim=16)
    return Race(cell, built, *normal_inputs(cell, grad=work == TRAINING))


def passes(peer: str, race: Race) -> None:
    found = gate(race, {peer: PEERS[peer](race)})[peer]
    assert set(found) == {"output", "gradient"}
    assert not is_wrong(found, torch.float32), found


def attend(q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
    """Tokens first (B, L, H, E): keys from `left` before to `right` after the query, -1 for all."""
    distance = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None]
    allowed = ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=allowed).transpose(1, 2)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that are for GPUs alone, on a CPU, with stand-ins for what cannot run here."""
    monkeypatch.setattr(windows, "_on_a_gpu", lambda race: None)

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert max_q == max_k == LENGTH
        rows = [
            attend(*(x[a:b][None] for x in (query, key, value)), *window_size)[0]
            for a, b in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)
        ]
        return torch.cat(rows)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)

    @dataclass
    class LocalAttentionFromBottomRightMask:
        window_left: int
        window_right: int

    class LowerTriangularMask:
        pass

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
        if attn_bias is None:
            return attend(q, k, v, -1, -1)
        if isinstance(attn_bias, LowerTriangularMask):
            return attend(q, k, v, -1, 0)
        return attend(q, k, v, attn_bias.window_left, attn_bias.window_right)

    bias = ModuleType("xformers.ops.fmha.attn_bias")
    bias.LocalAttentionFromBottomRightMask = LocalAttentionFromBottomRightMask  # type: ignore[attr-defined]
    bias.LowerTriangularMask = LowerTriangularMask  # type: ignore[attr-defined]
    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setattr(contender, "installed", lambda library: "0")
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", bias)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("peer", ["FlashAttention-2", "xformers"])
@pytest.mark.parametrize("mechanism", WINDOWS.values(), ids=WINDOWS.keys())
def test_a_window_of_others_sees_the_same_keys(peer: str, mechanism: Mechanism) -> None:
    passes(peer, given(mechanism))


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("peer", ["FlashAttention-2", "xformers"])
@pytest.mark.parametrize(
    ("mechanism", "reason"),
    [
        ("bigbird b64", "BigBirdAttention"),
        ("linear, causal", "LinearAttention"),
        (SlidingWindowAttention(20, num_sinks=2), "sinks"),
    ],
)
def test_a_window_is_no_other_pattern(peer: str, mechanism: Mechanism | str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        PEERS[peer](given(mechanism))


def test_the_arguments_are_those_of_this_torch() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "window_size" in names


@pytest.fixture
def linear_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla's operator, from its documentation, on a CPU."""

    def chunk_linear_attn(
        q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, normalize: bool = True
    ) -> tuple[Tensor, None]:
        scale = k.shape[-1] ** -0.5 if scale is None else scale
        weights = torch.einsum("bthk,bshk->bhts", q * scale, k).tril()
        out = torch.einsum("bhts,bshv->bthv", weights, v)
        return (out / weights.sum(-1).transpose(1, 2)[..., None] if normalize else out), None

    monkeypatch.setattr(fla, "_operator", lambda race: chunk_linear_attn)


@pytest.mark.usefixtures("linear_attention")
@pytest.mark.parametrize("peer", ["fla", "fla raw"])
def test_flash_linear_attention_is_held_against_what_it_computes(peer: str) -> None:
    race = given("linear, causal")
    passes(peer, race)
    assert (PEERS[peer](race).computes is race.mechanism) == (peer == "fla"), "raw is not what ours computes"


@pytest.mark.parametrize(
    ("peer", "mechanism"),
    [("two products", "linear"), ("projected SDPA", "linformer 256"), ("SDPA math", "full, causal")],
)
def test_what_torch_suffices_for_passes(peer: str, mechanism: str) -> None:
    passes(peer, given(mechanism))


@pytest.mark.parametrize(
    ("peer", "mechanism", "reason"),
    [
        ("two products", "linear, causal", "not causal"),
        ("two products", "full", "not causal"),
        ("projected SDPA", "full", "Linformer"),
        ("SDPA flash", "linear", "full attention"),
        ("SDPA cuDNN", "full", "no such kernel"),
        ("FlashAttention-2", "full", "GPUs, not for cpu"),
        ("fla", "linear, causal", "fla-core is not installed|not on cpu"),
        ("xformers", "full", "xformers is not installed|GPUs, not for cpu"),
    ],
)
def test_a_peer_says_why_not(peer: str, mechanism: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        PEERS[peer](given(mechanism))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotImplementedError("No operator found for `memory_efficient_attention_forward`"), "No operator"),
        (RuntimeError("No available kernel. Aborting execution."), "no such kernel"),
    ],
)
def test_a_library_without_a_kernel_is_unsupported(error: Exception, reason: str) -> None:
    def fails() -> Tensor:
        raise error

    with pytest.raises(Unsupported, match=reason):
        contender.tried(fails)


def test_other_errors_are_errors() -> None:
    def fails() -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        contender.tried(fails)


@pytest.mark.parametrize(("effort", "sizes"), [("full", [128, 64]), ("quick", [128])])
def test_flex_is_tuned_on_a_gpu(effort: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    race = given("window 256, causal", FORWARD)
    race = replace(race, cell=replace(race.cell, device="cuda", effort=effort))
    tried: list[int] = []

    def forward(race: Race, mechanism: Mechanism, size: int) -> Any:
        tried.append(size)
        return lambda: size

    monkeypatch.setattr(flex_attention, "_forward", forward)
    monkeypatch.setattr(flex_attention, "_seconds", lambda race, forward: {128: 2.0, 64: 1.0}[forward()])
    found = PEERS["flex"](race)
    assert tried == sizes
    assert found.remark == f"blocks of {64 if effort == 'full' else 128}"


@pytest.mark.parametrize("work", [FORWARD, TRAINING])
def test_flex_is_compiled_in_the_mode_that_is_timed(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    race = given("window 256, causal", work)
    race = replace(race, cell=replace(race.cell, device="cuda"))
    asked: list[dict[str, Any]] = []
    grads: list[bool] = []

    def compile_(function: Any, **options: Any) -> Any:
        asked.append(options)

        def compiled(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
            grads.append(torch.is_grad_enabled())
            return q + k + v

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    flex_attention._forward(race, race.mechanism, 64)  # type: ignore[arg-type]
    assert asked == [{"dynamic": False, "mode": "max-autotune-no-cudagraphs"}]
    assert grads == [work == TRAINING]
    assert "max-autotune-no-cudagraphs" in torch._inductor.list_mode_options()
