"""What decoding carries from token to token. States go in and out of `step`; nothing is hidden in a module."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

S = TypeVar("S", bound="State")


@dataclass
class State:
    """Tensors whose first dimension is the batch. `step` consumes the state that it is given."""

    growing: ClassVar[tuple[str, ...]] = ()
    """The fields whose third dimension is the sequence."""
    optional: ClassVar[tuple[str, ...]] = ()
    """The fields that are None until there is something to hold."""

    @property
    def nbytes(self) -> int:
        """Bytes held, of every tensor."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(next(iter(self.tensors().values())))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors().values())).device

    def clone(self: S) -> S:
        """A copy that a later `step` on this state cannot touch."""
        return replace(self, **{name: t.clone() for name, t in self.tensors().items()})

    def overwrite(self, older: dict[str, Tensor]) -> None:
        """Move into the tensors of `older`, which have these shapes: what a captured graph needs to be replayed."""
        for name, tensor in older.items():
            setattr(self, name, tensor.copy_(getattr(self, name)))

    def reorder(self: S, indices: Int[Tensor, " new_batch"]) -> S:
        """The state of rows `indices`, in that order, repeats allowed: what beam search needs."""
        if not isinstance(indices, Tensor):
            raise TypeError(f"indices must be an int32 or int64 tensor, got {type(indices).__name__}")
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices must be an int32 or int64 tensor, got {indices.dtype}")
        if indices.dim() != 1:
            raise ValueError(f"indices must have one dimension, got shape {tuple(indices.shape)}")
        tensors = self.tensors()
        if any(t.device != indices.device for t in tensors.values()):
            devices = {t.device for t in tensors.values()}
            raise ValueError(
                f"indices must be on the device of the state, {devices.pop()}, got {indices.device}"
            )
        return replace(self, **{name: t.index_select(0, indices) for name, t in tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by name."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass
class KVState(State):
    """Every key and value so far: grows with the sequence. `key_mask` is None while no token was masked.

    Tokens are views of buffers with room for more, up to a quarter more than there are, which `nbytes` leaves out.
    A token is written in place only after the newest state of its buffer: stepping twice from one state is safe.
    """

    growing: ClassVar[tuple[str, ...]] = ("k", "v")
    optional: ClassVar[tuple[str, ...]] = ("key_mask",)

    k: Float[Tensor, "batch kv_heads length head_dim"]
    v: Float[Tensor, "batch kv_heads length v_head_dim"]
    key_mask: Bool[Tensor, "batch length"] | None = None

    def __post_init__(self) -> None:
        self._rooms = _Room(), _Room(), _Room()

    def append(self, k: Tensor, v: Tensor, key_mask: Tensor | None, *, in_place: bool) -> KVState:
        """This state and the new tokens after it; `in_place` unless a backward pass will read what this one holds."""
        masks = None
        if self.key_mask is not None or key_mask is not None:
            past, new = (
                x.new_ones(x.shape[0], x.shape[2], dtype=torch.bool) if mask is None else mask
                for x, mask in ((self.k, self.key_mask), (k, key_mask))
            )
            masks = self._rooms[2].append(past, new, 1, in_place)
        keys, values = (
            room.append(past, new, 2, in_place)
            for room, past, new in zip(self._rooms, (self.k, self.v), (k, v), strict=False)
        )
        longer = KVState(keys, values, masks)
        longer._rooms = self._rooms
        return longer

    def __getstate__(self) -> dict[str, Any]:
        # A view would take its whole buffer along.
        return {name: None if x is None else x.clone() for name, x in vars(self).items() if name != "_rooms"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


class _Room:
    """A buffer that is longer than what it holds, so that appending to it copies nothing."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._newest: Tensor | None = None

    def append(self, past: Tensor, new: Tensor, dim: int, in_place: bool) -> Tensor:
        """`past` and `new` along `dim`: in place if `past` is what the last call returned, else a copy."""
        if torch.compiler.is_compiling() or not in_place:
            return torch.cat([past, new], dim)
        length = past.shape[dim] + new.shape[dim]
        buffer = self._buffer
        if buffer is None or past is not self._newest or length > buffer.shape[dim] or not _writable(buffer):
            shape = list(past.shape)
            shape[dim] = length + length // 4
            buffer = self._buffer = new.new_empty(shape)
            buffer.narrow(dim, 0, past.shape[dim]).copy_(past)
        buffer.narrow(dim, past.shape[dim], new.shape[dim]).copy_(new)
        self._newest = buffer.narrow(dim, 0, length)
        return self._newest


def _writable(buffer: Tensor) -> bool:
    return torch.is_inference_mode_enabled() or not buffer.is_inference()


@dataclass
class WindowState(State):
    """The last `window - 1` tokens and each row's first `sinks` valid ones: the same size at any length.

    Slot t of the window holds position `seen - (window - 1) + t`; sink t holds position `anchor + t`, where the
    anchor is the row's first valid position, -1 before there is one.
    """

    k: Float[Tensor, "batch kv_heads slots head_dim"]
    v: Float[Tensor, "batch kv_heads slots v_head_dim"]
    valid: Bool[Tensor, "batch slots"]
    sink_k: Float[Tensor, "batch kv_heads sinks head_dim"]
    sink_v: Float[Tensor, "batch kv_heads sinks v_head_dim"]
    sink_valid: Bool[Tensor, "batch sinks"]
    anchor: Int[Tensor, " batch"]
    seen: int = 0

    def find_anchor(self, valid: Tensor) -> Tensor:
        """The anchor once the new tokens, `valid` (B, n), have come: position of the first valid token or -1."""
        first = valid.to(torch.int64).argmax(1) + self.seen
        return torch.where(self.anchor >= 0, self.anchor, torch.where(valid.any(1), first, -1))

    def fill_sinks(self, k: Tensor, v: Tensor, valid: Tensor) -> None:
        """Put those of the new tokens that stand at a sink's position into its slot."""
        self.anchor = self.find_anchor(valid)
        position = self.anchor[:, None] + torch.arange(self.sink_valid.shape[1], device=k.device)
        new = (position >= self.seen) & (position < self.seen + k.shape[2]) & (self.anchor >= 0)[:, None]
        index = (position - self.seen).clamp(0, k.shape[2] - 1)
        for name, source in (("sink_k", k), ("sink_v", v)):
            taken = source.gather(2, index[:, None, :, None].expand(-1, k.shape[1], -1, source.shape[3]))
            setattr(self, name, torch.where(new[:, None, :, None], taken, getattr(self, name)))
        self.sink_valid = torch.where(new, valid.gather(1, index), self.sink_valid)

    def push(self, k: Tensor, v: Tensor, valid: Tensor) -> None:
        """Move the window past the new tokens."""
        slots = self.k.shape[2]
        self.seen += k.shape[2]
        if slots:
            k, v, valid = k[:, :, -slots:], v[:, :, -slots:], valid[:, -slots:]
            self.k = torch.cat([self.k, k], 2)[:, :, -slots:].contiguous()
            self.v = torch.cat([self.v, v], 2)[:, :, -slots:].contiguous()
            self.valid = torch.cat([self.valid, valid], 1)[:, -slots:].contiguous()


@dataclass
class LinearState(State):
    """sum_j phi(k_j) [v_j, 1]^T 2^-exponent: the same size at any length, in the accumulation dtype."""

    kv: Float[Tensor, "batch kv_heads features v_head_dim_plus_1"]
    exponent: Float[Tensor, "batch kv_heads"] | None = None
