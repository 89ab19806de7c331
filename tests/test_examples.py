"""The examples of swapping attention: each runs, and what it prints is so. (`test_demo.py` has the other one.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
NUMBER = r"[\d,]+(?:\.\d+)?(?:e[+-]\d+)?%?"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def printed(name: str) -> str:
    done = run(name, "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(output: str, start: str) -> list[float]:
    """Those at the end of the last line that begins with `start`."""
    line = [line for line in output.splitlines() if line.startswith(start)][-1].removeprefix(start)
    return [float(x.replace(",", "").rstrip("%")) for x in re.findall(rf"(?<![\w=])({NUMBER})(?!\w)", line)]


def measured(output: str, mechanism: str) -> list[list[float | None]]:
    """Error, error of the mean and mass kept, in each table of `measure_approximation`."""
    rows = re.findall(rf"^\S+ +{mechanism} +([\d.]+) +([\d.]+) +([\d.]+|-)$", output, re.MULTILINE)
    assert rows
    return [[None if x == "-" else float(x) for x in row] for row in rows]


def test_an_encoder_is_equal_under_exact_mechanisms_and_restored_bit_for_bit() -> None:
    output = printed("swap_torch_encoder")
    for exact in ("full", "flash", "sliding_window, window_size=64"):
        assert max(numbers(output, exact)) < 1e-4, exact
    assert min(numbers(output, "sliding_window, window_size=8")) > 1e-2
    assert all(0 < mass < 1 and error > 0 for error, _, mass in measured(output, "SlidingWindowAttention"))
    assert "restored: outputs and gradients are the same in every bit" in output


def test_a_vision_transformer_wins_accuracy_back() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    output = printed("swap_vit_digits")
    (before,) = numbers(output, "360 held-out images, 17 tokens each; accuracy of the trained model:")
    assert before > 0.8
    assert numbers(output, "(no swap)")[0] == before
    # the class token does not see the image through a window, so that this one must lose most
    after = {name: numbers(output, name) for name in ("longformer", "sliding_window", "linear")}
    assert after["sliding_window"][0] < 0.5 * before
    assert after["longformer"][0] > after["sliding_window"][0]
    assert all(finetuned > swapped for swapped, finetuned in after.values() if swapped < before)
    assert all(mass is None for *_, mass in measured(output, "LinearAttention"))
    assert "for every mechanism that had lost some: True" in output


def test_a_language_model_wins_its_loss_back_and_generates_in_constant_memory() -> None:
    pytest.importorskip("transformers")
    output = printed("swap_language_model")
    losses, caches = output.split("bytes of the cache")
    before, longer = numbers(losses, "(no swap)")
    assert 1 < longer < before < 4
    for name in ("sliding_window", "linear"):
        trained, swapped, transferred, finetuned, share = numbers(losses, name)
        assert trained == before
        assert swapped > trained
        assert finetuned < transferred < swapped + 0.01
        assert share > 50
        short, long, difference = numbers(caches, name)
        assert short == long > 0
        assert difference < 1e-3
    short, long, _ = numbers(caches, "(no swap)")
    keys_and_values = 2 * 2 * 2 * 16 * 4  # of two layers and two heads of 16, in fp32
    assert long - short == (128 - 32) * keys_and_values
    for errors in re.findall(r"^model\.layers\.\S+ +([\d.]+) +([\d.]+)$", losses, re.MULTILINE):
        assert float(errors[1]) < float(errors[0])


def test_bad_data_is_one_clear_line() -> None:
    pytest.importorskip("transformers")
    done = run("swap_language_model", "--quick", "--data", "nowhere.txt")
    assert done.returncode == 2
    assert done.stderr == "error: --data nowhere.txt: cannot be read: No such file or directory\n"
