"""The mask function: transformers' many masks as one key mask, or as the segments of packed documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

DENSE = "_efficient_attn_dense"
"""An attribute of a config all of whose layers attend fully."""

PLAIN = ("causal_mask_function", "bidirectional_mask_function")
"""The patterns that a mechanism's own causality says."""

WINDOW = "sliding_window_overlay.<locals>.inner_mask"
PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
REMAPPED = "remap_positions_for_packed_sequence.<locals>.inner_mask"
AND = "and_masks.<locals>.and_mask"
_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__


class UnknownPattern(ValueError):
    """A model asks for a mask that no mechanism can honour."""


def mask(*, config: Any = None, **given: Any) -> Tensor | None:
    """What transformers calls to make a mask: `flat_mask`, unless the config says that all its layers attend fully."""
    return dense_or_flat_mask(**given) if getattr(config, DENSE, False) else flat_mask(**given)


def dense_or_flat_mask(*, config: Any = None, **given: Any) -> Tensor | None:
    """As `flat_mask`, but dense for a pattern that it does not know: for full attention, which takes any."""
    try:
        return flat_mask(**given)
    except UnknownPattern:
        whole = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masking_utils.sdpa_mask(**{**given, **whole})


def flat_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """A mask of two dimensions, however long the sequence.

    Returns:
        None if every key up to the last query may be attended to and there are no others; (B, keys) bool, True =
        may be attended to, its last column that of the last query if that may not look ahead; or (B, L) int64, the
        segment of each token, if documents are packed.
    Raises:
        UnknownPattern: for one that is neither causal, bidirectional, a causal window nor packed documents.
    """
    if torch.compiler.is_compiling():
        packed = attention_mask is None and q_length == kv_length
        pairs = batch_size, q_length, kv_length, q_offset, kv_offset
        segments = _traced_segments(mask_function, *pairs, device, packed)
    else:
        segments = _read(mask_function)
    if segments is not None:
        return segments
    if isinstance(q_offset, Tensor) and torch.compiler.is_compiling():
        return _padded(attention_mask, batch_size, kv_offset, kv_offset + kv_length, device)
    if mask_function is masking_utils.bidirectional_mask_function:
        end = kv_offset + kv_length  # of another sequence, perhaps
    else:
        end = int(q_offset) + q_length
    if attention_mask is None:
        whole = end == kv_offset + kv_length
        return None if whole else _padded(None, batch_size, kv_offset, end, device)
    mask = _padded(attention_mask, batch_size, kv_offset, end, device)
    if end == kv_offset + kv_length and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def _padded(
    attention_mask: Tensor | None, batch: int, start: int, end: int, device: torch.device | str
) -> Tensor:
    """Columns [start, end) of a mask; what it does not reach is False."""
    if attention_mask is None:
        return torch.ones(batch, end - start, dtype=torch.bool, device=device)
    missing = max(end - attention_mask.shape[1], 0)
    return F.pad(attention_mask.to(torch.bool), (0, missing))[:, start:end]


def segments_of(mask_function: Callable[..., Any]) -> Tensor | None:
    """The segment of each token if `mask_function` packs documents, None if it does not.

    Raises:
        UnknownPattern: unless all else that it asks for is a pattern that mechanisms know.
    """
    parts = list(_parts(mask_function))
    packed = [part for part in parts if part.__qualname__ == PACKED]
    pattern = sorted(part.__qualname__ for part in parts if part not in packed)
    if len(packed) > 1 or (
        pattern not in ([name] for name in PLAIN) and pattern != sorted([WINDOW, PLAIN[0]])
    ):
        names = " and ".join(part.__qualname__ for part in parts)
        raise UnknownPattern(
            f"efficient_attn knows causal, bidirectional, sliding-window and packed masks, not {names}: "
            "this model's attention pattern would be lost"
        )
    return _captured(packed[0])["packed_sequence_mask"].to(torch.int64) if packed else None


# The compiler, when it has given up on what calls this, must not try it alone: it cannot read a function's parts.
_read: Any = torch.compiler.disable(segments_of)


def _traced_segments(
    mask_function: Callable[..., Any],
    batch: int,
    length: int,
    keys: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
    packed: bool,
) -> Tensor | None:
    """As `segments_of`, while compiling, when a function's parts cannot be read: by asking it about some pairs.

    What a query sees must be causal and without gaps, as in a window, or in a document if it may be `packed`.
    """
    if mask_function is masking_utils.causal_mask_function:
        return None
    if mask_function is masking_utils.bidirectional_mask_function:
        return None
    if mask_function.__code__ is not _AND:
        raise UnknownPattern("efficient_attn does not know this attention pattern, which would be lost")
    row, key = (
        torch.arange(batch, device=device)[:, None],
        torch.arange(keys, device=device)[None, :] + kv_offset,
    )
    place = torch.arange(length, device=device)[None, :] + q_offset
    for query in (place[:, -1:], place[:, length // 2 : length // 2 + 1]):
        seen, future = mask_function(row, 0, query, key), key > query
        gaps = seen[..., :-1] & ~seen[..., 1:] & ~future[..., 1:]
        known = ~((seen & future).any() | gaps.any())
        torch.ops.aten._assert_async.msg(known, "the attention pattern is neither a window nor of documents")
    later = place[:, 1:]
    torch.ops.aten._assert_async.msg(
        ~mask_function(row, 0, later - 1, later).any(), "the attention pattern is not causal"
    )
    begins = ~mask_function(row, 0, later, later - 1)
    if not packed:
        torch.ops.aten._assert_async.msg(~begins.any(), "the attention pattern is not that of a window")
        return None
    return F.pad(begins.expand(batch, -1).to(torch.int64).cumsum(1), (1, 0))


def _parts(mask_function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """What a mask function is the conjunction of."""
    if mask_function.__qualname__ == AND:
        for part in _captured(mask_function)["mask_functions"]:
            yield from _parts(part)
    elif mask_function.__qualname__ == REMAPPED:
        yield from _parts(_captured(mask_function)["mask_function"])
    else:
        yield mask_function


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    """What a nested function closes over, by name."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return dict(zip(function.__code__.co_freevars, cells, strict=True))
