"""The laws over one mechanism in Triton's interpreter: a line of JSON for each law and example, as it ends."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor

from efficient_attn.backends import Backend, BackendError
from efficient_attn.mechanisms import MECHANISMS, Mechanism
from efficient_attn.testing.laws.law import LawViolation
from efficient_attn.testing.sampling import HEAD_DIM, HEADS, LENGTH

from .judging import KERNEL, drawn
from .laws import LAWS

WITHOUT_LAUNCHES = {"kernel_is_chosen", "kernel_takes_empty_inputs"}
"""Laws that hold where nothing runs."""

STEPS = {"kernel_steps_like_forward", "kernel_sends_gradients_through_steps"}

WITH_OVERFLOW = {"kernel_reaches_far_memory", "kernel_reaches_many_keys"}
"""Laws under which the interpreter looks for overflow of integers: a quarter of its time."""

launches: Counter[str] = Counter()
"""Kernels by name, and how often each was launched."""


def hasten_and_count() -> None:
    """Count every launch from here on, and have the interpreter do once what it would do over and over."""
    launch: Callable[..., None] = GridExecutor.__call__
    patch, patched = interpreter._patch_lang, set()

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        launches[self.fn.__name__] += 1
        patched.clear()
        launch(self, *args, **kwargs)

    def patched_once(function: Any) -> Any:
        # Otherwise the whole language is patched anew whenever one function of a kernel calls another.
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            return patch(function)
        return None

    interpreter._patch_lang = patched_once
    GridExecutor.__call__ = counted
    # Tensors are on the CPU already; to copy them there and back would touch memory that no kernel touches.
    GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    GridExecutor._restore_args_dev = lambda self, *args: None


def look_for_overflow(look: bool) -> None:
    """Whether each sum and product of integers is checked."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=look)


def held_by_others(law: str, mechanism: Mechanism) -> bool:
    """Whether a law may hold without a kernel: nothing runs, or it is of steps that are not the forward pass."""
    steps_forward = getattr(mechanism, "retained", 0) is None
    return law in WITHOUT_LAUNCHES or (law in STEPS and not steps_forward)


def served(mechanism: Mechanism) -> tuple[Backend | None, list[str]]:
    """The kernels' backend of a mechanism, if it has one, and why it does not take the mechanism."""
    backend = next((b for b in mechanism.backends if b.name == KERNEL), None)
    if backend is None:
        return None, []
    fp32 = copy.deepcopy(mechanism).to(torch.float32).eval()
    return backend, backend.refuse(fp32._problem(*drawn(fp32, torch.float32), None, None, None, None))


def judged(name: str, wanted: str) -> Iterator[dict[str, Any]]:
    """What became of each law over each example that does not ask for another backend."""
    for number, example in enumerate(MECHANISMS[name].examples(LENGTH, HEADS, HEAD_DIM)):
        if example.backend != "auto":
            continue
        about = {"example": f"{name}{number}", "mechanism": str(example)}
        backend, reasons = served(example)
        if backend is None or reasons:
            yield {**about, "unserved": "; ".join(reasons) or f"it has no backend {KERNEL!r}"}
            continue
        for law in LAWS.values():
            if wanted in law.name and law.applies(example):
                before, start = launches.total(), time.process_time()
                failure, refused, cases = None, None, 0
                torch.manual_seed(0)
                look_for_overflow(law.name in WITH_OVERFLOW)
                try:
                    cases = law.run(example)
                    if launches.total() == before and not held_by_others(law.name, example):
                        raise LawViolation("it held without a single launch of a kernel")
                except BackendError as error:
                    refused = str(error)
                except Exception as error:
                    kind = "" if isinstance(error, LawViolation) else f"{type(error).__name__}: "
                    failure = f"{kind}{error}"
                seconds = round(time.process_time() - start, 2)
                ended = {"cases": cases, "failure": failure, "refused": refused, "seconds": seconds}
                yield {**about, "law": law.name, **ended}


def main() -> int:
    """Judge, print, and return 1 if a law was broken or nothing was judged."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    parser.add_argument("mechanism", choices=MECHANISMS)
    parser.add_argument("--laws", default="", help="only those whose names contain this")
    options = parser.parse_args()
    if not triton.knobs.runtime.interpret:
        parser.error("set TRITON_INTERPRET=1")
    torch.set_num_threads(1)
    hasten_and_count()
    held = broken = 0
    for line in judged(options.mechanism, options.laws):
        print(json.dumps(line), flush=True)
        held += line.get("cases", 0)
        broken += line.get("failure") is not None
    print(json.dumps({"held": held, "broken": broken, "launches": dict(launches)}), flush=True)
    return 1 if broken or not held else 0


if __name__ == "__main__":
    sys.exit(main())
