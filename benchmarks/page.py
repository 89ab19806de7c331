"""Makes benchmarks/README.md, with its pictures, from the records of `benchmarks/cpu.py` and `benchmarks/gpu.py`.

    python benchmarks/page.py                       # reads results/cpu.jsonl, gpu.jsonl and tune.jsonl
    python benchmarks/page.py --summary README.md   # and puts the short table into the README
    python benchmarks/page.py --records FILE --gpu-records FILE --out FOLDER

Of each cell the newest record counts. Pictures need matplotlib; without it the page has tables alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plan, plan_gpu
from benchmarks.harness.gpu_tables import GPU_LEGEND, gpu_tables
from benchmarks.harness.tables import LEGEND, MET, MISSED, judged, tables, verdict
from benchmarks.summary import filled_in, summary
from efficient_attn.benchmarking.cells import BACKWARD, FORWARD, MEMORY, TRAINING, Cell, Target
from efficient_attn.benchmarking.records import OK, WRONG, Record, Records
from efficient_attn.benchmarking.tables import Table, markdown

HERE = Path(__file__).parent
INTRODUCTION = """\
# Benchmarks

Made by `python benchmarks/page.py` from `results/cpu.jsonl`: do not edit it. The numbers belong to the machine named
below; `make bench` measures yours, and `python benchmarks/cpu.py --help` says how to measure a part.

How a ratio is measured:

- Both sides get the same normal inputs (fp32, batch 1, 8 heads of 64, unless the row says otherwise). Masks, block
  tables, layouts and compilation are prepared outside what is timed.
- First both are checked, with fresh memory full of NaN: outputs and gradients of sampled rows against the definition in
  fp64. A peer that computes something else is marked WRONG, and still timed.
- Then they take turns in one process: ours, theirs, theirs, ours, and so on.
- Targets are data in `plan.py`. A missed one is shown as MISSED, not left out.

How to read a table:
"""
GPU_INTRODUCTION = """\
# On a GPU

From `results/gpu.jsonl` and `results/tune.jsonl`, which `python benchmarks/gpu.py` writes: bfloat16, batch 1, 16 heads,
D the head size. Beyond what holds on a CPU:

- Times are those of CUDA events, each call after a write that empties the L2 cache. Forward, backward, and both.
- flex_attention is compiled, tuned by Inductor, with the faster of two block sizes, its tables built beforehand.
- A matrix product and a copy, measured in the same process, say what the machine could do: the roofline.
- The gate compares every row up to 4,096 tokens, 256 beyond; ours is also WRONG at 1.5 times a right peer's error.

How to read a table:
"""

NO_GPU_RECORDS = """\
# On a GPU

