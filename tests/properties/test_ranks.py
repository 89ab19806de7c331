"""Two ranks that train together, by DDP and by FSDP2, draw the same and take the gradients of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from properties.ranks import SAVED_AFTER, STEPS, WORLD, Model, batch_of, optimizer_of, train_step

TESTS = Path(__file__).parent.parent


def run_ranks(kind: str, folder: Path) -> None:
    """Both ranks to their end; if one fails, its words."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "properties.ranks", kind, str(number), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(WORLD)
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, "\n".join(text[-3000:] for text in said)


def on_one_process(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The gradients of each step on all rows, from the same initial parameters, which this writes down."""
    model = Model()
    torch.save(dict(model.named_parameters()), folder / "initial.pt")
    optimizer = optimizer_of(model)
    return [train_step(model, optimizer, batch_of(step)) for step in range(STEPS)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_draw_the_same_and_train_as_one_process(kind, tmp_path, record_property):
    expected = on_one_process(tmp_path)
    run_ranks(kind, tmp_path)
    # The ranks trained to the end, and from the checkpoint to the end once more.
    steps = [*range(STEPS), *range(SAVED_AFTER, STEPS)]
    compared = 0
    for number in range(WORLD):
        gradients = torch.load(tmp_path / f"gradients{number}.pt", weights_only=True)
        assert len(gradients) == len(steps)
        for step, actual in zip(steps, gradients, strict=True):
            assert actual.keys() == expected[step].keys()
            for name, gradient in actual.items():
                torch.testing.assert_close(gradient, expected[step][name], rtol=1e-9, atol=1e-12)
                compared += 1
        compared += json.loads((tmp_path / f"compared{number}.json").read_text())
    record_property("cases", compared)
