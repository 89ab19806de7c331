"""From a case to its mechanism, tensors and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efficient_attn.mechanisms import MECHANISMS, Mechanism

from .case import Case

DTYPES = ("float64", "float64", "float32", "float32", "bfloat16", "float16")
KEY_MASKS = ("all", "holes", "left", "right", "left right", "left right holes", "one", "holes row", "nothing")
SEGMENTS = ("ascending", "descending", "padded", "interleaved")
BIASES = ("float", "infinite", "bool")
LAYOUTS = ("transposed", "columns", "sliced", "expanded")
FILLERS = {"": 1.0, "x1e4": 1e4, "nan": torch.nan, "inf": torch.inf}
"""What the ordinary contents of masked keys are multiplied by."""


def build(case: Case, backend: str | None = None) -> Mechanism:
    """The mechanism of `case`, on its backend or on `backend`."""
    chosen = case.backend if backend is None else backend
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        mechanism = MECHANISMS[case.mechanism](**case.options, backend=chosen)
    if case.cast:
        mechanism = mechanism.to(dtype_of(case))
    if case.planted:
        from planted import DEFECTS

        (plant,) = (defect.plant for defect in DEFECTS if defect.name == case.planted)
        mechanism = plant(mechanism)
    return mechanism.train(case.training)


def dtype_of(case: Case) -> torch.dtype:
    """The dtype of q, k and v."""
    return getattr(torch, case.dtype)


def generator(case: Case, purpose: int) -> torch.Generator:
    """A stream of numbers of its own for each purpose."""
    return torch.Generator().manual_seed(case.seed * 64 + purpose)


def values(case: Case, purpose: int = 0, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, contiguous; other purposes give other contents, `factor` times as large."""
    numbers = generator(case, purpose)
    kv = (case.batch, case.kv_heads, case.kv_len)
    shapes = (
        (case.batch, case.heads, case.q_len, case.head_dim),
        (*kv, case.head_dim),
        (*kv, case.v_head_dim),
    )
    made = []
    for shape, magnitude, shift in zip(shapes, case.magnitudes, (case.shift, case.shift, 0.0), strict=True):
        repeated = case.layout == "expanded"
        drawn = (1, 1, *shape[2:]) if repeated else shape
        x = torch.randn(drawn, generator=numbers, dtype=torch.float64)
        x = x if magnitude == 1 else x.clamp(-1, 1) * magnitude
        x = ((x + shift) * factor).to(dtype_of(case))
        made.append(x.expand(shape) if repeated else x)
    q, k, v = made
    return q, k, v


def arrange(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout, NaN around them where there is a round."""
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns":
        return x.mT.contiguous().mT
    if layout == "sliced":
        batch, heads, length, size = x.shape
        around = x.new_full((batch, heads, length + 3, size + 2), torch.nan)
        inside = around[:, :, 2 : length + 2, 1 : size + 1]
        inside.copy_(x)
        return inside
    return x


def key_mask_of(case: Case, purpose: int = 1) -> Tensor | None:
    """The (B, S) mask that `case.key_mask` names."""
    if not case.key_mask:
        return None
    numbers, kinds = generator(case, purpose), case.key_mask.split()
    position = torch.arange(case.kv_len).expand(case.batch, -1)
    edges = torch.randint(0, case.kv_len // 2 + 1, (2, case.batch, 1), generator=numbers)
    mask = torch.ones(case.batch, case.kv_len, dtype=torch.bool)
    if "left" in kinds:
        mask &= position >= edges[0]
    if "right" in kinds:
        mask &= position < case.kv_len - edges[1]
    if "holes" in kinds:
        mask &= torch.rand(mask.shape, generator=numbers) > 0.3
    if "one" in kinds:
        mask &= position == edges.sum(0).clamp(max=case.kv_len - 1)
    if "row" in kinds:
        mask[-1:] = False
    return mask & ("nothing" not in kinds)


def segments_of(case: Case) -> Tensor | None:
    """The (B, S) segment ids that `case.segments` names."""
    if not case.segments:
        return None
    numbers, shape = generator(case, 2), (case.batch, case.kv_len)
    if case.segments == "interleaved":
        return torch.randint(-1, 3, shape, generator=numbers)
    starts = torch.rand(shape, generator=numbers) < 0.2
    ids = starts.cumsum(1)
    if case.segments == "descending":
        return (50 - ids).to(torch.int8)
    if case.segments == "padded":
        return torch.where(ids % 3 == 1, -7, ids).to(torch.int32)
    return ids


def bias_of(case: Case) -> Tensor | None:
    """The bias that `case.bias` names, of a shape that broadcasts to (B, H, L, S)."""
    if not case.bias:
        return None
    pairs = (case.q_len, case.kv_len)
    shapes = [pairs, (1, case.heads, *pairs), (case.batch, 1, *pairs), (case.batch, case.heads, *pairs)]
    bias = torch.randn(shapes[case.seed % 4], generator=generator(case, 3), dtype=torch.float64)
    if case.bias == "bool":
        return bias > -0.7
    if case.bias == "infinite":
        bias = bias.masked_fill(bias < -1, -torch.inf)
    return bias.to(dtype_of(case))


def offset_of(case: Case) -> int | Tensor | None:
    """`q_offset` as it is passed."""
    if case.q_offset is None or not case.tensor_offset:
        return case.q_offset
    return torch.tensor(case.q_offset, dtype=torch.int32 if case.seed % 2 else torch.int64)


def masks_of(case: Case) -> dict[str, Any]:
    """The keyword arguments of the call."""
    masks = {
        "key_mask": key_mask_of(case),
        "segment_ids": segments_of(case),
        "attn_bias": bias_of(case),
        "q_offset": offset_of(case),
    }
    return {name: mask for name, mask in masks.items() if mask is not None}


def valid_keys(masks: dict[str, Any], like: Tensor) -> Tensor:
    """(B, S): the keys whose contents may matter; `like` is k."""
    valid = torch.ones(like.shape[0], like.shape[2], dtype=torch.bool)
    if "key_mask" in masks:
        valid = valid & masks["key_mask"]
    if "segment_ids" in masks:
        valid = valid & (masks["segment_ids"] >= 0)
    return valid
