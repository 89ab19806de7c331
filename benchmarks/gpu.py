"""Measures this library on an NVIDIA GPU against its peers, and says which targets are met.

    pip install -e '.[bench-gpu]'                   # and xformers, if there is one for your torch
    python benchmarks/gpu.py                        # everything: hours, most of them in compiling and tuning peers
    python benchmarks/gpu.py --judged               # what has a target, and nothing else
    python benchmarks/gpu.py --quick                # does everything work? below five minutes; judges nothing
    python benchmarks/gpu.py --only linear alone --minutes 9
    python benchmarks/gpu.py --list                 # what would be measured, and what is recorded already
    python benchmarks/gpu.py --tune                 # which config of each kernel is the fastest here

Without a CUDA device it says so and runs dry: every cell and every peer that can, at short lengths on the CPU with
the torch backends, judging nothing. Every number is measured in one process with its peer, in turns, after both were
compared with fp64; what runs out of memory or is not supported is recorded as such, and the run goes on. Each
finished cell is appended to --out at once: stop it with Ctrl-C, and the same command continues. A missed target is
shown, and is no error. `python benchmarks/page.py` makes benchmarks/README.md from the records.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks import plan_gpu
from benchmarks.harness.command import add_common, check_out, chosen, list_cells, positive, run, say
from benchmarks.harness.gpu_tables import GPU_LEGEND, gpu_tables
from benchmarks.harness.origin import described
from benchmarks.measure.accelerated import measure
from efficient_attn.benchmarking.records import Record, Records
from efficient_attn.benchmarking.tables import Table

RESULTS = Path(__file__).parent / "results"
DRY = "dry"
DRY_RUN = "A dry run on the CPU, at short lengths with the torch backends: it judges nothing."


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    cells = plan_gpu.cells(options.sections, options.effort)
    if options.tune:
        cells = plan_gpu.tuning(options.effort)
    if options.judged:
        cells = [cell for cell in cells if cell.target is not None]
    records = Records(options.out)
    if options.list:
        list_cells(cells, records)
        return 0

    def render(done: list[Record]) -> list[Table]:
        return gpu_tables(done, plan_gpu.targets(options.effort))

    say(_heading(described(plan_gpu.SIZES[options.effort].device), options.effort))
    seconds = None if options.minutes is None else 60.0 * options.minutes
    return run(cells, records, measure, options, render, GPU_LEGEND, seconds)


def _heading(found: dict[str, Any], effort: str) -> str:
    gpu, now = found.get("gpu"), found.get("gpu_now")
    why = "" if torch.cuda.is_available() else "There is no CUDA device here. "
    lines = [why + DRY_RUN if effort == DRY else ""]
    if gpu is not None:
        lines.append(
            f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, compute capability {gpu['capability']}, "
            f"CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}"
        )
    if now is not None:
        lines.append(", ".join(f"{name} {value}" for name, value in now.items()))
    lines += [
        f"{found['cpu']}, {found['usable_cores']} of {found['cores']} cores usable",
        ", ".join(f"{name} {version}" for name, version in found["libraries"].items()),
        f"commit {found['commit']}{', with uncommitted changes' if found['dirty'] else ''}",
        "every ratio is theirs / ours: above 1, ours is faster",
    ]
    return "\n".join(line for line in lines if line)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_common(parser, list(plan_gpu.SECTIONS), "gpu.jsonl, gpu-quick.jsonl or gpu-dry.jsonl")
    efforts = parser.add_mutually_exclusive_group()
    for effort, said in (("quick", "few short lengths"), (DRY, "on the CPU, even where there is a GPU")):
        flag = "--dry-run" if effort == DRY else f"--{effort}"
        efforts.add_argument(
            flag, action="store_const", dest="effort", const=effort, default="full", help=said
        )
    add("--judged", action="store_true", help="only what has a target")
    add("--tune", action="store_true", help="instead: time the configs of our kernels, into tune.jsonl")
    add("--minutes", type=positive, help="begin no cell after so many minutes")
    options = parser.parse_args(arguments)
    options.sections = chosen(parser, options.only, list(plan_gpu.SECTIONS))
    if not torch.cuda.is_available():
        options.effort = DRY
    if options.judged and (options.tune or options.effort != "full"):
        parser.error(f"--judged: {'tuning' if options.tune else f'a {options.effort} run'} has no targets")
    if options.out is None:
        name = "tune" if options.tune else "gpu"
        options.out = RESULTS / (
            f"{name}.jsonl" if options.effort == "full" else f"{name}-{options.effort}.jsonl"
        )
    check_out(parser, options.out)
    return options


if __name__ == "__main__":
    sys.exit(main())
