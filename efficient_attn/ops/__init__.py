"""The two operators, softmax attention over a structured mask and linear attention, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import blocked, scan, stream

IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.efficient_attn.blocked_forward.default: blocked.forward,
    torch.ops.efficient_attn.blocked_backward.default: blocked.backward,
    torch.ops.efficient_attn.linear_forward.default: stream.forward,
    torch.ops.efficient_attn.linear_backward.default: stream.backward,
    torch.ops.efficient_attn.linear_scan.default: scan.forward,
}
"""The functions behind the package's custom operators, for those who count what happens inside."""
