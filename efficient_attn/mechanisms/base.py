"""The contract of a mechanism, and what every mechanism does the same way."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import inputs
from ..backends import Backend, check_backend, explain, select
from ..checkpoints import Loadable
from ..complexity import Complexity, Cost, Shape
from ..complexity.cost import BASES, PHASES, check_choice
from ..ops.problem import Problem
from ..state import State

Queries = Float[Tensor, "batch heads q_len head_dim"]
Keys = Float[Tensor, "batch kv_heads kv_len head_dim"]
Values = Float[Tensor, "batch kv_heads kv_len v_head_dim"]
KeyMask = Bool[Tensor, "batch kv_len"]
SegmentIds = Int[Tensor, "batch kv_len"]
Offset = int | Int[Tensor, ""] | torch.SymInt
Output = Float[Tensor, "batch heads q_len v_head_dim"]
Matrix = Float[Tensor, "batch heads q_len kv_len"]


class Mechanism(Loadable, ABC):
    """A linear map on values, given queries and keys: `self(q, k, v) == self.matrix(q, k) @ v`.

    Queries are the last L of the S positions unless `q_offset` says where the first one stands. True in a mask
    means "may be attended to". A row with nothing to attend to is zero, with zero gradient.

    Args:
        is_causal: whether a query sees only keys at or before its position.
        scale: the softmax scale; 1 / sqrt(E) if None. Linear mechanisms multiply q by scale * sqrt(E).
        backend: "auto", or the name of one of `backends`, which then runs or raises BackendError.
    """

    backends: ClassVar[tuple[Backend, ...]]
    complexity: Complexity
    is_causal: bool

    supports_segments: bool = True
    """Whether `segment_ids` is honoured; otherwise it is refused."""
    supports_bias: bool = False
    """Whether `attn_bias` is honoured; otherwise it is refused."""
    rows_sum_to_one: bool = True
    """Whether each row of `matrix` sums to 1, or to 0 where nothing may be attended to."""
    anchored: bool = False
    """Whether the pattern counts from each row's first valid key."""
    dropout_p: float | None = None
    """Probability of dropping a weight in training mode; None if there are no weights to drop."""
    largest_input: float = 65504.0
    """Inputs up to this magnitude give finite outputs and gradients, if the dtype holds the exact ones."""
    max_seq_len: int | None = None
    """The most keys that it takes, if there is a limit."""
    head_dim: int | None = None
    """The head size that it was built for, if it was."""
    num_kv_heads: int | None = None
    """The number of key-value heads that it was built for, if it was."""
    arguments: dict[str, Any]
    """What it was constructed with, by name."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _recorded(cls.__init__)

    def __init__(self, *, is_causal: bool, scale: float | None, backend: str) -> None:
        super().__init__()
        self.is_causal = inputs.check_flag("is_causal", is_causal)
        self.scale = inputs.check_scale(scale)
        self.backend = check_backend(backend, self.backends)

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        *,
        key_mask: KeyMask | None = None,
        segment_ids: SegmentIds | None = None,
        q_offset: Offset | None = None,
        attn_bias: Tensor | None = None,
    ) -> Output:
        """`matrix(q, k, ...) @ v`, without writing the matrix.

        Args:
            q: queries (B, H, L, E).
            k: keys (B, Hkv, S, E); H must be a multiple of Hkv.
            v: values (B, Hkv, S, Ev).
            key_mask: (B, S) bool, True = may be attended to; what stands elsewhere is never read.
            segment_ids: (B, S) integers; a query sees keys of its own segment. Negative = padding.
            q_offset: position of the first query, an int or a 0-d integer tensor; S - L if None.
            attn_bias: broadcasts to (B, H, L, S); added to the scores, or bool with True = may attend.
        Returns:
            (B, H, L, Ev) in the dtype of q.
        Raises:
            ValueError, TypeError: for an argument that does not fit, or a mask that cannot be honoured.
            BackendError: if no backend can run, with each one's reasons.
        """
        problem = self._problem(q, k, v, key_mask, segment_ids, q_offset, attn_bias)
        return select(self.backends, problem, self.backend).run(problem)

    @abstractmethod
    def matrix(
        self,
        q: Queries,
        k: Keys,
        *,
        key_mask: KeyMask | None = None,
        segment_ids: SegmentIds | None = None,
        q_offset: Offset | None = None,
        attn_bias: Tensor | None = None,
    ) -> Matrix:
        """The weights (B, H, L, S) in the accumulation dtype: O(L S) time and memory. Dropout is left out."""

    def init_state(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> State:
        """The state before the first token.

        Raises:
            ValueError: if the mechanism is not causal, or a size is out of range.
        """
        self._check_can_step()
        inputs.check_positive("batch_size", batch_size, least=0)
        inputs.check_positive("num_kv_heads", num_kv_heads)
        inputs.check_positive("head_dim", head_dim)
        v_head_dim = head_dim if v_head_dim is None else inputs.check_positive("v_head_dim", v_head_dim)
        dtype = torch.get_default_dtype() if dtype is None else inputs.check_float_dtype(dtype)
        return self._init_state(batch_size, num_kv_heads, head_dim, v_head_dim, dtype, device)

    def step(
        self, q: Queries, k: Keys, v: Values, state: State, *, key_mask: KeyMask | None = None
    ) -> tuple[Output, State]:
        """Outputs for any number of new tokens, and the state after them; `state` is consumed.

        Args:
            q, k, v: the new tokens, of equal length.
            state: from `init_state` or the last `step`.
            key_mask: (B, new tokens) bool, True = may be attended to.
        Raises:
            ValueError, TypeError: if the mechanism is not causal, or an argument does not fit.
        """
        self._check_can_step()
        inputs.check_qkv(q, k, v)
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"q, k and v must have one length in step, got {q.shape[2]} queries, {k.shape[2]} keys"
            )
        if key_mask is not None:
            inputs.check_key_mask(key_mask, k.shape[0], k.shape[2], k.device)
            k, v = zero_where_masked(key_mask, k, v)
        self._check_state(k, v, state)
        if q.shape[2] == 0:
            return q.new_zeros(*q.shape[:3], v.shape[3]), state
        return self._step(q, k, v, state, key_mask)

    @abstractmethod
    def _cost(self, shape: Shape, training: bool, phase: str, basis: str, backend: str) -> Cost:
        """`cost` with checked arguments."""

    def cost(
        self,
        shape: Shape,
        *,
        training: bool = False,
        phase: str = "prefill",
        basis: str = "model",
        backend: str | None = None,
    ) -> Cost:
        """What one call costs.

        Args:
            shape: the sizes; queries are the last `q_len` of `kv_len` positions.
            training: count the backward pass and what is kept for it.
            phase: "prefill" for `forward`, "decode" for `step` with `q_len` new tokens.
            basis: "model" counts the pairs of the mathematics; "hardware" what the backend multiplies, tile
                rounding and recomputation included; "torch" what torch's FlopCounterMode reports.
            backend: which one; the mechanism's own if None, the first of the page if that is "auto".
        Raises:
            ValueError: for an unknown phase, basis or backend, or decoding that does not exist.
        """
        if not isinstance(shape, Shape):
            raise TypeError(f"shape must be a Shape, got {type(shape).__name__}")
        check_choice("phase", phase, PHASES)
        check_choice("basis", basis, BASES)
        inputs.check_flag("training", training)
        if phase == "decode":
            self._check_can_step()
        chosen = check_backend(self.backend if backend is None else backend, self.backends)
        return self._cost(
            shape, training, phase, basis, self._default_backend() if chosen == "auto" else chosen
        )

    def evaluate(self, name: str, seq_len: int, head_dim: int, *, ranks: int = 1) -> float:
        """A formula of `complexity`, such as "time", with this mechanism's own parameters in it.

        Args:
            name: "time", "memory", "sequential_steps", "decode_time", "state", "path" or "sent".
            seq_len, head_dim, ranks: L, E and P.
        Raises:
            ValueError: for another name, or a formula with a letter that `complexity.symbols` does not explain.
        """
        values: dict[str, float] = {"L": seq_len, "E": head_dim, "P": ranks}
        for letter, attribute in self.complexity.symbols.items():
            value = getattr(self, attribute)
            values[letter] = len(value) if isinstance(value, tuple) else value
        return self.complexity.evaluate(name, values)

    def _default_backend(self) -> str:
        return next(backend.name for backend in self.backends if backend.portable)

    def explain(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        *,
        key_mask: KeyMask | None = None,
        segment_ids: SegmentIds | None = None,
        q_offset: Offset | None = None,
        attn_bias: Tensor | None = None,
    ) -> str:
        """Which backend `forward` would run on these arguments, and why each other one would not."""
        problem = self._problem(q, k, v, key_mask, segment_ids, q_offset, attn_bias)
        heading = f"{self} on {q.device.type}, {str(q.dtype).removeprefix('torch.')}"
        return f"{heading}\n{explain(self.backends, problem, self.backend)}"

    def exact_limit(self, seq_len: int) -> Mechanism | None:
        """The same mechanism with the parameters at which it equals FullAttention on `seq_len` tokens, if any."""
        return None

    @classmethod
    @abstractmethod
    def examples(cls, seq_len: int, num_heads: int, head_dim: int) -> list[Mechanism]:
        """Instances that together show every option, for sequences of `seq_len`: laws, benchmarks, docs."""

    @abstractmethod
    def _problem(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        q_offset: Any,
        attn_bias: Tensor | None,
    ) -> Problem:
        """The arguments of `forward`, checked and resolved."""

    def _common(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        q_offset: Any,
        attn_bias: Tensor | None,
    ) -> dict[str, Any]:
        """The fields that every problem has."""
        inputs.check_qkv(q, k, v)
        batch, _, num_keys, _ = k.shape
        if key_mask is not None:
            inputs.check_key_mask(key_mask, batch, num_keys, k.device)
            k, v = zero_where_masked(key_mask, k, v)
        if segment_ids is not None:
            self._refuse(
                "segment_ids", self.supports_segments, "its pattern or projection counts from the start"
            )
            inputs.check_segment_ids(segment_ids, batch, num_keys, k.device)
            segment_ids = segment_ids.to(torch.int64)
            k, v = zero_where_masked(segment_ids >= 0, k, v)
        if attn_bias is not None:
            self._refuse("attn_bias", self.supports_bias, "only FullAttention adds a bias")
            inputs.check_attn_bias(attn_bias, (batch, q.shape[1], q.shape[2], num_keys), q.device)
        return {
            "q": q,
            "k": k,
            "v": v,
            "q_offset": inputs.resolve_offset(q_offset, q.shape[2], num_keys, self.is_causal, q.device),
            "scale": q.shape[3] ** -0.5 if self.scale is None else self.scale,
            "is_causal": self.is_causal,
            "key_mask": key_mask,
            "segment_ids": segment_ids,
        }

    def _refuse(self, argument: str, supported: bool, reason: str) -> None:
        if not supported:
            raise ValueError(f"{type(self).__name__} cannot honour {argument}: {reason}")

    def _check_can_step(self) -> None:
        if not self.is_causal:
            raise ValueError(
                f"{type(self).__name__} is not causal: decoding (init_state, step) needs is_causal=True"
            )

    def _check_state(self, k: Tensor, v: Tensor, state: State) -> None:
        expected = self._init_state(0, k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device)
        if type(state) is not type(expected):
            raise TypeError(f"state must be a {type(expected).__name__}, got {type(state).__name__}")
        for name in (field.name for field in fields(expected) if field.name not in state.optional):
            want, have = getattr(expected, name), getattr(state, name)
            if (want is None) != (have is None):
                kinds = f"{type(want).__name__}, got {type(have).__name__}"
                raise ValueError(f"state.{name} must be {kinds}: it is the state of another mechanism")
            if not isinstance(want, Tensor):
                continue
            shape = [len(k), *want.shape[1:]]
            if name in state.growing:
                shape[2] = have.shape[2]
            if list(have.shape) != shape or have.dtype != want.dtype or have.device != k.device:
                raise ValueError(
                    f"state.{name} must be {tuple(shape)}, {want.dtype} on {k.device} for these tokens, "
                    f"got {tuple(have.shape)}, {have.dtype} on {have.device}"
                )

    def _init_state(
        self, batch: int, heads: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, device: Any
    ) -> State:
        raise NotImplementedError(f"{type(self).__name__} has no decode state")

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, key_mask: Tensor | None
    ) -> tuple[Tensor, State]:
        raise NotImplementedError(f"{type(self).__name__} has no decode state")


def _recorded(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that keeps its arguments in `arguments`, where a subclass's has not done so."""

    @functools.wraps(init)
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        if "arguments" not in vars(self):
            bound = inspect.signature(init).bind_partial(self, *args, **kwargs).arguments
            own = {name: value for i, (name, value) in enumerate(bound.items()) if i}
            object.__setattr__(self, "arguments", own)
        init(self, *args, **kwargs)

    return recording


def zero_where_masked(key_mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Zeros where `key_mask` (B, S) is False, so that what stands there (NaN too) reaches nothing."""
    return tuple(torch.where(key_mask[:, None, :, None], x, 0.0) for x in tensors)