Not measured yet. `python benchmarks/gpu.py` measures it, on a machine with an NVIDIA GPU; what it compares, and the
targets, are in `plan_gpu.py`.
"""


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    records, complaints = Records(options.records).read()
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    threads = sorted({record["cell"]["threads"] for record in records})
    newest = in_order_of(plan.cells(plan.SECTIONS, threads, "full"), newest_of_each(records))
    if not newest:
        print(f"no records of a full run in {options.records}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = draw(newest, options.out / "results")
    page = options.out / "README.md"
    text = page_of(newest, complaints, pictures)
    on_gpu, more = gpu_records(options.gpu_records)
    drawn = draw_gpu(on_gpu, options.out / "results")
    text += "\n" + (gpu_page_of(on_gpu, more, drawn) if on_gpu else NO_GPU_RECORDS)
    pictures += drawn
    page.write_text(text, encoding="utf-8")
    if options.summary is not None:
        options.summary.write_text(filled_in(options.summary.read_text(), summary(newest)))
    print(f"wrote {page}" + "".join(f" and {picture}" for picture in pictures))
    return 0


def newest_of_each(records: Sequence[Record]) -> list[Record]:
    """The last record of each cell of a full run, whatever machine or version it comes from."""
    newest = {Cell.from_identity(r["cell"]): r for r in records if r["cell"]["effort"] == "full"}
    return list(newest.values())


def gpu_records(paths: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """The newest of each cell in the order of the plan, from the files that are there, and all complaints."""
    found, complaints = [], []
    for path in paths:
        records, more = Records(path).read()
        found += records
        complaints += more
    planned = [*plan_gpu.cells(plan_gpu.SECTIONS, "full"), *plan_gpu.tuning("full")]
    return in_order_of(planned, newest_of_each(found)), complaints


def in_order_of(planned: Sequence[Cell], records: Sequence[Record]) -> list[Record]:
    """As the plan has them, section by section; cells that it no longer has come last."""
    place = {cell: i for i, cell in enumerate(planned)}
    return sorted(records, key=lambda record: place.get(Cell.from_identity(record["cell"]), len(place)))


def page_of(records: Sequence[Record], complaints: Sequence[str], pictures: Sequence[Path]) -> str:
    """The whole page."""
    made = tables(records, plan.targets("full"))
    found = [*where(records), "## Targets", targets_met(records, plan.target_of)]
    return _text(INTRODUCTION, LEGEND, found, made, complaints, pictures)


def gpu_page_of(records: Sequence[Record], complaints: Sequence[str], pictures: Sequence[Path]) -> str:
    """The part of the page about GPUs."""
    made = gpu_tables(records, plan_gpu.targets("full"))
    found = [*where_on_gpu(records), "## Targets on a GPU", targets_met(records, plan_gpu.target_of)]
    return _text(GPU_INTRODUCTION, GPU_LEGEND, found, made, complaints, pictures)


def _text(
    introduction: str,
    legend: Sequence[str],
    found: Sequence[str],
    made: Sequence[Table],
    complaints: Sequence[str],
    pictures: Sequence[Path],
) -> str:
    sentences = "\n".join(f"- {sentence}" for sentence in legend)
    parts = [introduction + "\n" + sentences, "## Where", *found]
    parts += [f"![{picture.stem}](results/{picture.name})" for picture in pictures]
    for table in made:
        parts += [f"## {table.title}", markdown(table)]
    if complaints:
        parts += ["## Damaged records", "\n".join(f"- {complaint}" for complaint in complaints)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def where(records: Sequence[Record]) -> list[str]:
    """The machines and versions, each with the number of cells that come from it."""
    described: Counter[str] = Counter()
    for record in records:
        found = record["environment"]
        libraries = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
        described[
            f"{found['cpu']}, {found['cores']} cores ({' '.join(found['flags'])}), {found['system']}; "
            f"Python {found['python']}, {libraries}; commit {commit_of(found)}; {found['date'][:10]}"
        ] += 1
    loads = [record["environment"]["load"][0] for record in records if record["environment"]["load"]]
    lines = [f"- {count} cells: {text}" for text, count in described.items()]
    busy = f"Load average while measuring: {min(loads):.1f} to {max(loads):.1f}." if loads else ""
    amx = any("amx_bf16" in record["environment"]["flags"] for record in records)
    half = any("avx512_bf16" in record["environment"]["flags"] for record in records)
    bf16 = f"bfloat16 in hardware: AMX {'yes' if amx else 'no'}, AVX512 {'yes' if half else 'no'}."
    return ["\n".join(lines), f"{busy} {bf16}".strip()]


def where_on_gpu(records: Sequence[Record]) -> list[str]:
    """The GPUs and versions, each with the number of cells that come from it."""
    described: Counter[str] = Counter()
    for record in records:
        found = record["environment"]
        gpu, libraries = found["gpu"], found["libraries"].items()
        described[
            f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}; "
            f"Python {found['python']}, {', '.join(f'{name} {version}' for name, version in libraries)}; "
            f"commit {commit_of(found)}; {found['date'][:10]}"
        ] += 1
    return ["\n".join(f"- {count} cells: {text}" for text, count in described.items())]


def commit_of(found: dict[str, Any]) -> str:
    """The commit of an environment, and whether there were changes beside it."""
    return (found["commit"] or "unknown")[:12] + (", with uncommitted changes" if found["dirty"] else "")


def targets_met(records: Sequence[Record], target_of: Callable[[Cell], Target | None]) -> str:
    """How many targets are met, and each one that is missed."""
    verdicts: Counter[str] = Counter()
    missed = []
    for record in records:
        cell = Cell.from_identity(record["cell"])
        target, found = target_of(cell), judged(record)
        if target is None:
            continue
        said = verdict(found[0], target) if found else "not measured"
        verdicts[said] += 1
        if found and said == MISSED:
            missed.append(f"- {cell.label}: {found[0]:.3g}x, target {target}")
    counts = f"{verdicts[MET]} met, {verdicts[MISSED]} missed, {verdicts['not measured']} not measured."
    return "\n".join([counts, "", *missed]).strip()


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """The pictures that the records suffice for."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    ratios, peaks = _ratio_lines(records), _memory_lines(records)
    drawn = []
    if ratios:
        title = "Forward pass, one thread: ours / peer"
        drawn.append(_picture(folder / "ratios.png", ratios, title, "times as fast", 1.0))
    if peaks:
        title = "Forward and backward: peak allocated beyond the inputs"
        drawn.append(_picture(folder / "memory.png", peaks, title, "MiB", None))
    return drawn


