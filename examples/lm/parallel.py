"""Several mechanisms trained side by side, a process each: faster than sharing the cores inside small operators.

The weights do not depend on how many run at once: each process trains as it would alone.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from . import DemoError
from .data import load_corpus
from .model import Settings
from .train import Checkpoints, Interrupted, StopRequest, start, train

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def train_side_by_side(
    names: list[str],
    settings: Settings,
    *,
    data: Path | None,
    out: Path,
    jobs: int,
    threads: int,
    stop: StopRequest,
    report: Callable[[str, int, float], None],
) -> None:
    """Trains every mechanism of `names` to the end, `jobs` at a time; their checkpoints hold the result.

    Raises:
        Interrupted: if `stop` was requested; every process has saved by then.
        DemoError: if one of them failed; the others have saved.
    """
    context = multiprocessing.get_context("spawn")
    tasks, messages, halt = context.Queue(), context.Queue(), context.Value("i", 0)
    for name in [*names, *[None] * jobs]:
        tasks.put(name)
    arguments = (settings, data, out, threads, tasks, messages, halt)
    workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(jobs)]
    try:
        with _signals_held_back():
            for worker in workers:
                worker.start()
        interrupted = _follow(workers, messages, halt, stop, report)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
    if interrupted is not None:
        raise interrupted


def _follow(
    workers: Sequence[BaseProcess],
    messages: Any,
    halt: Any,
    stop: StopRequest,
    report: Callable[[str, int, float], None],
) -> Interrupted | None:
    """Passes on what the processes say until all have ended."""
    interrupted, failure = None, None
    while any(worker.is_alive() for worker in workers) or not messages.empty():
        if stop.signum is not None:
            halt.value = stop.signum
        try:
            kind, name, *rest = messages.get(timeout=0.1)
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                halt.value = halt.value or signal.SIGTERM
            continue
        if kind == "step":
            report(name, *rest)
        elif kind == "stopped":
            interrupted = interrupted or Interrupted(name, *rest)
        else:
            failure = failure or DemoError(*rest)
            halt.value = signal.SIGTERM
    died = [worker.exitcode for worker in workers if worker.exitcode]
    if died:
        failure = failure or DemoError(
            f"a training process ended with exit code {died[0]}; the same command continues"
        )
    if failure is not None:
        raise failure
    return interrupted


def _work(
    settings: Settings, data: Path | None, out: Path, threads: int, tasks: Any, messages: Any, halt: Any
) -> None:
    """One process: trains what it finds in `tasks`, until it finds None or is told to halt."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def stop() -> int | None:
        orphaned = parent is not None and not parent.is_alive()
        return signal.SIGTERM if orphaned else halt.value or None

    name = ""
    try:
        corpus = load_corpus(data, settings.context)
        checkpoints = Checkpoints(out, settings, corpus, lambda _: None)
        while (name := tasks.get()) is not None:

            def report(step: int, loss: float, name: str = name) -> None:
                messages.put(("step", name, step, loss))

            run = start(name, settings)
            checkpoints.restore(run)
            train(run, settings, corpus, checkpoints, stop, report)
    except Interrupted as stopped:
        messages.put(("stopped", stopped.name, stopped.step, stopped.signum))
    except DemoError as error:
        messages.put(("failed", name, str(error)))


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C (a terminal sends it to all): they are told to halt instead."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
