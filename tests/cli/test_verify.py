"""`verify`: what is true is shown to be, and what is not is found and is status 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import MECHANISMS, Cost, LinearAttention, Mechanism, SlidingWindowAttention
from efficient_attn.cli import verify
from efficient_attn.cli.truths import ADVISORY, COUNTED, MEASURED, Truth, truths
from tests.cli.running import ran, refused


def examples() -> Iterator[Any]:
    for name, cls in MECHANISMS.items():
        for each in cls.examples(64, 4, 8)[:2]:
            yield pytest.param(each, id=f"{name}-{'causal' if each.is_causal else 'bidirectional'}")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are advisory, and take most of the time."""
    monkeypatch.setattr("efficient_attn.cli.truths.seconds", lambda m, lengths: [1.0, 4.0])


@pytest.mark.parametrize("mechanism", list(examples()))
def test_every_claim_is_true(mechanism: Mechanism) -> None:
    found = truths(mechanism, 64)
    assert [truth for truth in found if not truth.holds] == []
    kinds = {truth.how for truth in found}
    assert len(found) >= 6
    assert kinds >= {COUNTED, MEASURED}
    assert any("decode state" in truth.what for truth in found) == mechanism.is_causal


class Understates(SlidingWindowAttention):
    """Says that it multiplies half as much, keeps nothing, and has no state to speak of."""

    def _cost(self, *args: Any) -> Cost:
        cost = super()._cost(*args)
        flops = replace(cost.flops, forward=cost.flops.forward // 2)
        return replace(cost, flops=flops, saved_bytes=0, state_bytes=1, peak_bytes=9)


def test_a_claim_that_is_not_true_is_found() -> None:
    untrue = {truth.what for truth in truths(Understates(8, is_causal=True), 64) if not truth.holds}
    for what in (
        "pairs of the matrix",
        "products of the backend",
        "FlopCounterMode",
        "backward pass",
        "decode state",
        "at most",
    ):
        assert any(what in each for each in untrue), what


def test_a_bound_holds_from_above_and_not_from_far_above() -> None:
    assert [Truth("peak", c, 10, MEASURED, bound=4.0).holds for c in (9, 10, 40, 41)] == [
        False,
        True,
        True,
        False,
    ]


def test_what_is_advisory_never_fails() -> None:
    assert Truth("seconds", 1.0, 99.0, ADVISORY).holds


def test_claims_and_laws_stand_side_by_side() -> None:
    found = ran(
        "verify",
        "linear",
        "sliding_window:window_size=8",
        "--length",
        "64",
        "--laws",
        "runs_on_meta",
        "--json",
    )
    assert found.code == 0, found.out
    assert found.json["ok"] is True
    names = [f"{spec}{c}" for spec in ("linear", "sliding_window:window_size=8") for c in ("", ", causal")]
    assert list(found.json["mechanisms"]) == names
    for each in found.json["mechanisms"].values():
        assert list(each["laws"]["held"]) == ["runs_on_meta"]
        assert {truth["holds"] for truth in each["truths"]} == {True, None}
    shown = ran("verify", "linear", "--length", "64", "--laws", "runs_on_meta").out
    assert "claimed" in shown and "found" in shown and "all hold" in shown


class Lies(LinearAttention):
    """Not what its matrix says."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
        return super().forward(q, k, v, **masks) + 1

    def _cost(self, *args: Any) -> Cost:
        return replace(super()._cost(*args), saved_bytes=7)


def test_a_broken_law_and_an_untrue_claim_are_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MECHANISMS", MappingProxyType({"linear": Lies}))
    found = ran("verify", "--length", "64", "--laws", "equals_its_matrix")
    assert found.code == 1
    assert "BROKEN linear: equals_its_matrix" in found.out
    assert "UNTRUE linear: bytes kept for the backward pass: claimed 7, measured" in found.out
    assert "FAIL" in found.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("complaint", "arguments"),
    [
        ("unknown mechanism 'nystrom'", ["nystrom"]),
        ("unknown law 'gravity'", ["full", "--laws", "gravity"]),
        ("at least 64", ["full", "--length", "3"]),
        ("at least 1, got 0", ["full", "--length", "0"]),
        ("window_size must be", ["sliding_window:window_size=0"]),
    ],
)
def test_bad_arguments_are_refused(complaint: str, arguments: list[str]) -> None:
    refused(complaint, "verify", *arguments)


def test_the_thread_count_is_left_alone() -> None:
    before = torch.get_num_threads()
    ran("verify", "linear", "--length", "64", "--laws", "runs_on_meta")
    assert torch.get_num_threads() == before
