"""Training that can be stopped at any moment and continued to the very same weights."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import signal
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import DemoError
from .data import Corpus, count_characters
from .model import LanguageModel, Settings, build_model, mechanism_options

WARMUP = 0.05
FINAL_RATE = 0.1
MAX_GRADIENT_NORM = 1.0


class Interrupted(Exception):
    """Training stopped at the user's request, after its checkpoint was written."""

    def __init__(self, name: str, step: int, signum: int) -> None:
        super().__init__(f"stopped {name} at step {step}")
        self.name, self.step, self.signum = name, step, signum


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a flag, so no step is cut in half; a second acts at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum


@dataclass
class Run:
    """One mechanism's model, and what its training has cost so far."""

    name: str
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    initial_sha256: str
    step: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)


class Checkpoints:
    """One file per mechanism in `directory`, replaced in one move: a crash leaves the previous one."""

    def __init__(
        self, directory: Path, settings: Settings, corpus: Corpus, say: Callable[[str], None]
    ) -> None:
        self.directory, self.settings, self.say = directory, settings, say
        self.identity = {**settings.training(), "data": corpus.sha256}
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DemoError(f"--out {directory}: cannot be used: {error.strerror}") from None

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.pt"

    def save(self, run: Run) -> None:
        content = {
            "identity": self._identity(run.name),
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "step": run.step,
            "seconds": run.seconds,
            "history": run.history,
            "initial_sha256": run.initial_sha256,
        }
        write_atomically(self.path(run.name), lambda path: torch.save(content, path))

    def restore(self, run: Run) -> None:
        """Continues `run` from its checkpoint, if it has a sound one.

        Raises:
            DemoError: if the checkpoint belongs to another run: its settings differ.
        """
        path = self.path(run.name)
        if not path.exists():
            return
        content = self._read(path)
        if content is None:
            return
        expected = self._identity(run.name)
        found = content["identity"]
        different = [
            f"{key} was {found.get(key)!r}, is {expected.get(key)!r}"
            for key in sorted(expected.keys() | found.keys())
            if found.get(key) != expected.get(key)
        ]
        if different:
            raise DemoError(
                f"{path} is from another run ({'; '.join(different)}): choose another --out, or delete it"
            )
        run.model.load_state_dict(content["model"])
        run.optimizer.load_state_dict(content["optimizer"])
        run.step, run.seconds = content["step"], content["seconds"]
        run.history = [(step, bits) for step, bits in content["history"]]
        run.initial_sha256 = content["initial_sha256"]

    def _identity(self, name: str) -> dict[str, Any]:
        return {**self.identity, "mechanism": name, **mechanism_options(name, self.settings.context)}

    def _read(self, path: Path) -> dict[str, Any] | None:
        """The content, or None after moving a damaged file aside, where it can still be looked at."""
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
                broken = archive.testzip()
            if broken is not None:
                raise zipfile.BadZipFile(f"checksum of {broken}")
            content = torch.load(path, weights_only=True)
            if not isinstance(content, dict) or "identity" not in content:
                raise pickle.UnpicklingError("not a checkpoint of this program")
            return content
        except PermissionError as error:
            raise DemoError(f"{path}: cannot be read: {error.strerror}") from None
        except (
            zipfile.BadZipFile,
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            ValueError,
            KeyError,
        ) as error:
            number = 1
            while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
                number += 1
            os.replace(path, aside)
            self.say(f"{path.name} is damaged ({error}): kept as {aside.name}, {path.stem} starts again")
            return None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `path`, then moves over it: at every moment `path` is the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DemoError(f"{path}: cannot be written: {error.strerror}") from None


def start(name: str, settings: Settings) -> Run:
    """A fresh run at step 0: the same shared weights for every mechanism of the same settings."""
    model = build_model(name, settings)
    digest = hashlib.sha256()
    for weight in model.shared_weights().values():
        digest.update(weight.detach().numpy().tobytes())
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    return Run(name, model, optimizer, digest.hexdigest())


def train(
    run: Run,
    settings: Settings,
    corpus: Corpus,
    checkpoints: Checkpoints,
    stop: Callable[[], int | None],
    report: Callable[[int, float], None],
) -> None:
    """Trains `run` from where it stands to the last step, evaluating and saving on the way.

    Raises:
        Interrupted: after saving, once `stop` gives the number of a signal.
        DemoError: if the loss is not finite.
    """
    windows = corpus.validation_windows(settings.windows, settings.context)
    every = max(1, settings.steps // settings.evaluations)
    while run.step < settings.steps:
        if (signum := stop()) is not None:
            checkpoints.save(run)
            raise Interrupted(run.name, run.step, signum)
        began = time.perf_counter()
        loss = _train_step(run, settings, corpus)
        run.seconds += time.perf_counter() - began
        if not math.isfinite(loss):
            raise DemoError(
                f"{run.name}: the loss is {loss} at step {run.step}; try a smaller --learning-rate"
            )
        run.step += 1
        if run.step % every == 0 or run.step == settings.steps:
            bits = bits_per_character(evaluate(run.model, windows, settings.batch_size), windows)
            run.history.append((run.step, bits))
            checkpoints.save(run)
        report(run.step, loss)


def _train_step(run: Run, settings: Settings, corpus: Corpus) -> float:
    for group in run.optimizer.param_groups:
        group["lr"] = settings.learning_rate * _schedule(run.step / settings.steps)
    tokens = corpus.batch(
        seed=settings.seed, step=run.step, batch_size=settings.batch_size, context=settings.context
    )
    loss = next_byte_loss(run.model, tokens)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRADIENT_NORM)
    run.optimizer.step()
    return loss.item()


def next_byte_loss(model: LanguageModel, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def _schedule(progress: float) -> float:
    if progress < WARMUP:
        return (progress + 1e-3) / WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
    return FINAL_RATE + (1 - FINAL_RATE) * cosine


@torch.no_grad()
def evaluate(model: LanguageModel, windows: Tensor, batch_size: int) -> Tensor:
    """Bits (windows, context) that the model pays for each byte of each window."""
    model.eval()
    bits = [next_byte_bits(model(batch[:, :-1]), batch[:, 1:]) for batch in windows.split(batch_size)]
    model.train()
    return torch.cat(bits)


def next_byte_bits(logits: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(logits.double().flatten(0, -2), following.flatten(), reduction="none").view_as(
        following
    ) / math.log(2)


def bits_per_character(bits: Tensor, windows: Tensor) -> float:
    """Total bits over total characters, for bits of any suffix of the windows' bytes."""
    return float(bits.sum() / count_characters(windows[:, -bits.shape[1] :]).sum())
