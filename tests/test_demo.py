"""The demo: it runs, stops and continues exactly, its audit catches leaks, it refuses bad input clearly."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
demo = importlib.import_module("long_context_lm")
lm = importlib.import_module("lm")
audit, data, model, report, train = (
    importlib.import_module(f"lm.{name}") for name in ("audit", "data", "model", "report", "train")
)

TINY = replace(
    model.PRESETS["quick"],
    context=32,
    d_model=16,
    num_layers=1,
    num_heads=2,
    batch_size=2,
    steps=9,
    windows=2,
)
COMMAND = [sys.executable, str(EXAMPLES / "long_context_lm.py"), "--quick", "--threads", "1"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "COLUMNS": "200"}


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


def test_quick_run_writes_complete_results_and_sees_no_future(tmp_path: Path) -> None:
    done = run_demo("--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for figure in ("quality", "learning", "layer-time", "matrix-full"):
        assert f'id="figure-{figure}"' in page
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["mechanisms"]) == {"full", "sliding_window", "linear", "performer"}
    assert results["audit_control"]["difference"] > 1e-4
    initial = {row["initial_weights_sha256"] for row in results["mechanisms"].values()}
    assert len(initial) == 1, "every mechanism starts from the same weights"
    for name, row in results["mechanisms"].items():
        assert name in done.stdout
        assert row["audit"]["exact"] is True
        assert row["audit"]["difference"] == 0
        assert row["audit"]["bits_teacher_forced"] == row["audit"]["bits_future_blanked"]
        assert row["audit"]["comparisons"] > 10_000
        assert row["decode_difference"] < 1e-4
        assert row["saved_bytes"]["declared"] == row["saved_bytes"]["measured"] > 0
        assert row["state_bytes"]["declared"] == row["state_bytes"]["measured"]
        assert row["train_step_peak_bytes"] > row["saved_bytes"]["measured"]
        assert 0 < row["bits_per_character"] < 8
        assert row["history"][-1] == [row["steps"], row["bits_per_character"]]
        assert len(row["sample"]["continuation"].encode()) >= results["settings"]["sample_bytes"]
        assert set(row["scaling"]) == {str(n) for n in results["settings"]["scaling_lengths"]}
        assert all(value > 0 for cell in row["scaling"].values() for value in cell.values())
    assert "0 exactly" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_saves_and_the_same_command_continues(tmp_path: Path, jobs: int) -> None:
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--mechanisms", "full,linear", "--steps", "300", "--jobs", str(jobs)]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # to every process, as a terminal does
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command" in errors
    assert "Traceback" not in errors
    assert list(out.glob("*.pt"))
    assert list(out.glob(".*")) == []

    done = run_demo(*arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "results.json").read_text())["mechanisms"]
    assert {row["steps"] for row in rows.values()} == {300}


def test_training_side_by_side_gives_the_weights_of_training_in_turn(tmp_path: Path) -> None:
    for name in ("full", "linear"):
        trained(tmp_path / "in turn", name)
    with train.StopRequest() as stop:
        importlib.import_module("lm.parallel").train_side_by_side(
            ["full", "linear"],
            TINY,
            data=None,
            out=tmp_path / "side by side",
            jobs=2,
            threads=torch.get_num_threads(),
            stop=stop,
            report=lambda name, step, loss: None,
        )
    for name in ("full", "linear"):
        alone, beside = (
            torch.load(tmp_path / how / f"{name}.pt", weights_only=True)
            for how in ("in turn", "side by side")
        )
        assert alone["history"] == beside["history"]
        for key, weight in alone["model"].items():
            assert torch.equal(weight, beside["model"][key]), key


def test_a_failure_in_one_process_reaches_the_user(tmp_path: Path) -> None:
    with train.StopRequest() as stop, pytest.raises(lm.DemoError, match="no-such-file"):
        importlib.import_module("lm.parallel").train_side_by_side(
            ["full", "linear"],
            TINY,
            data=tmp_path / "no-such-file.txt",
            out=tmp_path,
            jobs=2,
            threads=1,
            stop=stop,
            report=lambda name, step, loss: None,
        )


class Messages(list[str]):
    def __call__(self, message: str) -> None:
        self.append(message)


def trained(out: Path, name: str, *, stop_at: int | None = None, messages: Messages | None = None) -> Any:
    """A run of TINY in `out`, continued if it has begun there, stopped by a signal in step `stop_at`."""
    corpus = data.load_corpus(None, TINY.context)
    run = train.start(name, TINY)
    checkpoints = train.Checkpoints(out, TINY, corpus, Messages() if messages is None else messages)
    checkpoints.restore(run)

    def interrupt(step: int, _: float) -> None:
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)

    with train.StopRequest() as stop:
        train.train(run, TINY, corpus, checkpoints, lambda: stop.signum, interrupt)
    return run


@pytest.mark.parametrize("name", ["full", "performer"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    whole = trained(tmp_path / "whole", name)
    for stop_at in (1, 5):
        with pytest.raises(train.Interrupted) as stopped:
            trained(tmp_path / "parts", name, stop_at=stop_at)
        assert stopped.value.signum == signal.SIGINT
    resumed = trained(tmp_path / "parts", name)
    assert resumed.history == whole.history
    for key, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[key]), key
    for key, state in whole.optimizer.state_dict()["state"].items():
        assert torch.equal(state["exp_avg_sq"], resumed.optimizer.state_dict()["state"][key]["exp_avg_sq"])


def flip_a_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "one bit changed": flip_a_byte,
    "text": lambda content: b"not a checkpoint\n" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_set_aside_and_training_starts_again(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    whole = trained(tmp_path, "full")
    checkpoint = tmp_path / "full.pt"
    damaged = damage(checkpoint.read_bytes())
    checkpoint.write_bytes(damaged)
    messages = Messages()
    again = trained(tmp_path, "full", messages=messages)
    assert len(messages) == 1
    assert "full.pt is damaged" in messages[0]
    assert (tmp_path / "full.pt.damaged-1").read_bytes() == damaged
    assert again.history == whole.history


def test_a_checkpoint_of_another_program_is_set_aside(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "full.pt")
    messages = Messages()
    trained(tmp_path, "full", messages=messages)
    assert "not a checkpoint of this program" in messages[0]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(lm.DemoError, match="No space left on device"):
        train.write_atomically(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text() == "old"


SHORT, BINARY, LATIN = "short.txt", "zeros.bin", "latin.txt"
BAD_INPUTS = {
    "unknown mechanism": (["--mechanisms", "full,nystrom"], "unknown 'nystrom'; allowed: all, full, flash"),
    "no mechanism": (["--mechanisms", ""], "unknown ''"),
    "not causal": (
        ["--mechanisms", "linformer"],
        "linformer cannot model a language here: is_causal must be False",
    ),
    "no such file": (["--data", "nowhere.txt"], "nowhere.txt: cannot be read: No such file"),
    "a directory": (["--data", "."], "cannot be read: Is a directory"),
    "too short": (["--data", SHORT], "too short: 40 bytes, context 64 needs at least 2,600"),
    "empty": (["--data", os.devnull], "too short: 0 bytes"),
    "not UTF-8": (["--data", LATIN], "not UTF-8 text (byte 3:"),
    "binary": (["--data", BINARY], "not text (a zero byte at 0)"),
    "long context": (["--context", "100000"], "pydoc_data.topics: too short"),
    "tiny context": (["--context", "8"], "--context 8: at least 32"),
    "learning rate": (["--learning-rate", "nan"], "--learning-rate nan: between 0 and 1"),
    "empty prompt": (["--prompt", ""], "--prompt: must not be empty"),
    "out is a file": (["--out", SHORT], "--out short.txt: cannot be used"),
    "zero steps": (["--steps", "0"], "must be at least 1, got 0"),
    "steps no number": (["--steps", "many"], "invalid"),
    "zero threads": (["--threads", "0"], "must be at least 1, got 0"),
    "zero jobs": (["--jobs", "0"], "must be at least 1, got 0"),
    "two presets": (["--long"], "not allowed with argument"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_one_clear_line_and_no_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(SHORT).write_text("forty bytes of text are far too few.....")
    Path(LATIN).write_bytes(b"caf\xe9 \xe9t\xe9" * 1000)
    Path(BINARY).write_bytes(bytes(10_000))
    try:
        code = demo.main(["--quick", "--threads", "1", *arguments])
    except SystemExit as refused:  # argparse's way
        code = refused.code
    errors = capsys.readouterr().err
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_another_runs_checkpoint_is_refused_with_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, "full")
    before = (tmp_path / "full.pt").read_bytes()
    code = demo.main(["--quick", "--threads", "1", "--mechanisms", "full", "--out", str(tmp_path)])
    errors = capsys.readouterr().err
    assert code == 2
    assert "is from another run" in errors
    assert "context was 32, is 64" in errors
    assert (tmp_path / "full.pt").read_bytes() == before


class Leaky(nn.Module):
    """A causal model, and a trace of the whole sequence beside it: no gradient, one part in a million."""

    def __init__(self, causal: nn.Module) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, tokens: Tensor) -> Tensor:
        return self.causal(tokens) * (1 + 1e-6 * tokens.float().amax(-1)[:, None, None] / 255).detach()


def test_the_audit_is_exactly_zero_for_a_causal_model_and_not_for_a_leaky_one() -> None:
    windows = data.load_corpus(None, TINY.context).validation_windows(2, TINY.context)
    causal = model.build_model("full", TINY)
    assert audit.audit_leak(causal, windows, positions=8, seed=0).exact
    for leaky in (audit.looking_ahead(causal, TINY), Leaky(causal)):
        found = audit.audit_leak(leaky, windows, positions=8, seed=0)
        assert not found.exact
        assert found.difference > 0


def test_the_audit_does_not_pass_what_is_not_a_number() -> None:
    windows = data.load_corpus(None, TINY.context).validation_windows(1, TINY.context)
    broken = model.build_model("full", TINY)
    nn.init.constant_(broken.head.weight, math.nan)
    assert not audit.audit_leak(broken, windows, positions=4, seed=0).exact


def test_batches_are_a_function_of_seed_and_step() -> None:
    corpus = data.load_corpus(None, 32)

    def batch(seed: int, step: int) -> Tensor:
        return corpus.batch(seed=seed, step=step, batch_size=3, context=32)

    first = batch(0, 7)
    torch.rand(5)
    assert torch.equal(first, batch(0, 7))
    assert not torch.equal(first, batch(0, 8))
    assert not torch.equal(first, batch(1, 7))
    assert first.shape == (3, 33)


def test_the_corpus_is_cut_between_characters_and_bits_count_per_character(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("é€😀" * 1000, encoding="utf-8")
    corpus = data.load_corpus(path, 32)
    for part in (corpus.train, corpus.validation):
        text = bytes(part.tolist()).decode("utf-8")
        assert data.count_characters(part).item() == len(text)


def test_bigram_bits_are_those_counted_by_hand() -> None:
    # "aab": after a come a and b, once each; after b nothing. Two bytes are in use.
    tokens = torch.tensor(list(b"aab"), dtype=torch.uint8)
    corpus = data.Corpus("", "", tokens, tokens)
    bits = data.bigram_bits(corpus, torch.tensor([list(b"aaba")]))
    assert bits.tolist() == [[1.0, 1.0, 1.0]]  # (1 + 1) / (2 + 2) twice, then (0 + 1) / (0 + 2)


@pytest.mark.parametrize(
    ("full", "other", "expected"),
    [
        ([1, 4, 16], [2, 4, 8], 200),
        ([1, 2, 4], [2, 4, 8], None),
        ([4, 8, 16], [2, 4, 8], 100),
        ([4, 8, 64], [2, 16, 16], 252),  # faster, slower, faster again: what counts is from where it stays so
    ],
)
def test_crossover_is_where_full_stays_behind(
    full: list[int], other: list[int], expected: int | None
) -> None:
    def rows(times: list[int]) -> dict[int, dict[str, float]]:
        return {n: {"forward_backward_seconds": t} for n, t in zip((100, 200, 400), times, strict=True)}

    assert report.crossover(rows(full), rows(other)) == expected
