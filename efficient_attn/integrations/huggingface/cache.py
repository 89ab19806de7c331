"""The decode state of a mechanism as a layer of a transformers cache."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ...mechanisms.base import Mechanism
from ...state import State

ROLLBACK = 64
"""The most tokens of one call that can be taken back: more than any assisted decoding guesses at once."""


class StateLayer(CacheLayerMixin):
    """What a mechanism remembers, in place of one layer's keys and values: the same size at any length.

    `update` returns only the new keys and values; the attention function gives them to `attend`, which moves the
    state past them. Any cache takes it: dynamic, static or of an encoder and a decoder.

    Args:
        mechanism: a causal one.
        replaced: the layer that stood here, empty. Masks are sized by the first layer of a kind for all of them, so
            that this one gives the sizes that the other would.
    """

    supports_early_init = False
    is_croppable = False

    def __init__(self, mechanism: Mechanism, replaced: Any) -> None:
        super().__init__()
        self.mechanism = mechanism
        self.replaced = replaced
        self.is_sliding, self.is_compileable = replaced.is_sliding, replaced.is_compileable
        self.state: State | None = None
        self.seen = 0
        self.record_past = False
        self._valid: Tensor | None = None
        self._spoilt: str | None = None
        self._history = _History()
        self._expected = False

    def __deepcopy__(self, memo: dict[int, Any]) -> StateLayer:
        """A copy of what was seen; the mechanism stays the model's."""
        memo[id(self.mechanism)] = self.mechanism
        new = object.__new__(StateLayer)
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds, without what is kept for `crop`."""
        return 0 if self.state is None else self.state.nbytes

    def expect(self, mechanism: Mechanism) -> None:
        """Say that the next `update` is of an attention with `mechanism`, which knows what to do with its result.

        Raises:
            ValueError: if the state is of another mechanism, or does not hold all that the cache was given.
        """
        if self._spoilt is not None:
            raise ValueError(f"this cache cannot be used any further: {self._spoilt}")
        known = self.mechanism
        if known is not mechanism:
            if type(known) is not type(mechanism) or known.arguments != mechanism.arguments:
                raise ValueError(
                    f"the cache holds a state of {known}, the layer attends by {mechanism}: start a new one"
                )
            self.mechanism = mechanism
        self._expected = True

    def spoil(self, reason: str) -> None:
        """Refuse all further use: what came last is not in the state."""
        self._spoilt = reason

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.state = self.mechanism.init_state(
            batch,
            heads,
            head_dim,
            v_head_dim=value_states.shape[3],
            dtype=self.dtype,
            device=self.device,
        )
        self._valid = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self._expected:
            raise RuntimeError(
                "this cache holds the state of a swapped layer, whose attention has been put back since: "
                "start from a new cache"
            )
        self._expected = False
        return key_states, value_states

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, past: int | Tensor | None
    ) -> Tensor:
        """The outputs (B, H, L, Ev) of L new tokens, after which the state is past them.

        Args:
            valid: (B, L) bool, which of them may be attended to; None for all.
            past: (B,), how many of the earlier tokens the mask of this call allows; None if it does not tell.
        Raises:
            ValueError: if that is not how many were valid when they came: a state cannot forget single tokens.
        """
        if self.state is None:
            self.lazy_initialization(k, v)
        self._check_past(past)
        dtype = q.dtype
        q, k, v = (x.to(self.dtype) for x in (q, k, v))
        kept = self._history.room(k.shape[2], self.record_past)
        if kept == 0:
            out = self._step(q, k, v, valid)
        else:
            split = k.shape[2] - kept
            parts = [_tokens(part, q, k, v, valid) for part in (slice(0, split), slice(split, None))]
            outputs = [self._step(*parts[0])] if split else []
            self._history.keep(self._state(), parts[1][1:])
            out = torch.cat([*outputs, self._step(*parts[1])], 2)
        self._count(valid, k.shape[2])
        return out.to(dtype)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        before = self._state().tensors()
        out, self.state = self.mechanism.step(q, k, v, self._state(), key_mask=valid)
        if torch.compiler.is_compiling() and not self.state.growing:
            self.state.overwrite(before)
        return out

    def _state(self) -> State:
        assert self.state is not None
        return self.state

    def _count(self, valid: Tensor | None, length: int) -> None:
        assert self._valid is not None
        self.seen += length
        self._valid = self._valid + (length if valid is None else valid.sum(1))

    def _check_past(self, past: int | Tensor | None) -> None:
        if self.seen == 0 or past is None or self._valid is None:
            return
        agree = (self._valid == past).all()
        message = (
            "attention_mask hides earlier tokens that it showed before, or shows hidden ones: a state of "
            f"{type(self.mechanism).__name__} cannot forget single tokens; start from a new cache"
        )
        if agree.device.type != "cpu" or torch.compiler.is_compiling():
            torch.ops.aten._assert_async.msg(agree, message)  # without waiting for the device
        elif not agree:
            raise ValueError(message)

    def activate_past_recording(self) -> None:
        """Remember also single tokens, until the next `crop`, so that this can take them back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last `-tokens_to_remove` tokens, up to 64 of those that came in the last call without gradients.

        Raises:
            ValueError: if the number is positive, which some versions take for the length to keep.
            RuntimeError: if more are to be forgotten than were recorded.
        """
        remove = -int(tokens_to_remove)
        if remove < 0:
            raise ValueError(f"tokens_to_remove must not be positive, got {-remove}")
        if remove > self._history.length:
            raise RuntimeError(
                f"cannot take back {remove} tokens from the state of {type(self.mechanism).__name__}, which holds no "
                f"single tokens: the last {self._history.length} were recorded"
            )
        if remove:
            self._replay(self._history.length - remove)
        self._history = _History()

    def _replay(self, kept: int) -> None:
        """The state after the first `kept` of the recorded tokens."""
        history, self.state = self._history, self._history.before
        assert self._valid is not None
        for k, _, valid in history.tokens:
            self.seen -= k.shape[2]
            self._valid = self._valid - (k.shape[2] if valid is None else valid.sum(1))
        for k, v, valid in history.tokens:
            length = min(kept, k.shape[2])
            kept -= length
            if length:
                _, k, v, valid = _tokens(slice(0, length), k, k, v, valid)
                self._step(torch.zeros_like(k), k, v, valid)
                self._count(valid, length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.is_sliding and self.get_max_length() == -1:
            return self.seen + query_length, 0
        for name in ("cumulative_length", "cumulative_length_int"):
            if isinstance(getattr(self.replaced, name, None), int):
                setattr(self.replaced, name, self.seen)
        return self.replaced.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return self.replaced.get_max_length()

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False
        self._valid, self._spoilt, self._history = None, None, _History()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None and self._valid is not None:
            rows = beam_idx.to(self.state.device)
            self.state, self._valid = self.state.reorder(rows), self._valid[rows]
            self._history.reorder(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.reorder_cache(self._rows(self.state).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.reorder_cache(self._rows(self.state)[indices])

    def offload(self) -> None:
        """Nothing: a state is small, and stays where it is."""

    def prefetch(self) -> None:
        """Nothing, as nothing is offloaded."""

    @staticmethod
    def _rows(state: State) -> Tensor:
        return torch.arange(state.batch_size, device=state.device)


@dataclass
class _History:
    """The last tokens and the state before them, from which the state after fewer of them can be computed."""

    before: State | None = None
    tokens: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """How many tokens are kept."""
        return sum(k.shape[2] for k, _, _ in self.tokens)

    def room(self, length: int, always: bool) -> int:
        """How many of `length` new tokens to keep; what is kept no longer is forgotten."""
        if not always or length > ROLLBACK:
            self.before, self.tokens = None, []
        keeps = not torch.is_grad_enabled() and (always or length > 1)
        return min(length, ROLLBACK) if keeps else 0

    def keep(self, state: State, tokens: tuple[Tensor, Tensor, Tensor | None]) -> None:
        """Keep `tokens`, which `state` has not seen yet."""
        if not self.tokens:
            self.before = state.clone()
        self.tokens.append(tokens)

    def reorder(self, rows: Tensor) -> None:
        """Keep those of the rows of the batch, in that order."""
        self.before = None if self.before is None else self.before.reorder(rows)
        self.tokens = [(k[rows], v[rows], m if m is None else m[rows]) for k, v, m in self.tokens]


def _tokens(
    part: slice, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return q[:, :, part], k[:, :, part], v[:, :, part], None if valid is None else valid[:, part]
