"""Where the kernels run, and in words why not elsewhere."""

from __future__ import annotations

import importlib.util
import sys

import torch

OLDEST = (8, 0)
"""The compute capability from which the kernels are compiled and screened: Ampere."""

MAX_HEAD_DIM = 256

INSTALLED = importlib.util.find_spec("triton") is not None
"""Whether there is a Triton to import: found out once, because torch.compile need not trace how."""


def interpreted() -> bool:
    """Whether Triton, if anybody has imported it, runs kernels in its interpreter, on CPU tensors."""
    triton = sys.modules.get("triton")
    # Not its setting, which torch.compile cannot trace, but what became of its own functions when it was imported.
    return triton is not None and type(triton.language.zeros).__name__ == "InterpretedFunction"


def refusals(device: torch.device, dtype: torch.dtype, *head_dims: int) -> list[str]:
    """Why the kernels cannot run on tensors of this device, dtype and these head sizes; empty if they can."""
    if not INSTALLED:
        reasons = ["triton is not installed"]
    elif device.type == "cuda":
        # Only once it is imported does it say whether it will interpret.
        reasons = _import_fault() or _of_the_interpreter(device, dtype) or _of_the_gpu(device, dtype)
    elif interpreted():
        reasons = _of_the_interpreter(device, dtype)
    else:
        reasons = [f"runs on NVIDIA GPUs, not {device.type}"]
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        reasons.append(f"does not take {dtype}")
    # A loop, because torch.compile does not trace `max` with a default.
    reasons += [
        f"takes head sizes up to {MAX_HEAD_DIM}, not {size}" for size in head_dims if size > MAX_HEAD_DIM
    ]
    return reasons


def _import_fault() -> list[str]:
    try:
        # A statement, which torch.compile traces; it refuses importlib.import_module.
        import triton  # noqa: F401
    except Exception as error:
        return [f"triton does not import: {type(error).__name__}: {error}"]
    return []


def _of_the_interpreter(device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = []
    if interpreted() and dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes bfloat16 wrongly")
    if interpreted() and device.type != "cpu":
        reasons.append(
            f"Triton's interpreter is on (TRITON_INTERPRET), which takes cpu tensors, not {device.type}"
        )
    return reasons


def _of_the_gpu(device: torch.device, dtype: torch.dtype) -> list[str]:
    if torch.version.hip is not None:
        return ["runs on NVIDIA GPUs, not AMD's: not tried under ROCm"]
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return [f"needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"]
    return [f"does not take {dtype}"] if dtype == torch.float64 else []
