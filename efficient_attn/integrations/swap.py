"""One line that gives the attention of an existing model another mechanism."""

from __future__ import annotations

import copy
import fnmatch
import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ..mechanisms import FullAttention, SlidingWindowAttention
from ..mechanisms.base import Mechanism
from . import timm, torch_modules
from .report import Row, SwapReport
from .sites import Adapter, Site, SwapError, build

Chooser = Callable[[Site], Mechanism | None]


def swap_attention(
    model: nn.Module,
    to: str | Chooser,
    *,
    layers: Iterable[int | str] | None = None,
    dry_run: bool = False,
    **options: Any,
) -> SwapReport:
    """Give the attention modules of `model` another mechanism, in place; all their parameters stay the same objects.

        swap_attention(model, "sliding_window", window_size=256)

    Finds `torch.nn.MultiheadAttention` (in `nn.TransformerEncoder` and the like, too), timm's `Attention`, and every
    attention of transformers that goes through its attention interface. A mechanism that is not exact changes what the
    model computes: finetune it.

    Args:
        model: any module.
        to: a key of MECHANISMS; or a function of a `Site` (path, layer, num_heads, num_kv_heads, head_dim, is_causal,
            is_cross, ...) that returns a mechanism, or None to leave that module alone.
        layers: only these: numbers of layers, or paths, in which * matches anything.
        dry_run: report, and leave the model as it is.
        options: of the mechanism, when `to` is a name.
    Returns:
        The report, whose `restore()` undoes it all.
    Raises:
        SwapError: if there is nothing to swap, or a module would be silently wrong; it names each, and nothing has been
            changed. A dry run reports them instead.
        ValueError, TypeError: for options that the mechanism does not take.
    """
    choose = _chooser(to, options)
    wanted = None if layers is None else list(layers)
    rows: list[Row] = []
    taken: set[int] = set()
    plans: list[tuple[Adapter, list[tuple[Site, Mechanism]]]] = []
    for adapter in _adapters():
        sites, others = adapter.find(model)
        found = [
            _row(adapter, site, choose, taken) for site in sites if _is_wanted(site.path, site.layer, wanted)
        ]
        rows += found
        rows += [
            Row(path, why.split()[0], reason=why)
            for path, why in others.items()
            if _is_wanted(path, None, wanted)
        ]
        plans.append((adapter, [(row.site, row.mechanism) for row in found if row.site and row.mechanism]))
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    report = SwapReport(sorted(rows, key=lambda row: order[row.path]), dry_run)
    if dry_run:
        return report
    _check(report, model, wanted)
    try:
        for adapter, chosen in plans:
            if chosen:
                report.undo.append(adapter.install(model, chosen))
    except BaseException:
        report.restore()
        raise
    for note in sorted({note for row in report.swapped for note in row.notes}):
        warnings.warn(note, stacklevel=2)
    return report


def _adapters() -> Iterator[Adapter]:
    """Those of the libraries that have been imported: a model of another cannot be here."""
    if "transformers" in sys.modules:
        yield importlib.import_module("..huggingface.sites", __name__)  # type: ignore[misc]
    yield timm
    yield torch_modules


def _chooser(to: str | Chooser, options: dict[str, Any]) -> Chooser:
    if isinstance(to, str):
        return lambda site: None if site.is_cross else build(site, to, options)
    if not callable(to):
        raise TypeError(f"to must be a name or a function of a Site, got {type(to).__name__}")
    if options:
        raise TypeError(f"options go with a name; to is a function, and got {', '.join(options)}")
    return to


def _row(adapter: Adapter, site: Site, choose: Chooser, taken: set[int]) -> Row:
    """What becomes of `site`. A mechanism in `taken`, which has a site already, is copied: each site has its own."""
    try:
        mechanism = choose(site)
        if mechanism is None:
            reason = "cross-attention is left to the model" if site.is_cross else "left alone"
            return Row(site.path, site.before, site, reason=reason)
        if not isinstance(mechanism, Mechanism):
            raise TypeError(f"to must return a Mechanism or None, got {type(mechanism).__name__}")
        mechanism = copy.deepcopy(mechanism) if id(mechanism) in taken else mechanism
        taken.add(id(mechanism))
        refusal = adapter.refuse(site, mechanism)
    except ValueError as error:
        refusal, mechanism = str(error), None
    if refusal is not None:
        return Row(site.path, site.before, site, reason=refusal, refused=True)
    return Row(site.path, site.before, site, mechanism, notes=tuple(_notes(site, mechanism)))


def _notes(site: Site, mechanism: Mechanism | None) -> Iterator[str]:
    """What is lost beside what the mechanism says of itself."""
    name = type(mechanism).__name__
    if site.dropout and mechanism is not None and mechanism.dropout_p is None:
        yield f"attention dropout of {site.dropout} is left out: {name} has no weights to drop"
    if site.window is not None and not _is_within(mechanism, site.window):
        yield f"the model's own window of {site.window} no longer bounds what {name} sees"


def _is_within(mechanism: Mechanism | None, window: int) -> bool:
    if isinstance(mechanism, SlidingWindowAttention):
        return mechanism.window_size <= window and not mechanism.num_sinks
    return isinstance(mechanism, FullAttention)


def _is_wanted(path: str, layer: int | None, wanted: list[int | str] | None) -> bool:
    return wanted is None or any(_names(one, path, layer) for one in wanted)


def _names(one: int | str, path: str, layer: int | None) -> bool:
    if isinstance(one, int):
        return one == layer
    return fnmatch.fnmatchcase(path, one) or path.startswith(one + ".")


def _check(report: SwapReport, model: nn.Module, wanted: list[int | str] | None) -> None:
    """Raise unless something is swapped, nothing is refused, and each of `wanted` names a module."""
    refused = [f"{row.path} ({row.before}): {row.reason}" for row in report.rows if row.refused]
    if refused:
        raise SwapError("\n".join(["nothing was swapped, because these would be wrong:", *refused]))
    for one in wanted or ():
        if not any(_names(one, row.path, row.site and row.site.layer) for row in report.rows):
            raise SwapError(f"layers: {one!r} names no attention module of {type(model).__name__}")
    if not report.swapped:
        reasons = [f"{row.path}: {row.reason}" for row in report.rows]
        raise SwapError(
            "\n".join([f"{type(model).__name__} has no attention module that can be swapped", *reasons])
        )
