"""What torch's CPU allocator gives out, from its own records."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile

from .worker import Unsupported


def peak_allocated(work: Callable[[], object]) -> int:
    """The most bytes that `work` held at one moment, from the records of torch's CPU allocator."""
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        work()
    results = records.profiler.kineto_results if records.profiler is not None else None
    if results is None:
        raise Unsupported("this torch was built without Kineto, which records allocations")
    held = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]: missing from the stub
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Some builds of Kineto write 'USDT:' lines straight to file descriptor 2."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught:
                if not line.startswith(b"USDT:"):
                    os.write(2, line)
