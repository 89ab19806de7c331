"""A mask as transformers gives it to a layer, as the arguments of a mechanism; whatever cannot be said is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...mechanisms import FullAttention
from ...mechanisms.base import Mechanism


@dataclass
class Masks:
    """The mask arguments of a mechanism, and how many of the keys they speak of: later ones are empty slots."""

    num_keys: int
    key_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    q_offset: int | Tensor | None = None
    attn_bias: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What to call the mechanism with, beside q, k and v."""
        return {
            "key_mask": self.key_mask,
            "segment_ids": self.segment_ids,
            "q_offset": self.q_offset,
            "attn_bias": self.attn_bias,
        }


def lower(
    mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_offset: int | Tensor | None,
    mechanism: Mechanism,
    window: int | None,
    position_bias: Tensor | None,
) -> Masks:
    """The masks of a call that sees all its keys.

    Args:
        mask: None; (B, keys) bool, or int segments; (B, 1 or H, L, S) bool, or float to add.
        q_offset: of the first query, if a cache tells; otherwise the last column of a mask is the last query's.
        window: the model's own, which full attention keeps to.
        position_bias: to add to the scores.
    """
    length, keys = q.shape[2], k.shape[2]
    if mask is None:
        masks = Masks(keys, q_offset=q_offset)
    elif mask.dim() == 2:
        masks = _flat(mask, length, keys, q_offset)
    elif isinstance(mechanism, FullAttention):
        _check_hides_the_future(mask, length, keys, mechanism)
        # The mask says it all, causality and window too: every key is before such a query.
        masks, window = Masks(keys, q_offset=keys, attn_bias=mask[..., :keys]), None
    else:
        start = keys - length if q_offset is None else int(q_offset)
        _check_plain(mask, length, start, mechanism, window)
        masks = Masks(keys, key_mask=_allowed(mask).any(1), q_offset=start)
    if isinstance(mechanism, FullAttention):
        _bound(masks, length, window, q.device)
        _add(masks, position_bias)
    if not mechanism.is_causal:
        masks.q_offset = None
    return masks


def _flat(mask: Tensor, length: int, keys: int, q_offset: int | Tensor | None) -> Masks:
    """Of a two-dimensional mask: of keys if it is bool, else of segments."""
    columns = mask.shape[1]
    if columns > keys:
        raise ValueError(f"attention_mask has {columns} columns for {keys} keys")
    if mask.dtype != torch.bool:
        return Masks(columns, segment_ids=mask)
    return Masks(columns, key_mask=mask, q_offset=columns - length if q_offset is None else q_offset)


def _allowed(mask: Tensor) -> Tensor:
    """(B, L, S) bool of a mask (B, 1, L, S), bool or to be added."""
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0


def lower_new(
    mask: Tensor | None, length: int, seen: int, mechanism: Mechanism, window: int | None
) -> tuple[Tensor | None, int | Tensor | None]:
    """Of a mask over `seen` tokens and `length` new ones: which new ones are valid (B, length), how many old ones (B,).

    The latter is None where the mask does not tell: it is dense, or does not reach back to the first.
    """
    if mask is None:
        return None, seen
    start = min(seen, mask.shape[-1] - length)
    if mask.dim() == 4:
        _check_plain(mask, length, start, mechanism, window)
        return _allowed(mask)[:, :, start : start + length].diagonal(dim1=1, dim2=2), None
    if mask.dtype != torch.bool:
        raise ValueError("packed documents (position_ids that start anew) cannot be cached: use_cache=False")
    return mask[:, start : start + length], mask[:, :start].sum(1) if start == seen else None


def _check_plain(mask: Tensor, length: int, start: int, mechanism: Mechanism, window: int | None) -> None:
    """Raise unless a dense mask (B, 1, L, S) is what the mechanism assumes: padding, and causality if it is causal."""
    if mask.shape[1] != 1:
        raise ValueError(f"{type(mechanism).__name__} cannot honour a mask of its own for each head")
    if mechanism.is_causal and mask.shape[2] != length:
        raise ValueError(
            f"{type(mechanism).__name__} is causal, and is given one mask row for {length} queries"
        )
    allowed = _allowed(mask)
    if mechanism.is_causal:
        allowed = allowed[:, :, start : start + mask.shape[2]]
        row = torch.arange(mask.shape[2], device=mask.device)
        near = row[:, None] - row[None, :]
        pattern = (near >= 0) & (near < (window or mask.shape[3] + 1))
        valid = allowed.diagonal(dim1=1, dim2=2)
        fits = (allowed == (pattern & valid[:, None, :])) | ~valid[:, :, None]
    else:
        fits = allowed == allowed[:, :1]
    message = (
        f"{type(mechanism).__name__} honours padding{' under causality' * mechanism.is_causal}, not this dense "
        "attention_mask, whose pattern is another"
    )
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(fits.all(), message)
    elif not bool(fits.all()):
        raise ValueError(message)


def _check_hides_the_future(mask: Tensor, length: int, keys: int, mechanism: Mechanism) -> None:
    """Raise if a causal layer is given a mask that hides nothing: a bias of the model's own, not the mask it needs."""
    if not mechanism.is_causal or length == 1 or mask.shape[2] != length or torch.compiler.is_compiling():
        return
    if mask.dtype == torch.bool:
        hidden = ~mask
    else:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool(hidden[:, :, :, :keys].any()):
        raise ValueError("a causal layer is given a dense attention_mask that hides no token from any other")


def _bound(masks: Masks, length: int, window: int | None, device: torch.device) -> None:
    """Keep full attention to the model's window, by a dense mask where there are keys beyond it."""
    if window is None or masks.num_keys <= window:
        return
    offset = masks.num_keys - length if masks.q_offset is None else masks.q_offset
    row = torch.arange(length, device=device)[:, None] + offset
    near = row - torch.arange(masks.num_keys, device=device)[None, :] < window
    masks.attn_bias = near[None, None] if masks.attn_bias is None else masks.attn_bias & near


def _add(masks: Masks, position_bias: Tensor | None) -> None:
    """Add a bias to the scores, beside what `masks.attn_bias` says already."""
    if position_bias is None:
        return
    position_bias = position_bias[..., : masks.num_keys]
    if masks.attn_bias is None:
        masks.attn_bias = position_bias
    elif masks.attn_bias.dtype == torch.bool:
        masks.attn_bias = position_bias.masked_fill(~masks.attn_bias, -torch.inf)
    else:
        masks.attn_bias = masks.attn_bias + position_bias
