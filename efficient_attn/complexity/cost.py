"""Exact counts: FLOPs, bytes moved, bytes held."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ..inputs import check_float_dtype, check_positive

BASES = ("model", "hardware", "torch")
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Flops:
    """FLOPs in matrix products, 2 for each multiply-accumulate. `recompute` is done again in the backward pass."""

    forward: int
    backward: int = 0
    recompute: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.backward + self.recompute

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute
        )

    def __mul__(self, times: int) -> Flops:
        return Flops(self.forward * times, self.backward * times, self.recompute * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Shape:
    """The sizes of one call: q (batch, num_heads, q_len, head_dim), k and v of kv_len tokens.

    Args:
        num_kv_heads: heads of k and v; num_heads by default.
        v_head_dim: head size of v; head_dim by default.
        dtype: of q, k, v and the output.
    Raises:
        ValueError: if a size is negative or the heads do not group.
    """

    batch: int
    num_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    num_kv_heads: int = field(default=None, kw_only=True)  # type: ignore[assignment]
    v_head_dim: int = field(default=None, kw_only=True)  # type: ignore[assignment]
    dtype: torch.dtype = field(default=torch.bfloat16, kw_only=True)

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.v_head_dim is None:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        for name in ("batch", "q_len", "kv_len"):
            check_positive(name, getattr(self, name), least=0)
        for name in ("num_heads", "head_dim", "num_kv_heads", "v_head_dim"):
            check_positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        check_float_dtype(self.dtype)

    @property
    def q_numel(self) -> int:
        return self.batch * self.num_heads * self.q_len * self.head_dim

    @property
    def k_numel(self) -> int:
        return self.batch * self.num_kv_heads * self.kv_len * self.head_dim

    @property
    def v_numel(self) -> int:
        return self.batch * self.num_kv_heads * self.kv_len * self.v_head_dim

    @property
    def out_numel(self) -> int:
        return self.batch * self.num_heads * self.q_len * self.v_head_dim

    @property
    def input_bytes(self) -> int:
        """Bytes of q, k and v."""
        return (self.q_numel + self.k_numel + self.v_numel) * self.dtype.itemsize

    @property
    def output_bytes(self) -> int:
        """Bytes of the output."""
        return self.out_numel * self.dtype.itemsize


@dataclass(frozen=True)
class Cost:
    """What one call costs, in exact integers.

    Attributes:
        flops: in matrix products; under the basis that was asked for.
        bytes_read, bytes_written: the least traffic of a forward pass: every input read once, every output written
            once. Decoding reads the state and the new tokens, and writes the output and what changes in the state.
        params: learnt numbers.
        saved_bytes: kept from the forward pass for the backward pass, inputs included; 0 unless training.
            Exact for the backends that "auto" takes, an estimate for "reference".
        peak_bytes: a bound on what is allocated at once: output, saved (inputs excepted), workspace; but for the
            scratch of torch's fused CPU kernel, up to 1.25 MiB for each thread.
        transient_bytes: that part of it which is gone when the pass returns: workspace, and when training the
            gradients of the inputs, which the next call of the backward pass consumes.
        state_bytes: of the decode state after `kv_len` tokens, none of them masked; 0 if the mechanism cannot decode.
        kv_bytes_per_token: by which the decode state grows with each token; 0 if it does not grow.
        terms: forward FLOPs by name; they sum to `flops.forward`.
    """

    flops: Flops
    bytes_read: int = 0
    bytes_written: int = 0
    params: int = 0
    saved_bytes: int = 0
    peak_bytes: int = 0
    transient_bytes: int = 0
    state_bytes: int = 0
    kv_bytes_per_token: int = 0
    terms: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_state(cls, state_bytes: int, kv_bytes_per_token: int = 0) -> Cost:
        """Nothing but a decode state."""
        return cls(Flops(0), state_bytes=state_bytes, kv_bytes_per_token=kv_bytes_per_token)

    @classmethod
    def of_product(
        cls,
        name: str,
        rows: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        itemsize: int,
        training: bool = False,
    ) -> Cost:
        """`rows` tokens times a weight, plus a bias; the backward pass is two products of that size."""
        forward = 2 * rows * in_features * out_features
        params = in_features * out_features + out_features * bias
        return cls(
            flops=Flops(forward, backward=2 * forward if training else 0),
            bytes_read=(rows * in_features + params) * itemsize,
            bytes_written=rows * out_features * itemsize,
            params=params,
            terms={name: forward},
        )

    @property
    def traffic(self) -> int:
        """Bytes read and written together."""
        return self.bytes_read + self.bytes_written

    def __add__(self, other: Cost) -> Cost:
        """One call after the other, what both keep for the backward pass held together."""
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.params + other.params,
            self.saved_bytes + other.saved_bytes,
            max(self.peak_bytes + other.saved_bytes, other.peak_bytes + self.saved_bytes),
            max(self.transient_bytes, other.transient_bytes),
            self.state_bytes + other.state_bytes,
            self.kv_bytes_per_token + other.kv_bytes_per_token,
            {
                name: self.terms.get(name, 0) + other.terms.get(name, 0)
                for name in {**self.terms, **other.terms}
            },
        )

    def __mul__(self, times: int) -> Cost:
        """`times` such calls one after another, as a stack of layers makes them."""
        check_positive("times", times, least=0)
        return Cost(
            self.flops * times,
            self.bytes_read * times,
            self.bytes_written * times,
            self.params * times,
            self.saved_bytes * times,
            self.peak_bytes + self.saved_bytes * (times - 1) if times else 0,
            self.transient_bytes if times else 0,
            self.state_bytes * times,
            self.kv_bytes_per_token * times,
            {name: value * times for name, value in self.terms.items()},
        )

    __rmul__ = __mul__

    def checkpointed(self, input_bytes: int) -> Cost:
        """The same call under gradient checkpointing: kept are its `input_bytes`, all else is computed again.

        Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174, section 4.1.
        """
        check_positive("input_bytes", input_bytes, least=0)
        again = replace(self.flops, recompute=self.flops.recompute + self.flops.forward)
        return replace(
            self,
            flops=again,
            saved_bytes=input_bytes,
            peak_bytes=max(self.peak_bytes, self.saved_bytes + self.transient_bytes),
            transient_bytes=self.saved_bytes + self.transient_bytes,
        )


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
