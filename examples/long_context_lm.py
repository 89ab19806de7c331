"""Trains the same small language model on real text with different attention, and compares what they cost.

    pip install -e '.[demo]'
    python examples/long_context_lm.py                     # 3 to 5 minutes on two cores, nothing to download
    python examples/long_context_lm.py --data book.txt --mechanisms full,longformer
    python examples/long_context_lm.py --quick             # does everything work? about 20 seconds

Writes checkpoints, results.json, results.png and report.html, one page with everything, to --out. Stop it with
Ctrl-C: the same command continues and ends with the same weights, for every batch is a function of (seed, step).
Only the seed and --threads decide them, not --jobs, which is how many mechanisms are trained at once.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lm import DemoError
from lm.audit import audit_leak, decode_difference, looking_ahead, sample
from lm.data import PYTHON_TOPICS, Corpus, bigram_bits, load_corpus
from lm.measure import layer_scaling, saved_bytes, state_bytes, training_step_peak
from lm.model import PRESETS, Settings, mechanism_options, select_mechanisms
from lm.parallel import train_side_by_side
from lm.report import as_json, crossover, plot, print_report, write_json
from lm.train import Checkpoints, Interrupted, Run, StopRequest, bits_per_character, evaluate, start, train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from efficient_attn.cli.figures import Data
from efficient_attn.cli.page import write_page


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        torch.set_num_threads(options.threads)
        settings = _settings(options)
        names, refused = select_mechanisms(options.mechanisms, settings)
        corpus = load_corpus(options.data, settings.context)
        prompt = _prompt(options.prompt, corpus, settings)
        for name, reason in refused.items():
            console.print(f"left out: {name} ({reason})", markup=False)
        results = _work(names, settings, corpus, prompt, options, console)
        results = as_json(results | {"environment": _environment(options)})
        write_json(results, options.out / "results.json")
        print_report(results, console)
        plot(results, options.out / "results.png")
        page = options.out / "report.html"
        write_page(Data(demo=results), page, title="Language models, one for each attention")
        written = ", ".join(str(options.out / name) for name in ("results.json", "results.png"))
        console.print(f"\nwrote {written} and {page}: open it in a browser", markup=False)
        return 0 if all(row["audit"]["exact"] for row in results["mechanisms"].values()) else 1
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(f"{stopped}; saved in {options.out}: run the same command again to continue", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print(f"stopped; what was saved in {options.out} continues with the same command", file=sys.stderr)
        return 130


def _work(
    names: list[str],
    settings: Settings,
    corpus: Corpus,
    prompt: Tensor,
    options: argparse.Namespace,
    console: Console,
) -> dict[str, Any]:
    windows = corpus.validation_windows(settings.windows, settings.context)
    runs = _train_all(names, settings, corpus, options, console)
    rows = _measure_all(runs, settings, windows, prompt, console)
    control = audit_leak(
        looking_ahead(runs[0].model, settings), windows[:1], settings.audit_positions, settings.seed
    )
    return {
        "settings": asdict(settings),
        "data": {
            "source": corpus.source,
            "sha256": corpus.sha256,
            "train_bytes": len(corpus.train),
            "validation_bytes": len(corpus.validation),
            "evaluated_bytes": windows[:, 1:].numel(),
            "held_out_lines_also_in_training": corpus.repeated_lines(),
        },
        "bigram_bits_per_character": bits_per_character(bigram_bits(corpus, windows), windows),
        "audit_control": asdict(control),
        "mechanisms": rows,
    }


def _train_all(
    names: list[str], settings: Settings, corpus: Corpus, options: argparse.Namespace, console: Console
) -> list[Run]:
    """Every mechanism's run, trained to the end: continued where it stood, and side by side if `jobs` allows."""
    columns = (
        TextColumn("{task.description:>28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with StopRequest() as stop, Progress(*columns, console=console) as progress:

        def say(line: str) -> None:
            progress.console.print(line, markup=False)

        checkpoints = Checkpoints(options.out, settings, corpus, say)
        runs = {name: start(name, settings) for name in names}
        tasks = {}
        for name, run in runs.items():
            checkpoints.restore(run)
            if run.step:
                done = run.step == settings.steps
                say(
                    f"{name}: {'trained already' if done else f'continues at step {run.step} of {settings.steps}'}"
                )
            tasks[name] = progress.add_task(
                f"train {name}", total=settings.steps, completed=run.step, note=""
            )

        def report(name: str, step: int, loss: float) -> None:
            progress.update(tasks[name], completed=step, note=f"loss {loss:.3f}")

        unfinished = [name for name, run in runs.items() if run.step < settings.steps]
        jobs = min(_jobs(options), len(unfinished))
        if jobs > 1:
            train_side_by_side(
                unfinished,
                settings,
                data=options.data,
                out=options.out,
                jobs=jobs,
                threads=options.threads,
                stop=stop,
                report=report,
            )
            for name in unfinished:
                checkpoints.restore(runs[name])
        for name in unfinished if jobs == 1 else ():
            advance = functools.partial(report, name)
            train(runs[name], settings, corpus, checkpoints, lambda: stop.signum, advance)
        if stop.signum is not None:
            raise Interrupted(names[-1], settings.steps, stop.signum)
    return list(runs.values())


def _jobs(options: argparse.Namespace) -> int:
    if options.jobs is not None:
        return options.jobs
    # Starting processes takes longer than a quick run's training.
    return 1 if options.preset == "quick" else max(1, (os.cpu_count() or 1) // options.threads)


def _measure_all(
    runs: list[Run], settings: Settings, windows: Tensor, prompt: Tensor, console: Console
) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    bits: dict[str, Tensor] = {}
    columns = (TextColumn("{task.description:>28}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        for run in runs:
            task = progress.add_task(f"measure {run.name}", total=2 + len(settings.scaling_lengths))
            bits[run.name] = evaluate(run.model, windows, settings.batch_size)
            rows[run.name] = _quality(run, settings, windows, bits[run.name], prompt)
            progress.advance(task)
            rows[run.name] |= {
                "train_step_peak_bytes": training_step_peak(run.name, settings),
                "saved_bytes": saved_bytes(run.name, settings),
                "state_bytes": state_bytes(run.name, settings),
            }
            progress.advance(task)
            rows[run.name]["scaling"] = layer_scaling(
                run.name, settings, lambda task=task: progress.advance(task)
            )
    _compare_with_full(rows, bits, windows)
    return rows


def _quality(run: Run, settings: Settings, windows: Tensor, bits: Tensor, prompt: Tensor) -> dict[str, Any]:
    audit = audit_leak(run.model, windows[: settings.audit_windows], settings.audit_positions, settings.seed)
    tokens = settings.batch_size * settings.context * run.step
    return {
        "options": mechanism_options(run.name, settings.context),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "initial_weights_sha256": run.initial_sha256,
        "steps": run.step,
        "history": run.history,
        "bits_per_character": bits_per_character(bits, windows),
        "bits_per_character_last_quarter": bits_per_character(bits[:, -(settings.context // 4) :], windows),
        "train_seconds": run.seconds,
        "train_tokens_per_second": tokens / run.seconds,
        "audit": {**asdict(audit), "exact": audit.exact},
        "decode_difference": decode_difference(run.model, windows[0, :-1]),
        "sample": asdict(sample(run.model, prompt, settings.sample_bytes, settings.seed)),
    }


def _compare_with_full(rows: dict[str, dict[str, Any]], bits: dict[str, Tensor], windows: Tensor) -> None:
    """Adds the difference to full attention on the same bytes, with its standard error over the windows."""
    for name, row in rows.items():
        row |= {"delta_to_full": None, "delta_standard_error": None, "crossover_length": None}
        if "full" not in rows:
            continue
        row["delta_to_full"] = row["bits_per_character"] - rows["full"]["bits_per_character"]
        per_window = (bits[name] - bits["full"]).mean(1)
        row["delta_standard_error"] = (
            float(per_window.std() / len(per_window) ** 0.5) if len(per_window) > 1 else None
        )
        if name != "full":
            row["crossover_length"] = crossover(rows["full"]["scaling"], row["scaling"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mechanisms", default="full,sliding_window,linear,performer", help="names with commas, or all")
    add("--data", type=Path, help="a UTF-8 text file (default: CPython's language documentation)")
    add(
        "--out",
        type=Path,
        default=Path("lm_out"),
        help="directory of checkpoints and results (default: lm_out)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_const", dest="preset", const="quick", help="a smoke run, 20 seconds"
    )
    size.add_argument(
        "--long", action="store_const", dest="preset", const="long", help="a real run, several hours"
    )
    add("--context", type=_positive, help="trained sequence length, in bytes")
    add("--steps", type=_positive, help="training steps of each mechanism")
    add("--learning-rate", type=float)
    add("--seed", type=int, default=0)
    add("--jobs", type=_positive, help="mechanisms trained at once (default: cores / threads; 1 if --quick)")
    add("--threads", type=_positive, default=1, help="CPU threads of each (default: 1)")
    add(
        "--prompt",
        help="what the trained models continue (default: a few words, or the start of the held-out part of --data)",
    )
    parser.set_defaults(preset="default")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _settings(options: argparse.Namespace) -> Settings:
    given = {name: getattr(options, name) for name in ("context", "steps", "learning_rate", "seed")}
    settings = replace(
        PRESETS[options.preset], **{name: value for name, value in given.items() if value is not None}
    )
    if settings.context < 32:
        raise DemoError(f"--context {settings.context}: at least 32")
    if not 0 < settings.learning_rate < 1:
        raise DemoError(f"--learning-rate {settings.learning_rate}: between 0 and 1")
    return settings


def _prompt(text: str | None, corpus: Corpus, settings: Settings) -> Tensor:
    length = min(64, settings.context // 2)
    if text is None and corpus.source == PYTHON_TOPICS:
        text = "The value of the "
    if text is None:
        return corpus.validation[:length].long()
    if not text:
        raise DemoError("--prompt: must not be empty")
    return torch.tensor(list(text.encode("utf-8"))[-length:])


def _environment(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": options.threads,
        "trained_at_once": _jobs(options),
        "peak_bytes_are": "CPU allocator records of torch.profiler",
    }


if __name__ == "__main__":
    sys.exit(main())