def draw_gpu(records: Sequence[Record], folder: Path) -> list[Path]:
    """The pictures of a GPU that the records suffice for, at head size 64."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    lines = {work: _gpu_ratio_lines(records, work) for work in (FORWARD, BACKWARD, TRAINING)}
    drawn = [
        _picture(
            folder / f"gpu-{work.replace('+', '-')}.png",
            found,
            f"On a GPU, {work}: ours / peer",
            "times as fast",
            1.0,
        )
        for work, found in lines.items()
        if found
    ]
    if roofs := _roofline_lines(records):
        title = "On a GPU, forward: fraction of the roofline"
        drawn.append(_picture(folder / "gpu-roofline.png", roofs, title, "fraction", 1.0))
    return drawn


Lines = dict[str, list[tuple[int, float]]]


def _gpu_ratio_lines(records: Sequence[Record], work: str) -> Lines:
    lines: Lines = {}
    for record in records:
        cell = Cell.from_identity(record["cell"])
        if (cell.work, cell.head_dim) == (work, 64) and "ratio" in record["result"]:
            ratio = record["result"]["ratio"]["median"]
            lines.setdefault(f"{cell.subject} / {cell.peer}", []).append((cell.length, ratio))
    return {name: sorted(points) for name, points in lines.items() if len(points) > 1}


def _roofline_lines(records: Sequence[Record]) -> Lines:
    lines: Lines = {}
    for record in records:
        cell = Cell.from_identity(record["cell"])
        if (cell.section, cell.work, cell.head_dim) == ("alone", FORWARD, 64) and "roofline" in record[
            "result"
        ]:
            fraction = record["result"]["roofline"]["fraction"]
            lines.setdefault(cell.subject, []).append((cell.length, fraction))
    return {name: sorted(points) for name, points in lines.items() if len(points) > 1}


def _ratio_lines(records: Sequence[Record]) -> Lines:
    """Forward passes on one thread, measured at several lengths."""
    lines: Lines = {}
    for record in records:
        cell = Cell.from_identity(record["cell"])
        shown = (cell.work, cell.threads, cell.dtype) == (FORWARD, 1, "float32")
        if shown and cell.section not in ("every", "full") and record["status"] in (OK, WRONG):
            ratio = record["result"]["ratio"]["median"]
            lines.setdefault(f"{cell.subject} / {cell.peer}", []).append((cell.length, ratio))
    return {name: sorted(points) for name, points in lines.items() if len(points) > 1}


def _memory_lines(records: Sequence[Record]) -> Lines:
    lines: Lines = {}
    for record in records:
        if record["cell"]["work"] == MEMORY and record["status"] == OK:
            point = record["cell"]["length"], record["result"]["allocated_bytes"] / 2**20
            lines.setdefault(record["cell"]["subject"], []).append(point)
    return {name: sorted(points) for name, points in lines.items() if len(points) > 1}


def _picture(path: Path, lines: Lines, title: str, label: str, level: float | None) -> Path:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab20"]
    for i, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), label=name, marker="osD^vP*X"[i % 8], color=colours(i % 20))
    if level is not None:
        axes.axhline(level, color="#999999", ls="--", lw=1)
    axes.set(title=title, xlabel="tokens", ylabel=label, xscale="log", yscale="log")
    lengths = sorted({n for points in lines.values() for n, _ in points})
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, default=HERE / "results" / "cpu.jsonl")
    parser.add_argument(
        "--gpu-records",
        type=Path,
        nargs="*",
        default=[HERE / "results" / name for name in ("gpu.jsonl", "tune.jsonl")],
        help="files that benchmarks/gpu.py wrote; those that are not there are left out",
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder of README.md (default: benchmarks)")
    parser.add_argument("--summary", type=Path, help="a file in which to fill in the short table of speed")
    options = parser.parse_args(arguments)
    if not options.records.is_file():
        parser.error(f"--records {options.records}: no such file; python benchmarks/cpu.py writes it")
    return options


if __name__ == "__main__":
    sys.exit(main())
