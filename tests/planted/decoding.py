"""Defects in the state that decoding carries."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from efficient_attn.inputs import accumulation_dtype
from efficient_attn.ops.linear import linear_step
from efficient_attn.state import KVState, LinearState, WindowState

from .defect import broken, defect


@defect(
    "contract: key_mask of step is remembered",
    "full_causal",
    {"stepping_equals_forward": "key_mask", "state_can_be_moved_about": "the state itself"},
    missed=("equals_its_matrix", "state_size_is_declared"),
)
def state_forgets_the_key_mask(m):
    def _step(self, q, k, v, state, key_mask):
        joint = state.append(k, v, None, in_place=False)
        if key_mask is not None:
            past = key_mask.new_ones(len(k), state.k.shape[2])
            key_mask = torch.cat([past, key_mask], 1)
        return self(q, joint.k, joint.v, key_mask=key_mask), joint

    return broken(m, _step=_step)


@defect(
    "a window state one slot short",
    "window_causal",
    {"stepping_equals_forward": "chunks .*, no mask"},
    missed=("equals_its_matrix", "state_size_is_declared"),
)
def window_state_is_one_slot_short(m):
    m.retained = (m.window_size - 1, 0)
    return m


@defect(
    "contract: the state's size is what cost says",
    "sinks_causal",
    {"state_size_is_declared": "declared"},
    missed=("stepping_equals_forward",),
)
def state_bytes_forget_the_sinks(m):
    cls = type(m)

    def _state_bytes(self, shape):
        self.retained, kept = (self.retained[0], 0), self.retained
        try:
            return cls._state_bytes(self, shape)
        finally:
            self.retained = kept

    return broken(m, _state_bytes=_state_bytes)


@defect(
    "fla#494, #83: chunked is not whole",
    "linear_causal",
    {"stepping_equals_forward": r"chunks \[37\]", "state_can_be_moved_about": "the state itself"},
    missed=("equals_its_matrix", "sees_no_future"),
)
def tokens_of_one_step_see_each_other(m):
    def _step(self, q, k, v, state, key_mask):
        problem = self._problem(q, k, v, key_mask, None, 0, None)
        _, kv, exponent = linear_step(problem, state.kv, state.exponent)
        nothing = {"k": k[:, :, :1], "v": v[:, :, :1], "key_mask": torch.zeros(len(k), 1, dtype=torch.bool)}
        last = [replace(problem, q=q[:, :, i : i + 1], **nothing) for i in range(q.shape[2])]
        return torch.cat([linear_step(p, kv, exponent)[0] for p in last], 2), LinearState(kv, exponent)

    return broken(m, _step=_step)


@dataclass
class ForgetfulWindow(WindowState):
    """Reorders keys and values, and forgets which of them were valid."""

    def reorder(self, indices: Tensor) -> Any:
        return replace(super().reorder(indices), valid=self.valid.repeat(2, 1)[: len(indices)])


@defect(
    "beam search that moves the cache but not its bookkeeping",
    "sinks_causal",
    {"state_can_be_moved_about": "rows reordered"},
    missed=("stepping_equals_forward",),
)
def reorder_leaves_a_field_behind(m):
    cls = type(m)

    def _init_state(self, *sizes):
        state = cls._init_state(self, *sizes)
        return ForgetfulWindow(**{field.name: getattr(state, field.name) for field in fields(state)})

    return broken(m, _init_state=_init_state)


@dataclass
class SharedState(LinearState):
    """Its clone is a second name for the same memory."""

    def clone(self) -> Any:
        return replace(self)


@defect(
    "a state updated in place whose clone is shallow",
    "linear_causal",
    {"state_can_be_moved_about": "its clone"},
    missed=("stepping_equals_forward",),
)
def clone_shares_memory(m):
    cls = type(m)

    def _init_state(self, *sizes):
        return SharedState(cls._init_state(self, *sizes).kv)

    def _step(self, q, k, v, state, key_mask):
        out, after = cls._step(self, q, k, v, state, key_mask)
        state.kv.copy_(after.kv)
        return out, state

    return broken(m, _init_state=_init_state, _step=_step)


@defect(
    "contract: state goes in and out, never hidden in a module",
    "full_causal",
    {"state_can_be_moved_about": "its clone"},
    missed=("stepping_equals_forward", "state_size_is_declared"),
)
def state_is_hidden_in_the_module(m):
    def _step(self, q, k, v, state, key_mask):
        if state.k.shape[2] == 0:
            self.cache = state
        self.cache = self.cache.append(k, v, key_mask, in_place=False)
        held = (getattr(self.cache, field.name) for field in fields(KVState))
        copy = KVState(*(None if x is None else x.clone() for x in held))
        return self(q, copy.k, copy.v, key_mask=copy.key_mask), copy

    return broken(m, _step=_step)


@defect(
    "a state in the dtype of the inputs: in bf16 it keeps 2.7 % of the denominator at 2^20 tokens",
    "linear_causal",
    {"stepping_keeps_precision": "mean error|largest error"},
    missed=("stepping_equals_forward", "state_size_is_declared", "error_is_within_budget"),
)
def state_is_kept_in_bf16(m):
    cls = type(m)

    def _init_state(self, batch, heads, head_dim, v_head_dim, dtype, device):
        state = cls._init_state(self, batch, heads, head_dim, v_head_dim, dtype, device)
        return replace(state, kv=state.kv.to(dtype))

    def _step(self, q, k, v, state, key_mask):
        wide = state.kv.to(accumulation_dtype(k.dtype))
        out, after = cls._step(self, q, k, v, replace(state, kv=wide), key_mask)
        return out, replace(after, kv=after.kv.to(k.dtype))

    def _state_bytes(self, shape):
        width = 8 if shape.dtype == torch.float64 else 4
        return cls._state_bytes(self, shape) * shape.dtype.itemsize // width

    return broken(m, _init_state=_init_state, _step=_step, _state_bytes=_state_bytes)


@defect(
    "contract: step takes any number of new tokens; here none of them counts as a padded one",
    "window_causal",
    {"steps_take_nothing": "with empty steps in between"},
    missed=("stepping_equals_forward", "state_size_is_declared"),
)
def empty_steps_push_the_window(m):
    cls = type(m)

    def step(self, q, k, v, state, *, key_mask=None):
        if not q.shape[2] and state.seen:
            nothing = k.new_zeros(*k.shape[:2], 1, k.shape[3])
            state.push(
                nothing, v.new_zeros(*v.shape[:2], 1, v.shape[3]), k.new_zeros(len(k), 1, dtype=torch.bool)
            )
        return cls.step(self, q, k, v, state, key_mask=key_mask)

    return broken(m, step=step)
