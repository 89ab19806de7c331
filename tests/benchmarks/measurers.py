"""Stand-ins for `measure`, which children import: each cell's subject says what becomes of it."""

from __future__ import annotations

import os
import resource
import signal
import time

from efficient_attn.benchmarking.cells import Cell
from efficient_attn.benchmarking.worker import Outcome, Unsupported


def behave(cell: Cell) -> Outcome:
    """What `cell.subject` says, and the process that it happened in."""
    match cell.subject:
        case "unsupported":
            raise Unsupported("flex has no backward pass here")
        case "raises":
            raise ValueError("a mistake\nin two lines")
        case "allocates":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        case "out of memory":
            raise MemoryError
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exits":
            os._exit(3)
        case "hangs":
            time.sleep(60)
        case "spent":
            return Outcome(spent=True)
        case "limit":
            soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
            return Outcome(result={"limit": None if soft == resource.RLIM_INFINITY else soft})
    return Outcome(result={"pid": os.getpid(), "group": os.getpgid(0)})
