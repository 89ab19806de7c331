"""How words become lengths, mechanisms, models and devices."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from efficient_attn.cli import arguments
from efficient_attn.cli.arguments import CommandError, checked_out, lengths, mechanism, spelled, whole
from efficient_attn.planning import DEVICES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", (4096,)),
        ("64k", (65_536,)),
        ("1M", (1_048_576,)),
        ("16_384", (16_384,)),
        ("1k,2k", (1024, 2048)),
        ("2k,1k,1024", (1024, 2048)),
        ("1k:8k:x2", (1024, 2048, 4096, 8192)),
        ("1k:8k", (1024, 2048, 4096, 8192)),
        ("1k:1M:x4", (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)),
        ("100:450:x2", (100, 200, 400)),
        ("100:400:+100,7", (7, 100, 200, 300, 400)),
    ],
)
def test_lengths(text: str, expected: tuple[int, ...]) -> None:
    assert lengths(text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0", "at least 1, got 0"),
        ("-5", "at least 1, got -5"),
        ("", "whole number such as"),
        ("1.5k", "whole number such as"),
        ("4096x", "whole number such as"),
        ("1k:2k:3", "FIRST:LAST:xFACTOR"),
        ("1k:2k:x2:x2", "FIRST:LAST:xFACTOR"),
        ("1k:2k:x1", "factor of at least 2"),
        ("1k:2k:x0", "at least 1, got 0"),
        ("2k:1k:x2", "must not end before it begins"),
        ("1:1M:+1", "at most 1000 lengths"),
    ],
)
def test_lengths_that_are_none(text: str, complaint: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        lengths(text)


def test_a_mechanism_with_its_options_and_back() -> None:
    found = mechanism("longformer:window_size=1k,global_tokens=(0, 1, 40)")
    assert found.name == "longformer"
    assert found.options == {"window_size": 1024, "global_tokens": (0, 1, 40)}
    assert mechanism(spelled(found)) == found
    assert mechanism("sparse_transformer:pattern=fixed,stride=8").options == {"pattern": "fixed", "stride": 8}
    assert mechanism("full").options == {}


@pytest.mark.parametrize(
    ("convert", "text", "complaint"),
    [
        (mechanism, "slidng_window", "unknown mechanism 'slidng_window'.*did you mean sliding_window"),
        (mechanism, "sliding_window:512", "must be OPTION=VALUE, got '512'"),
        (arguments.model, "gpt-17", "unknown model 'gpt-17'"),
        (arguments.model, "layers=3", "unknown field of a model 'layers'.*num_layers"),
        (arguments.model, "num_layers=3", "missing"),
        (arguments.device, "H9000", "must be one of RTX 3090.*calibrate wrote"),
        (arguments.dtype, "int8", "unknown dtype 'int8'"),
        (whole, "many", "whole number"),
    ],
)
def test_what_is_not_known_is_named_with_what_is(
    convert: Callable[[str], Any], text: str, complaint: str
) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        convert(text)


def test_devices_and_models_by_name() -> None:
    assert arguments.device("h100") is DEVICES["H100"]
    assert arguments.device("a100_80gb") is DEVICES["A100 80GB"]
    small = arguments.model("num_layers=2,embed_dim=512,num_heads=8,dtype=float16,is_causal=False")
    assert (small.num_layers, small.embed_dim, small.dtype, small.is_causal) == (2, 512, torch.float16, False)


def test_a_file_that_is_no_device_is_named(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_text("{}")
    with pytest.raises(argparse.ArgumentTypeError, match=r"device\.json"):
        arguments.device(str(path))


def test_a_path_is_tried_before_anything_is_computed(tmp_path: Path) -> None:
    assert checked_out(tmp_path / "new" / "a.json") == tmp_path / "new" / "a.json"
    assert not (tmp_path / "new" / "a.json").exists(), "a file that was not there is not left behind"
    (tmp_path / "kept").write_text("kept")
    checked_out(tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "kept"
    with pytest.raises(CommandError, match="is a directory"):
        checked_out(tmp_path)
    with pytest.raises(CommandError, match="cannot write"):
        checked_out(tmp_path / "kept" / "below a file")
    with pytest.raises(CommandError, match="cannot write"):
        checked_out(tmp_path / "kept", folder=True)
