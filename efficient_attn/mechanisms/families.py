"""The two families of mechanisms. A softmax mechanism says its mask, a linear one its feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import inputs
from ..complexity import Cost, Shape
from ..feature_maps import FeatureMap
from ..masks import Causal, Everything, Mask
from ..ops.costs import linear_cost, softmax_cost, step_traffic
from ..ops.dense import softmax_matrix
from ..ops.linear import LINEAR_BACKENDS, NOTHING, linear_matrix, linear_step
from ..ops.problem import LinearProblem, SoftmaxProblem
from ..ops.softmax import PATTERN_BACKENDS, attend_where
from ..state import KVState, LinearState, State, WindowState
from .base import Mechanism


class SoftmaxMechanism(Mechanism):
    """softmax(scale q k^T) v over a structured mask, from which everything here follows.

    Args:
        mask: the pattern; causality comes on top of it if `is_causal`.
        retained: (window, sinks) if no query ever looks further back than `window` keys, itself included, but
            for the first `sinks`; None if decoding must keep every key.
    """

    backends = PATTERN_BACKENDS
    _STEP_CHUNK = 64

    def __init__(
        self,
        mask: Mask,
        *,
        is_causal: bool,
        scale: float | None = None,
        dropout_p: float = 0.0,
        backend: str = "auto",
        retained: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(is_causal=is_causal, scale=scale, backend=backend)
        if is_causal:
            mask = Causal() if mask == Everything() else mask & Causal()
        self.mask = mask
        self.mask_spec = mask.spec()
        self.dropout_p = inputs.check_probability("dropout_p", dropout_p)
        self.retained = retained
        self.anchored = mask.anchored
        self.supports_segments = not mask.anchored

    def _problem(self, q, k, v, key_mask, segment_ids, q_offset, attn_bias) -> SoftmaxProblem:  # type: ignore[no-untyped-def]
        return SoftmaxProblem(
            **self._common(q, k, v, key_mask, segment_ids, q_offset, attn_bias),
            mask=self.mask,
            mask_spec=self.mask_spec,
            attn_bias=attn_bias,
            dropout_p=self._dropout(),
        )

    def matrix(self, q, k, *, key_mask=None, segment_ids=None, q_offset=None, attn_bias=None):  # type: ignore[no-untyped-def]
        return softmax_matrix(self._problem(q, k, k, key_mask, segment_ids, q_offset, attn_bias))

    def _dropout(self) -> float:
        return self.dropout_p or 0.0 if self.training else 0.0

    def _init_state(
        self, batch: int, heads: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, device: Any
    ) -> State:
        def zeros(length: int, size: int) -> Tensor:
            return torch.zeros(batch, heads, length, size, dtype=dtype, device=device)

        if self.retained is None:
            return KVState(zeros(0, head_dim), zeros(0, v_head_dim))
        slots, sinks = self.retained[0] - 1, self.retained[1]
        invalid = torch.zeros(batch, slots + sinks, dtype=torch.bool, device=device).split([slots, sinks], 1)
        return WindowState(
            zeros(slots, head_dim),
            zeros(slots, v_head_dim),
            invalid[0].contiguous(),
            zeros(sinks, head_dim),
            zeros(sinks, v_head_dim),
            invalid[1].contiguous(),
            torch.full((batch,), -1, dtype=torch.int64, device=device),
        )

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, key_mask: Tensor | None
    ) -> tuple[Tensor, State]:
        if self.retained is None:
            # A backward pass through any of these reads the keys and values again.
            recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, state.k, state.v))
            state = state.append(k, v, key_mask, in_place=not recorded)
            return self(q, state.k, state.v, key_mask=state.key_mask), state
        size = max(self.retained[0], self._STEP_CHUNK)
        valid = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
        if state.seen == 0 and q.shape[2] > size:
            return self._first_step(q, k, v, state, valid), state
        outputs = [
            self._window_step(*chunk, state)
            for chunk in zip(
                q.split(size, 2), k.split(size, 2), v.split(size, 2), valid.split(size, 1), strict=True
            )
        ]
        return torch.cat(outputs, 2), state

    def _first_step(self, q: Tensor, k: Tensor, v: Tensor, state: WindowState, valid: Tensor) -> Tensor:
        """A whole prompt at once, as the forward pass takes it, and what a state keeps of it."""
        out = self(q, k, v, key_mask=valid)
        if state.sink_valid.shape[1]:
            state.fill_sinks(k, v, valid)
        else:
            state.anchor = state.find_anchor(valid)
        state.push(k, v, valid)
        return out

    def _window_step(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, state: WindowState) -> Tensor:
        """New tokens against sinks, window and themselves; what a sink holds is hidden elsewhere."""
        if state.sink_valid.shape[1]:
            state.fill_sinks(k, v, valid)
        else:
            state.anchor = state.find_anchor(valid)
        slots, sinks = state.k.shape[2], state.sink_k.shape[2]
        position = torch.arange(state.seen - slots, state.seen + k.shape[2], device=k.device)
        near = position - state.anchor[:, None]
        far = torch.arange(sinks, device=k.device).expand(len(near), -1)
        k_pos = torch.cat([far, near], 1)[:, None, :]
        q_pos = near[:, slots:, None]
        present = torch.cat(
            [state.sink_valid, state.valid & (near[:, :slots] >= sinks), valid & (near[:, slots:] >= sinks)],
            1,
        )
        allowed = self.mask.allows(q_pos, k_pos) & present[:, None, :]
        keys, values = torch.cat([state.sink_k, state.k, k], 2), torch.cat([state.sink_v, state.v, v], 2)
        scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
        out = attend_where(q, keys, values, allowed[:, None], scale, self._dropout())
        state.push(k, v, valid)
        return out

    def _cost(self, shape: Shape, training: bool, phase: str, basis: str, backend: str) -> Cost:
        cost = softmax_cost(self.mask, shape, training, basis, backend)
        if not self.is_causal:
            return cost
        per_token = self._bytes_per_token(shape)
        grows = self.retained is None
        cost += Cost.of_state(self._state_bytes(shape), shape.batch * per_token * grows)
        if phase != "decode":
            return cost
        if self.retained is None:
            grown = changed = shape.batch * shape.q_len * per_token
        else:
            kept = min(shape.q_len, self.retained[0] - 1 + self.retained[1])
            grown, changed = 0, shape.batch * kept * (per_token + 1)
        return step_traffic(cost, shape, grown, changed)

    @staticmethod
    def _bytes_per_token(shape: Shape) -> int:
        """Of the keys and values of one token."""
        return shape.num_kv_heads * (shape.head_dim + shape.v_head_dim) * shape.dtype.itemsize

    def _state_bytes(self, shape: Shape) -> int:
        per_token = self._bytes_per_token(shape)
        if self.retained is None:
            return shape.batch * shape.kv_len * per_token
        slots = self.retained[0] - 1 + self.retained[1]
        return shape.batch * (slots * (per_token + 1) + 8)  # each slot's validity, and the anchor

    def _describe(self) -> dict[str, Any]:
        """The constructor arguments to show, in order."""
        return {}

    def extra_repr(self) -> str:
        shown = {**self._describe(), "is_causal": self.is_causal, "scale": self.scale}
        if self.dropout_p:
            shown["dropout_p"] = self.dropout_p
        if self.backend != "auto":
            shown["backend"] = self.backend
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)


class LinearMechanism(Mechanism):
    """phi(q) (phi(k)^T v), each row divided by its sum of weights; causal by a scan.

    Args:
        feature_map: phi.
    """

    backends = LINEAR_BACKENDS

    def __init__(
        self, feature_map: FeatureMap, *, is_causal: bool, scale: float | None = None, backend: str = "auto"
    ) -> None:
        super().__init__(is_causal=is_causal, scale=scale, backend=backend)
        self.feature_map = feature_map
        self.mask: Mask = Causal() if is_causal else Everything()

    def _problem(self, q, k, v, key_mask, segment_ids, q_offset, attn_bias) -> LinearProblem:  # type: ignore[no-untyped-def]
        common = self._common(q, k, v, key_mask, segment_ids, q_offset, attn_bias)
        return LinearProblem(**common, mask=self.mask, feature_map=self.feature_map)

    def matrix(self, q, k, *, key_mask=None, segment_ids=None, q_offset=None, attn_bias=None):  # type: ignore[no-untyped-def]
        return linear_matrix(self._problem(q, k, k, key_mask, segment_ids, q_offset, attn_bias))

    def _init_state(
        self, batch: int, heads: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, device: Any
    ) -> State:
        dtype = inputs.accumulation_dtype(dtype)
        size = self.feature_map.num_features(head_dim)
        kv = torch.zeros(batch, heads, size, v_head_dim + 1, dtype=dtype, device=device)
        exponent = torch.full((batch, heads), NOTHING, dtype=dtype, device=device)
        return LinearState(kv, exponent if self.feature_map.has_exponent else None)

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, key_mask: Tensor | None
    ) -> tuple[Tensor, State]:
        problem = self._problem(q, k, v, key_mask, None, 0, None)
        out, kv, exponent = linear_step(problem, state.kv, state.exponent, self.backend)
        return out, LinearState(kv, exponent)

    def _cost(self, shape: Shape, training: bool, phase: str, basis: str, backend: str) -> Cost:
        cost = linear_cost(self.feature_map, self.is_causal, shape, training, phase, basis, backend)
        if not self.is_causal:
            return cost
        cost += Cost.of_state(self._state_bytes(shape))
        return step_traffic(cost, shape, 0, cost.state_bytes) if phase == "decode" else cost

    def _state_bytes(self, shape: Shape) -> int:
        numbers = self.feature_map.num_features(shape.head_dim) * (shape.v_head_dim + 1)
        numbers += self.feature_map.has_exponent
        return shape.batch * shape.num_kv_heads * numbers * inputs.accumulation_dtype(shape.dtype).itemsize

    def extra_repr(self) -> str:
        return f"is_causal={self.is_causal}" + ("" if self.scale is None else f", scale={self.scale}")
