"""The commands that count and say: right numbers, JSON, and a clear word for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from efficient_attn import MECHANISMS, FullAttention, Shape, SlidingWindowAttention
from efficient_attn.planning import DEVICES
from tests.cli.running import ran, refused

ROOT = Path(__file__).parent.parent.parent
TINY = "num_layers=2,embed_dim=64,num_heads=4"


def test_list_has_every_mechanism_and_what_it_declares() -> None:
    found = ran("list", "--json").json
    assert list(found) == list(MECHANISMS)
    for name, cls in MECHANISMS.items():
        assert found[name]["time"] == cls.complexity.time
        assert found[name]["summary"]
    assert found["linformer"]["causal"] is False
    table = ran("list").out
    assert all(name in table for name in MECHANISMS)


def test_info_says_which_backend_runs_and_why_not_another() -> None:
    found = ran("info", "sliding_window:window_size=32", "--causal", "--json").json
    assert found["built"] == "SlidingWindowAttention(window_size=32, is_causal=True)"
    assert found["degrees"] == {"time": 1.0, "memory": 1.0, "decode_time": 0.0, "state": 0.0}
    assert found["arguments"]["window_size"] == "required"
    assert any("blocked: chosen" in line for line in found["backends"])
    assert "arXiv:2004.05150" in ran("info", "sliding_window").out


def test_env_is_that_of_the_records() -> None:
    found = ran("env", "--json", "--device", "cpu").json
    assert {"cpu", "cores", "libraries", "sources", "commit", "load"} <= set(found)
    assert found["libraries"]["torch"] in ran("env", "--device", "cpu").out


def test_cost_is_what_cost_says() -> None:
    found = ran(
        "cost", "sliding_window:window_size=64", "--length", "1k,2k", "--causal", "--training", "--json"
    ).json
    for n in (1024, 2048):
        expected = SlidingWindowAttention(64, is_causal=True).cost(Shape(1, 8, n, n, 64), training=True)
        cost = found["costs"][str(n)]
        assert cost["flops"]["forward"] == expected.flops.forward
        assert cost["flops"]["backward"] == expected.flops.backward
        assert (cost["saved_bytes"], cost["state_bytes"]) == (expected.saved_bytes, expected.state_bytes)
    lines = ran("cost", "full", "--length", "1k").out.splitlines()
    assert "4,096" not in lines[2]
    assert lines[2].split()[:3] == ["1,024", "2.15", "G"], "2 * 1024^2 * 2 * 64 * 8"


def test_decoding_costs_one_more_token() -> None:
    found = ran("cost", "linear", "--length", "1M", "--phase", "decode", "--json").json
    assert found["layer"]["is_causal"] is True
    assert 0 < found["costs"]["1048576"]["flops"]["forward"] < 10**6


def test_compare_is_against_full() -> None:
    found = ran("compare", "--length", "16k", "--json").json["lengths"]["16384"]
    assert list(found) == list(MECHANISMS)
    assert found["full"]["full_over_this"] == 1.0
    assert found["linear"]["full_over_this"] == 256.0, "length over head size"
    causal = ran("compare", "--length", "1k", "--causal", "--json").json["lengths"]["1024"]
    assert set(MECHANISMS) - set(causal) == {"linformer"}, "what has no causal form is left out"


def test_compare_estimates_time_on_a_device() -> None:
    found = ran("compare", "full", "linear", "--length", "64k", "--on", "H100", "--json").json["lengths"][
        "65536"
    ]
    assert found["full"]["seconds"] > found["linear"]["seconds"] > 0
    assert "at least, H100" in ran("compare", "full", "--length", "1k", "--on", "H100").out


def test_cost_of_a_whole_model_has_its_parts() -> None:
    found = ran(
        "cost", "full", "--model", TINY, "--length", "128", "--training", "--on", "A100 80GB", "--json"
    ).json
    cost = found["costs"]["128"]
    assert {"attention", "projections", "ffn"} <= set(cost["parts"])
    total = sum(part["flops"]["forward"] for part in cost["parts"].values())
    assert total == cost["total"]["flops"]["forward"]
    assert cost["time"]["kind"] == "lower bound"
    assert "attention" in ran("cost", "full", "--model", TINY, "--length", "128").out


def test_crossover_of_full_and_linear_is_the_head_size() -> None:
    found = ran("crossover", "full", "linear", "--json").json["crossover"]
    assert found["length"] == 64
    assert "linear costs no more than full from 64 tokens on" in ran("crossover", "full", "linear").out
    assert ran("crossover", "full", "rnn", "--heads", "8", "--json").json["crossover"]["length"] == 512
    assert "is cheaper up to" in ran("crossover", "linear", "full", "--at-most", "4k").out


def test_plan_ranks_and_says_why_not() -> None:
    arguments = ("plan", "--model", TINY, "--length", "4k", "--on", "H100", "--needs", "segment_ids")
    found = ran(*arguments, "--json").json
    assert found["best"]["mechanism"] in MECHANISMS
    assert {each["mechanism"]["name"] for each in found["rejected"]} >= {"longformer", "linformer"}
    assert {each["longest"] for each in found["ranked"]} == {None}
    shown = ran(*arguments)
    assert shown.code == 0
    assert "not these" in shown.out
    assert f"take {found['best']['mechanism']}" in shown.out


def test_plan_says_how_long_a_sequence_fits() -> None:
    arguments = (
        "--model",
        TINY,
        "--length",
        "1k",
        "--on",
        "RTX 3090",
        "--usable",
        "0.001",
        "--no-patterns",
    )
    ranked = ran("plan", *arguments, "--longest", "--json").json["ranked"]
    assert ranked
    for each in ranked:
        limit = each["longest"]
        assert 1024 <= limit["length"] < 2**20
        assert each["candidate"]["memory"]["weights"] == limit["memory"]["weights"]
    assert ran("plan", *arguments[:-3], "--usable", "1e-9").out.rstrip().endswith("or more memory")


def test_calibrate_writes_a_device_that_other_commands_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("efficient_attn.planning.calibration.PRODUCT_SIZES", (256,))
    monkeypatch.setattr("efficient_attn.planning.calibration.COPIED_BYTES", 2**20)
    out = tmp_path / "device.json"
    found = ran("calibrate", "--seconds", "0.02", "--out", out, "--json")
    assert found.code == 0, found.err
    assert found.json["flops_per_second"] > 0
    assert "use it with --on" in found.err
    estimate = ran("compare", "full", "--length", "1k", "--on", out, "--json")
    assert estimate.json["lengths"]["1024"]["full"]["seconds"] > 0


@pytest.mark.parametrize(
    ("complaint", "arguments"),
    [
        ("the following arguments are required: COMMAND", []),
        ("invalid choice: 'bnech'", ["bnech"]),
        ("unknown mechanism 'nystrom'", ["info", "nystrom"]),
        ("full has no option 'window'", ["info", "full:window=3"]),
        ("window_size must be >= 1, got 0", ["cost", "sliding_window:window_size=0"]),
        ("at least 1, got 0", ["cost", "full", "--length", "0"]),
        (
            "num_kv_heads must divide num_heads = 8, got 3",
            ["cost", "full", "--heads", "8", "--kv-heads", "3"],
        ),
        ("backend must be one of", ["cost", "full", "--backend", "magic"]),
        ("--on: estimates are for whole models", ["cost", "full", "--on", "H100"]),
        ("linformer: ", ["cost", "linformer", "--causal"]),
        ("unknown mechanism 'x'", ["compare", "x"]),
        ("at least 1, got -4", ["compare", "--length", "-4"]),
        ("unknown mechanism 'gru2'", ["crossover", "full", "gru2"]),
        ("--metric seconds: say where", ["crossover", "full", "linear", "--metric", "seconds"]),
        ("invalid choice: 'speed'", ["crossover", "full", "linear", "--metric", "speed"]),
        ("required: --model, --length, --on", ["plan"]),
        ("must be one of RTX 3090", ["plan", "--model", TINY, "--length", "8", "--on", "abacus"]),
        ("above 0, at most 1", ["plan", "--model", TINY, "--length", "8", "--on", "H100", "--usable", "2"]),
        ("unknown mechanism 'warp'", ["calibrate", "warp"]),
        ("above 0 and below 3600, got 0", ["calibrate", "--seconds", "0"]),
        ("cannot write", ["calibrate", "--out", "/dev/null/device.json"]),
        ("invalid choice: 'tpu'", ["env", "--device", "tpu"]),
        ("unrecognized arguments: --loud", ["list", "--loud"]),
    ],
)
def test_what_the_caller_got_wrong_is_said_and_is_status_2(complaint: str, arguments: list[str]) -> None:
    refused(complaint, *arguments)


def test_the_command_runs_as_a_module_and_loads_no_library_that_is_extra() -> None:
    program = (
        "import json, sys, torch; before = set(sys.modules)\n"
        "from efficient_attn.cli.main import main; main(['list', '--json'])\n"
        "print(json.dumps(sorted({'rich', 'matplotlib'} & (set(sys.modules) - before))), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(run.stderr) == []
    module = subprocess.run(
        [sys.executable, "-m", "efficient_attn.cli", "cost", "none"], cwd=ROOT, capture_output=True, text=True
    )
    assert module.returncode == 2
    assert "unknown mechanism 'none'" in module.stderr


def test_every_device_can_be_named() -> None:
    for name in DEVICES:
        assert ran("compare", "full", "--length", "64", "--on", name).code == 0


def test_full_is_counted_by_the_pairs_of_its_mask() -> None:
    """The commands and the library cannot disagree: both say 2 (E + Ev) for each pair, causal or not."""
    cost = FullAttention(is_causal=True).cost(Shape(1, 8, 1024, 1024, 64))
    found = ran("cost", "full", "--causal", "--length", "1k", "--json").json["costs"]["1024"]
    assert found["flops"]["forward"] == cost.flops.forward == 2 * 2 * 64 * 8 * (1024 * 1025 // 2)
