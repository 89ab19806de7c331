"""What a stranger's files, sizes and devices do to the command: an error in words, and nothing of theirs is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from efficient_attn import count_flops
from efficient_attn.planning import DEVICES, MODELS, MechanismSpec, max_seq_len, save_device
from tests.cli.running import ran, refused


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_file_of_another_tool_is_left_as_it_is(end: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"old": "precious settings"}' + end)
    refused(
        "holds no records, and is left as it is", "bench", "full", "--length", 64, "--quick", "--out", path
    )
    assert path.read_text() == '{"old": "precious settings"}' + end


def test_a_page_goes_to_what_a_link_points_to(tmp_path: Path) -> None:
    real, link = tmp_path / "real.html", tmp_path / "link.html"
    real.write_text("old")
    link.symlink_to(real)
    assert ran("report", "--out", link).code == 0
    assert link.is_symlink() and real.read_text().startswith("<!doctype html>")


def test_sizes_that_no_machine_has() -> None:
    refused("allocate", "info", "linear", "--length", "100M")
    refused("too big", "cost", "full", "--length", "99999999999999g")


def test_a_device_file_with_a_field_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    save_device(DEVICES["H100"], path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "mechanism_flops_per_second": [1]}))
    refused("mechanism_flops_per_second", "plan", "--model", "gpt2-small", "--length", 64, "--on", path)


def test_the_longest_text_to_decode_is_not_that_of_a_prefill() -> None:
    model = MODELS["llama-3-8b"].with_mechanism(MechanismSpec("linear"))
    decoded = max_seq_len(model, DEVICES["H100"], batch=8, phase="decode", at_most=2**20)
    assert decoded.length == 2**20 and decoded.bound_by == "at_most"
    assert max_seq_len(model, DEVICES["H100"], batch=8, at_most=2**20).length < 2**20


def test_products_that_torch_does_not_count_are_named() -> None:
    with pytest.raises(NotImplementedError, match="euclidean_dist"):
        count_flops(torch.cdist, torch.randn(300, 64), torch.randn(400, 64), strict=True)
    with pytest.raises(NotImplementedError, match="geqrf"):
        count_flops(torch.geqrf, torch.randn(8, 8), strict=True)
