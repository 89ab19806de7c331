"""Checks of what callers pass, written once. Nothing here looks at a value: that would wait for the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are kept: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A region in which autocast does not touch the sums that are kept in the accumulation dtype."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Raise NotImplementedError for dual tensors: a custom operator would return them without their tangent."""
    if torch.compiler.is_compiling():
        return
    if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            'forward-mode differentiation is not implemented here; backend="reference" has it'
        )


def check_positive(name: str, value: Any, least: int = 1) -> int:
    """`value` as an integer of at least `least`."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value  # type: ignore[return-value]


def check_flag(name: str, value: Any) -> bool:
    """`value`, if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")
    return value


def check_probability(name: str, value: Any) -> float:
    """`value` in [0, 1)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {value!r} of type {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return float(value)


def check_scale(value: Any) -> float | None:
    """`value`, if it is None or a positive finite number."""
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"scale must be a float or None, got {value!r} of type {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {value}")
    return float(value)


def check_float_dtype(value: Any) -> torch.dtype:
    """`value`, if it is a floating-point dtype."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {value!r}")
    return value


def is_integer(dtype: torch.dtype) -> bool:
    """Whether `dtype` holds integers; bool does not."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (B, H, L, E), k (B, Hkv, S, E), v (B, Hkv, S, Ev), of one floating dtype and one device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim), got {tuple(x.shape)}"
            )
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            f"q, k and v must have one batch size, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}"
        )
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(
            f"k and v must agree in heads and length, got {tuple(k.shape[1:3])} and {tuple(v.shape[1:3])}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head_dim, got {q.shape[3]} and {k.shape[3]}")
    if q.shape[3] == 0:
        raise ValueError("q must have a head_dim of at least 1, got 0")
    if q.shape[1] == 0 or k.shape[1] == 0:
        raise ValueError(f"q and k must have at least 1 head, got {q.shape[1]} and {k.shape[1]}")
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"the heads of q must be a multiple of those of k and v, got {q.shape[1]} and {k.shape[1]}"
        )


def check_key_mask(key_mask: Any, batch: int, num_keys: int, device: torch.device) -> None:
    """key_mask (B, S), bool, True = may be attended to."""
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a Tensor or None, got {type(key_mask).__name__}")
    if key_mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask must be bool (True = may be attended to), got {key_mask.dtype}; "
            "for a mask with 1 = keep pass mask.bool(), for torch's key_padding_mask pass ~mask"
        )
    _check_row_tensor("key_mask", key_mask, batch, num_keys, device)


def check_segment_ids(segment_ids: Any, batch: int, num_keys: int, device: torch.device) -> None:
    """segment_ids (B, S), integers; negative = padding."""
    if not isinstance(segment_ids, Tensor):
        raise TypeError(f"segment_ids must be a Tensor or None, got {type(segment_ids).__name__}")
    if not is_integer(segment_ids.dtype):
        raise TypeError(f"segment_ids must be an integer tensor, got {segment_ids.dtype}")
    _check_row_tensor("segment_ids", segment_ids, batch, num_keys, device)


def _check_row_tensor(name: str, x: Tensor, batch: int, num_keys: int, device: torch.device) -> None:
    if x.dim() != 2 or x.shape[0] != batch or x.shape[1] != num_keys:
        raise ValueError(
            f"{name} must have shape (batch, keys) = ({batch}, {num_keys}), got {tuple(x.shape)}"
        )
    if x.device != device:
        raise ValueError(f"{name} must be on the device of q, {device}, got {x.device}")


def check_attn_bias(attn_bias: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """attn_bias that broadcasts to (B, H, L, S), floating-point (added) or bool (True = may attend)."""
    if not isinstance(attn_bias, Tensor):
        raise TypeError(f"attn_bias must be a Tensor or None, got {type(attn_bias).__name__}")
    if attn_bias.dtype != torch.bool and not attn_bias.dtype.is_floating_point:
        raise TypeError(
            f"attn_bias must be floating-point (added) or bool (True = may attend), got {attn_bias.dtype}"
        )
    padded = (1,) * (4 - attn_bias.dim()) + tuple(attn_bias.shape)
    if attn_bias.dim() > 4 or any(b not in (1, n) for b, n in zip(padded, shape, strict=True)):
        raise ValueError(f"attn_bias must broadcast to (B, H, L, S) = {shape}, got {tuple(attn_bias.shape)}")
    if attn_bias.device != device:
        raise ValueError(f"attn_bias must be on the device of q, {device}, got {attn_bias.device}")


def resolve_offset(
    q_offset: Any, q_len: int, num_keys: int, is_causal: bool, device: torch.device
) -> int | Tensor:
    """The position of the first query: `q_offset`, by default such that the queries are the last positions."""
    if q_offset is None:
        if is_causal and q_len > num_keys:
            raise ValueError(
                f"q_offset must be given for a causal mechanism with more queries ({q_len}) than keys ({num_keys}): "
                "by default queries are the last positions, and there are not that many"
            )
        return num_keys - q_len
    if isinstance(q_offset, Tensor):
        if q_offset.dim() != 0:
            raise ValueError(
                f"q_offset must be an int or a 0-d integer tensor, got shape {tuple(q_offset.shape)}"
            )
        if not is_integer(q_offset.dtype):
            raise TypeError(f"q_offset must be an int or a 0-d integer tensor, got {q_offset.dtype}")
        if q_offset.device not in (device, torch.device("cpu")):
            raise ValueError(
                f"q_offset must be on the CPU or the device of q, {device}, got {q_offset.device}"
            )
        return q_offset
    if isinstance(q_offset, bool) or not isinstance(q_offset, (int, torch.SymInt)):
        raise TypeError(
            f"q_offset must be an int, a 0-d integer tensor or None, got {type(q_offset).__name__}"
        )
    return q_offset  # type: ignore[return-value]
