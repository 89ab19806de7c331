"""Devices, the longest sequences and times, against figures derived by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from efficient_attn import Attention, FullAttention, LinformerAttention
from efficient_attn.planning import (
    DEVICES,
    MODELS,
    Device,
    MechanismSpec,
    Model,
    calibrate,
    estimate_time,
    load_device,
    max_seq_len,
    model_cost,
    save_device,
    sent_bytes,
)

H100 = DEVICES["H100"]
SMALL = replace(MODELS["gpt2-small"], mechanism="flash")


@pytest.mark.parametrize(
    ("name", "tflops", "gb_per_second", "gb"),
    [
        ("RTX 3090", 71, 936, 24),
        ("RTX 4090", 165, 1008, 24),
        ("A100 40GB", 312, 1555, 40),
        ("A100 80GB", 312, 2039, 80),
        ("H100", 989, 3350, 80),
        ("H200", 989, 4800, 141),
        ("B200", 2250, 8000, 180),
        ("MI300X", 1307, 5300, 192),
    ],
)
def test_profiles_are_those_of_the_datasheets(name: str, tflops: int, gb_per_second: int, gb: int) -> None:
    device = DEVICES[name]
    assert device.flops_per_second == tflops * 10**12
    assert device.bytes_per_second == gb_per_second * 10**9
    assert device.memory_bytes == gb * 10**9, "GB of a datasheet, not GiB"
    assert device.kind == "datasheet" and len(device.source) > 10
    assert device.balance == pytest.approx(1000 * tflops / gb_per_second)


@pytest.mark.parametrize(("training", "checkpointing"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", ["full", "sliding_window", "linear"])
def test_one_token_more_does_not_fit(name: str, training: bool, checkpointing: bool) -> None:
    model, device = MODELS["gpt2-small"].with_mechanism(name), DEVICES["RTX 4090"]
    call = {"training": training, "checkpointing": checkpointing}
    limit = max_seq_len(model, device, usable=0.5, **call)
    assert limit.budget == 12 * 10**9
    for length, fits in ((limit.length, True), (limit.length + 1, False)):
        memory = model_cost(model, 1, length, **call).memory
        assert (memory.total <= limit.budget) == fits
    assert limit.memory == model_cost(model, 1, limit.length, **call).memory
    assert limit.bound_by in limit.memory.as_dict()


def test_the_limit_of_a_cache_is_derived_by_hand() -> None:
    """A stack of attention alone: weights, 4 n d bytes of cache a layer, and the workspace of one layer."""
    layers, width = 10, 512
    model = Model(layers, width, 8, ffn_dim=0, norm="none", bias=False, mechanism="flash")
    weights = layers * 4 * width**2 * 2
    # 3 streams, q, k, v, output, merged heads, of 2 bytes; a log-sum for each head and row, of 4.
    per_token = layers * 4 * width + 8 * 2 * width + 8 * 4
    for gib in (1, 8):
        budget = gib * 2**30
        assert max_seq_len(model, budget).length == (budget - weights) // per_token
    assert max_seq_len(model, budget, batch=4).length == (budget - weights) // (4 * per_token)
    assert max_seq_len(model, 2**30).bound_by == "state"


def test_what_does_not_fit_at_all_and_what_ends_the_search() -> None:
    none = max_seq_len(MODELS["llama-3-8b"], H100, training=True)
    assert (none.length, none.bound_by) == (0, "optimizer")
    ended = max_seq_len(SMALL, H100, at_most=1000)
    assert (ended.length, ended.bound_by) == (1000, "at_most")
    layer = Attention(64, 4, LinformerAttention(300, 4, rank=8))
    taken = max_seq_len(layer, H100)
    assert (taken.length, taken.bound_by) == (300, "mechanism")


def test_checkpointing_and_windows_lengthen() -> None:
    plain = max_seq_len(SMALL, H100, training=True).length
    assert max_seq_len(SMALL, H100, training=True, checkpointing=True).length > plain
    window = SMALL.with_mechanism(MechanismSpec("sliding_window", {"window_size": 128}))
    assert max_seq_len(window, H100).length > max_seq_len(SMALL, H100).length


def test_time_is_the_roofline_of_each_part() -> None:
    device = Device("toy", 10**12, 10**9, 10**12, source="made up", kind="datasheet")
    model = Model(2, 64, 4, vocab_size=100, mechanism="flash")
    for training, passes in ((False, 1), (True, 3)):
        cost = model_cost(model, 1, 512, training=training)
        time = estimate_time(model, device, seq_len=512, training=training)
        for name, part in cost.parts.items():
            compute, traffic = part.flops.total / 1e12, passes * (part.bytes_read + part.bytes_written) / 1e9
            assert time.parts[name] == pytest.approx(max(compute, traffic)), name
            assert time.bound_by[name] == ("compute" if compute > traffic else "traffic")
        assert time.seconds == pytest.approx(sum(time.parts.values()))
        assert time.kind == "lower bound" and "made up" in time.provenance
    checkpointed = estimate_time(model, device, seq_len=512, training=True, checkpointing=True)
    assert checkpointed.seconds > time.seconds
    assert estimate_time(model, replace(device, kind="measured"), seq_len=512).kind == "estimate"


def test_a_token_of_llama_takes_the_time_of_its_weights() -> None:
    time = estimate_time(MODELS["llama-3-8b"], H100, seq_len=1, phase="decode")
    weights = (8_030_261_248 - 128_256 * 4096) * 2  # of the embedding one row is read
    assert time.seconds == pytest.approx(weights / 3.35e12, rel=1e-3)
    assert set(time.bound_by.values()) == {"traffic"}


def test_measured_rates_of_mechanisms_are_used() -> None:
    model = Model(4, 512, 8, mechanism=["full", "full", "full", "sliding_window"])
    rates = {"FullAttention": 10**10, "SlidingWindowAttention": 10**9}
    device = Device("toy", 10**11, 10**12, 10**12, source="", mechanism_flops_per_second=rates)
    flops = model_cost(model, 1, 4096).parts["attention"].flops.total
    seconds = estimate_time(model, device, seq_len=4096).parts["attention"]
    assert seconds == pytest.approx(flops * (3 / 4 / 1e10 + 1 / 4 / 1e9))


def test_calibration_measures_and_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    device = calibrate(seconds=1e-3, mechanisms=["full", "linformer", "performer"], path=path)
    assert load_device(path) == device
    assert device.kind == "measured" and device.type == "cpu" and device.dtype == "float32"
    assert f"torch {torch.__version__}" in device.source and "threads" in device.source
    # An order of magnitude that holds for any machine: timings themselves are not asserted.
    assert 10**6 < device.flops_per_second < 10**16 and 10**6 < device.bytes_per_second < 10**14
    rates = device.mechanism_flops_per_second
    assert set(rates) == {"FullAttention", "LinformerAttention", "PerformerAttention"}
    assert "estimate" in estimate_time(SMALL, device, seq_len=128).kind


def test_files_that_hold_no_device_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    for text, message in (
        ("not json", "path must hold a device as JSON"),
        ("[]", "of format 1"),
        (json.dumps({"format": 2}), "of format 1"),
        (json.dumps({"format": 1, "name": "x"}), "fields of a device"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_device(path)
    save_device(H100, path)
    assert load_device(path) == H100


def test_ranks_send_keys_and_values_around_the_ring() -> None:
    model = MODELS["llama-3-8b"].with_mechanism("flash")
    shard = 8192 // 4
    assert sent_bytes(model, 1, 8192, 4) == 32 * 3 * shard * 8 * (128 + 128) * 2
    assert sent_bytes(model, 1, 8192, 1) == 0
    window = model.with_mechanism(MechanismSpec("sliding_window", {"window_size": 512}))
    assert (
        sent_bytes(window, 2, 8192, 4)
        == sent_bytes(window, 2, 2**20, 4)
        == 2 * 32 * 8 * 2 * 512 * 128 * 3 // 4 * 2
    )
    linear = model.with_mechanism("linear")
    assert sent_bytes(linear, 1, 8192, 4) == 32 * 8 * math.ceil(2 * 128**2 * 3 / 4) * 4, "states are in fp32"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: max_seq_len(SMALL, "H100"), TypeError, "device must be a Device or bytes"),
        (lambda: max_seq_len(SMALL, 0), ValueError, "device must be >= 1, got 0"),
        (lambda: max_seq_len(SMALL, H100, usable=1.5), ValueError, r"usable must be in \(0, 1\], got 1.5"),
        (lambda: max_seq_len(SMALL, H100, at_most=0), ValueError, "at_most must be >= 1"),
        (lambda: estimate_time(SMALL, "H100", seq_len=8), TypeError, "device must be a planning.Device"),
        (lambda: Device("x", 0, 1, 1, source=""), ValueError, "flops_per_second must be >= 1, got 0"),
        (lambda: Device("x", 1, 1, 1, source="", kind="rumour"), ValueError, "kind must be one of"),
        (lambda: Device("x", 1, 1, 1.5, source=""), TypeError, "memory_bytes must be an int, got 1.5"),
        (lambda: calibrate("tpu"), ValueError, "device must be one of"),
        (lambda: calibrate(seconds=0), ValueError, "seconds must be a positive number, got 0"),
        (lambda: calibrate(mechanisms=["fast"]), ValueError, "mechanisms must be one of"),
        (lambda: save_device("H100", "x.json"), TypeError, "device must be a planning.Device"),
        (
            lambda: sent_bytes(Attention(8, 2, FullAttention()), 1, 8, 0),
            ValueError,
            "ranks must be >= 1, got 0",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
