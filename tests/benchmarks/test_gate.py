"""The gate: every way that a contender can be wrong is seen, and no right one is called wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import subjects
from benchmarks.measure.races import gate
from benchmarks.peers import PEERS, Contender, Race, contender, flex_attention
from benchmarks.subjects import SUBJECTS, subject
from efficient_attn import MECHANISMS, FullAttention
from efficient_attn.benchmarking.cells import FORWARD, TRAINING, Cell
from efficient_attn.benchmarking.gate import Exact, errors, is_wrong, sampled_strips, sparse_cotangent
from efficient_attn.benchmarking.inputs import normal_inputs
from efficient_attn.benchmarking.worker import Unsupported
from efficient_attn.mechanisms import SoftmaxMechanism

LENGTH = 192
INSTALLED_SEPARATELY = ("performer-pytorch", "linformer", "local-attention", "fast-transformers")


def given(name: str, work: str = TRAINING, length: int = LENGTH, heads: int = 2) -> Race:
    cell = Cell("gate", name, work, length, heads=heads)
    return Race(cell, subject(cell), *normal_inputs(cell, grad=work == TRAINING))


def masked(name: str) -> SoftmaxMechanism:
    mechanism = SUBJECTS[name](LENGTH, 2, 64)
    assert isinstance(mechanism, SoftmaxMechanism)
    return mechanism


def ours(race: Race) -> Contender:
    leaves = (*race.inputs, *race.mechanism.parameters())
    return Contender(lambda: race.mechanism(*race.inputs), leaves, race.mechanism)


@pytest.mark.parametrize("name", SUBJECTS)
def test_ours_passes(name: str) -> None:
    race = given(name)
    found = gate(race, {"ours": ours(race)})["ours"]
    assert set(found) == {"output", "gradient"}
    assert not is_wrong(found, torch.float32), found
    assert max(found.values()) < 1e-5


PAIRS = {
    "SDPA": ["full", "full, causal", "linear, causal", "performer 256", "linformer 256"],
    "masked SDPA": [name for name in SUBJECTS if subjects.has_mask(name)],
    "masked SDPA, float mask": ["window 256, causal", "bigbird b64"],
    "cumsum": ["linear, causal"],
    "chunks": ["linear, causal"],
}


@pytest.mark.parametrize(("peer", "name"), [(peer, name) for peer, names in PAIRS.items() for name in names])
def test_a_peer_that_torch_suffices_for_passes(peer: str, name: str) -> None:
    race = given(name)
    found = gate(race, {peer: PEERS[peer](race)})[peer]
    assert not is_wrong(found, torch.float32), found


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["window 256, causal", "bigbird b64, causal"])
def test_flex_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling takes longer than all these tests; uncompiled it computes the same, if slowly.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    race = given(name, FORWARD, length=320)
    found = gate(race, {"flex": PEERS["flex"](race)})["flex"]
    assert not is_wrong(found, torch.float32), found


@pytest.mark.parametrize("name", ["window 256, causal", "bigbird b64", "bigbird b64, causal"])
def test_the_table_of_flex_holds_the_blocks_of_the_mask(name: str) -> None:
    mask, n, size = masked(name).mask, 400, 64  # the last block is not full
    table = flex_attention.block_mask(mask, n, size, torch.device("cpu"))
    dense = torch.zeros(448, 448, dtype=torch.bool)
    dense[:n, :n] = mask.dense(n, n)
    blocks = dense.view(7, size, 7, size)
    assert torch.equal(table.to_dense()[0, 0].bool(), blocks.any(3).any(1))
    assert table.full_kv_num_blocks is not None
    assert torch.equal(table.full_kv_num_blocks[0, 0].long(), blocks.all(3).all(1).sum(1))


def test_flex_says_that_it_has_no_backward_pass_on_a_cpu() -> None:
    with pytest.raises(Unsupported, match="no backward pass on a CPU"):
        PEERS["flex"](given("window 256, causal"))


def future_seen(race: Race) -> Tensor:
    q, k, v = race.inputs
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def detached(race: Race) -> Tensor:
    q, k, v = race.inputs
    return race.mechanism(q, k.detach(), v) + 0 * k.sum()  # the graph has k, and its gradient is zero


def unwritten_rows(race: Race) -> Tensor:
    out = torch.empty_like(race.v)
    return torch.cat([race.mechanism(*race.inputs)[:, :, :-1], out[:, :, -1:]], 2)


def scaled(race: Race) -> Tensor:
    return race.mechanism(*race.inputs) * 1.01


WRONG: dict[str, tuple[Callable[[Race], Tensor], str]] = {
    "sees the future": (future_seen, "output"),
    "scaled by one in a hundred": (scaled, "output"),
    "reads what nobody wrote": (unwritten_rows, "output"),
    "no gradient for keys": (detached, "gradient"),
}


@pytest.mark.parametrize(("compute", "where"), WRONG.values(), ids=WRONG.keys())
def test_a_planted_wrong_peer_is_seen(compute: Callable[[Race], Tensor], where: str) -> None:
    race = given("window 256, causal")
    planted = Contender(lambda: compute(race), race.inputs, race.mechanism)
    found = gate(race, {"planted": planted})["planted"]
    assert is_wrong(found, torch.float32)
    assert found[where] > 1e-3


def test_a_peer_that_is_off_in_half_precision_is_told_from_one_that_rounds() -> None:
    assert not is_wrong({"output": 4e-3}, torch.bfloat16)
    assert is_wrong({"output": 4e-3}, torch.float32)
    assert is_wrong({"output": math.inf}, torch.bfloat16)
    assert is_wrong({"output": math.nan}, torch.bfloat16)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (127, 1), (128, 8), (129, 8), (16_384, 8)])
def test_strips_hold_the_first_and_the_last_row_and_do_not_overlap(length: int, count: int) -> None:
    strips = sampled_strips(length)
    assert len(strips) == count
    rows = [row for strip in strips for row in range(strip.start, strip.stop)]
    assert rows[0] == 0
    assert rows[-1] == length - 1
    assert len(set(rows)) == len(rows)


def test_sampled_rows_and_gradients_are_those_of_the_whole() -> None:
    race = given("linear, causal", length=300)
    strips = sampled_strips(300)
    cotangent = sparse_cotangent(race.v.detach(), strips)
    sampled = Exact(race.mechanism, race.inputs, strips, cotangent)
    whole = Exact(race.mechanism, race.inputs, [slice(0, 300)], cotangent)
    for some, every in zip(sampled.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(some, every)
    rows = torch.cat([whole.output[:, :, s] for s in strips], 2)
    torch.testing.assert_close(sampled.output, rows)


def test_a_contender_in_another_layout_is_compared_in_ours() -> None:
    race = given("full", length=96)
    flat = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in race.inputs]

    def forward() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in flat)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    other = Contender(forward, tuple(flat), FullAttention(), to_heads=lambda x: x.transpose(1, 2))
    strips = sampled_strips(96)
    cotangent = sparse_cotangent(race.v.detach(), strips)
    found = errors(other, Exact(FullAttention(), race.inputs, strips, cotangent), strips, cotangent)
    assert not is_wrong(found, torch.float32), found


@pytest.mark.parametrize("peer", INSTALLED_SEPARATELY)
def test_a_peer_that_is_not_installed_says_so(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contender, "installed", lambda library: None)
    with pytest.raises(Unsupported, match="is not installed"):
        PEERS[peer](given("linear, causal"))


@pytest.mark.parametrize("peer", ["masked SDPA", "flex", "cumsum", "chunks"])
def test_a_peer_refuses_what_it_was_not_written_for(peer: str) -> None:
    with pytest.raises(Unsupported):
        PEERS[peer](given("performer 256", FORWARD))


def test_every_mechanism_is_benchmarked_and_a_new_one_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {type(build(64, 8, 64)) for build in SUBJECTS.values()}
    assert shown == set(MECHANISMS.values())

    class Newcomer(FullAttention):
        pass

    monkeypatch.setattr(subjects, "MECHANISMS", {**MECHANISMS, "newcomer": Newcomer})
    others = subjects._others()
    assert list(others) == ["newcomer"]
    assert type(others["newcomer"](64, 8, 64)) is Newcomer
