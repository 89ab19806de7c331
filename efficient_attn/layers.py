"""The attention layer: tokens in, tokens out, around any mechanism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .checkpoints import Loadable
from .complexity import Cost, Shape
from .inputs import check_key_mask, check_positive, check_segment_ids
from .mechanisms.base import Mechanism
from .state import State

Rotary = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class LayerState(State):
    """What `Attention.step` carries: the mechanism's own state and the number of tokens it has seen."""

    mechanism: State
    position: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes held by the mechanism's state."""
        return self.mechanism.nbytes

    def clone(self) -> LayerState:
        """An independent copy."""
        return LayerState(self.mechanism.clone(), self.position)

    def reorder(self, indices: Int[Tensor, " new_batch"]) -> LayerState:
        """The state whose row b is this one's row `indices[b]`, as beam search needs."""
        return LayerState(self.mechanism.reorder(indices), self.position)


class Attention(Loadable):
    """Multi-head attention with any mechanism: project, split into heads, attend, merge, project back.

        out = merge(mechanism(split(x W_q), split(c W_k), split(c W_v))) W_o    where c = context, else x

    The layer owns the four projections and nothing else; exactness, and cost in the length, are the
    mechanism's. Padded tokens (False in `key_mask`, or a negative segment) are zeroed on entry, so that their
    content, NaN included, reaches neither an output nor the gradient of a weight.
    Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.2.2.

    Args:
        embed_dim: features of a token, in and out.
        num_heads: query heads.
        mechanism: how heads attend; a `Mechanism`.
        num_kv_heads: key and value heads, a divisor of `num_heads` (which it is by default).
        head_dim: features of a head; `embed_dim // num_heads` by default.
        bias: whether the four projections have one.
        rotary: `rotary(q, k, positions) -> (q, k)`, applied to the heads before they attend. `positions` is
            (L,) int64 and counts from the first column of the sequence, left padding included: softmax over
            rotated heads does not notice a shift, a feature map (linear, Performer) does.
        device: where the projections live.
        dtype: what the projections are stored in.
    Raises:
        TypeError: if `mechanism` is no Mechanism, or `rotary` cannot be called.
        ValueError: if the sizes do not fit together.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mechanism: Mechanism,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        rotary: Rotary | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_positive("embed_dim", embed_dim)
        self.num_heads = check_positive("num_heads", num_heads)
        self.num_kv_heads = check_positive(
            "num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads
        )
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"num_heads must divide embed_dim = {embed_dim} unless head_dim is given, got {num_heads}"
            )
        self.head_dim = check_positive("head_dim", embed_dim // num_heads if head_dim is None else head_dim)
        if not isinstance(mechanism, Mechanism):
            raise TypeError(f"mechanism must be a Mechanism instance, got {_name(mechanism)}")
        if rotary is not None and not callable(rotary):
            raise TypeError(
                f"rotary must be callable, (q, k, positions) -> (q, k), or None, got {_name(rotary)}"
            )

        self.mechanism = mechanism
        self.rotary = rotary

        def linear(in_features: int, out_features: int) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(embed_dim, num_heads * self.head_dim)
        self.k_proj = linear(embed_dim, self.num_kv_heads * self.head_dim)
        self.v_proj = linear(embed_dim, self.num_kv_heads * self.head_dim)
        self.out_proj = linear(num_heads * self.head_dim, embed_dim)
        self._reset_projections()

    def reset_parameters(self) -> None:
        """Draw the projections afresh, Xavier uniform with zero biases, and the mechanism's parameters."""
        self._reset_projections()
        reset_mechanism = getattr(self.mechanism, "reset_parameters", None)
        if reset_mechanism is not None:
            reset_mechanism()

    def _reset_projections(self) -> None:
        for projection in self._projections().values():
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        x: Float[Tensor, "batch length embed"],
        context: Float[Tensor, "batch context_length embed"] | None = None,
        *,
        key_mask: Bool[Tensor, "batch keys"] | None = None,
        segment_ids: Int[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length embed"]:
        """Attend from every token of `x` to the tokens of `x`, or of `context`.

        Args:
            x: the tokens.
            context: the tokens attended to, for cross attention.
            key_mask: True where a token may be attended to: a token of `context` if given, else of `x`.
            segment_ids: the document of each token; documents do not see each other. Negative: padding.
        Raises:
            ValueError: if shapes disagree; if `context` meets `rotary`, `segment_ids` or a causal mechanism,
                which have no meaning between two sequences; or if the mechanism cannot honour a mask.
            TypeError: if a mask has the wrong dtype.
        """
        self._check_tokens("x", x)
        if context is not None:
            self._check_context(x, context, segment_ids)
        tokens = x if context is None else context
        _check_masks(tokens, key_mask, segment_ids)

        tokens = _zero_padding(tokens, key_mask, segment_ids)
        q, k, v = self._heads(tokens if context is None else x, tokens, position=0)
        out = self.mechanism(q, k, v, key_mask=key_mask, segment_ids=segment_ids)
        return self._merge(out)

    def init_state(self, batch_size: int) -> LayerState:
        """The state of `step` before the first token, for `batch_size` rows.

        Its dtype is the one the projections compute in: autocast's where it is on, else their own.
        """
        weight = self.k_proj.weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        state = self.mechanism.init_state(
            batch_size, self.num_kv_heads, self.head_dim, dtype=dtype, device=weight.device
        )
        return LayerState(state)

    def step(
        self,
        x: Float[Tensor, "batch new embed"],
        state: LayerState,
        *,
        key_mask: Bool[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new embed"], LayerState]:
        """Attend from the next tokens, any number of them, to all tokens so far.

        Args:
            x: the new tokens.
            state: from `init_state`, or from the step before; it is consumed.
            key_mask: True where a new token may be attended to, now and later.
        Returns:
            What `forward` gives for these tokens at the end of the sequence so far, and the state after them.
        Raises:
            ValueError: if the mechanism is not causal, or shapes disagree.
        """
        self._check_tokens("x", x)
        _check_masks(x, key_mask, None)
        if not isinstance(state, LayerState):
            raise TypeError(f"state must be a LayerState from this layer's init_state, got {_name(state)}")

        x = _zero_padding(x, key_mask, None)
        q, k, v = self._heads(x, x, position=state.position)
        out, inner = self.mechanism.step(q, k, v, state.mechanism, key_mask=key_mask)
        return self._merge(out), LayerState(inner, state.position + x.shape[1])

    def cost(
        self,
        batch: int,
        seq_len: int,
        *,
        context_len: int | None = None,
        training: bool = False,
        phase: str = "prefill",
        basis: str = "model",
        backend: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Cost:
        """What one call costs: the mechanism and the four projections, without masks.

        Saved and peak bytes count the merged heads as a copy, which they are not where a backend's output
        already has them side by side.

        Args:
            batch: rows.
            seq_len: tokens in a row.
            context_len: tokens of `context` in a row, for cross attention.
            training: count the backward pass and what is kept for it.
            phase: "prefill" for `forward`; "decode" for a `step` with one token, the last of `seq_len`.
            basis: how the mechanism counts FLOPs, see `Mechanism.cost`; projections count the same on each.
            backend: which of the mechanism's backends; its own choice if None.
            dtype: of activations and parameters.
        Raises:
            ValueError: as `forward` and `Mechanism.cost` raise it.
        """
        if context_len is not None and (phase == "decode" or self.mechanism.is_causal):
            raise ValueError(f"context_len must be None when decoding or causal, got {context_len}")
        keys = seq_len if context_len is None else context_len
        shape = Shape(
            batch,
            self.num_heads,
            1 if phase == "decode" else seq_len,
            keys,
            self.head_dim,
            num_kv_heads=self.num_kv_heads,
            dtype=dtype,
        )
        inner = self.mechanism.cost(shape, training=training, phase=phase, basis=basis, backend=backend)
        new_keys = 1 if phase == "decode" else keys
        return self._add_projections(inner, shape, new_keys, context_len is not None, training)

    def _add_projections(self, inner: Cost, shape: Shape, new_keys: int, cross: bool, training: bool) -> Cost:
        item, queries, keys = shape.dtype.itemsize, shape.batch * shape.q_len, shape.batch * new_keys
        total = inner
        for (name, projection), rows in zip(
            self._projections().items(), (queries, keys, keys, queries), strict=True
        ):
            total += Cost.of_product(
                name,
                rows,
                projection.in_features,
                projection.out_features,
                bias=projection.bias is not None,
                itemsize=item,
                training=training,
            )

        # What the mechanism counts as its saved inputs are q, k, v: here made by us, and allocated.
        heads = queries * self.q_proj.out_features * item
        qkv = heads + keys * (self.k_proj.out_features + self.v_proj.out_features) * item
        merged, out = heads, queries * self.embed_dim * item
        tokens = (queries + keys if cross else queries) * self.embed_dim * item
        saved = inner.saved_bytes + merged + tokens if training else 0
        kept = max(inner.saved_bytes - shape.input_bytes, 0)
        peak = qkv + max(inner.peak_bytes, kept + heads + merged + out)
        return replace(total, saved_bytes=saved, peak_bytes=peak)

    def extra_repr(self) -> str:
        kv_heads = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        rotary = "" if self.rotary is None else f", rotary={_name(self.rotary)}"
        return f"{self.embed_dim}, num_heads={self.num_heads}{kv_heads}, head_dim={self.head_dim}{rotary}"

    def _projections(self) -> dict[str, nn.Linear]:
        return {name: getattr(self, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}

    def _heads(self, x: Tensor, tokens: Tensor, *, position: int) -> tuple[Tensor, Tensor, Tensor]:
        q = rearrange(self.q_proj(x), "b l (h e) -> b h l e", h=self.num_heads)
        k = rearrange(self.k_proj(tokens), "b s (h e) -> b h s e", h=self.num_kv_heads)
        v = rearrange(self.v_proj(tokens), "b s (h e) -> b h s e", h=self.num_kv_heads)
        if self.rotary is not None:
            positions = torch.arange(position, position + x.shape[1], device=x.device)
            q, k = self.rotary(q, k, positions)
            # Rotations are often computed in fp32; under autocast v is not, and mechanisms want one dtype.
            q, k = q.to(v.dtype), k.to(v.dtype)
        return q, k, v

    def _merge(self, heads: Tensor) -> Tensor:
        return self.out_proj(rearrange(heads, "b h l e -> b l (h e)"))

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        if tokens.dim() != 3 or tokens.shape[-1] != self.embed_dim:
            raise ValueError(
                f"{name} must have shape (batch, length, {self.embed_dim}), got {tuple(tokens.shape)}"
            )

    def _check_context(self, x: Tensor, context: Tensor, segment_ids: Tensor | None) -> None:
        self._check_tokens("context", context)
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context must have the batch size of x, {x.shape[0]}, got {context.shape[0]}")
        if self.rotary is not None:
            raise ValueError("context cannot be used with rotary: two sequences share no positions")
        if segment_ids is not None:
            raise ValueError("context cannot be used with segment_ids, which speak of one sequence")
        if self.mechanism.is_causal:
            raise ValueError(
                f"context cannot be used with a causal mechanism ({_name(self.mechanism)}): "
                "no token of one sequence precedes a token of another; build it with is_causal=False"
            )


def _check_masks(tokens: Tensor, key_mask: Tensor | None, segment_ids: Tensor | None) -> None:
    batch, length = tokens.shape[:2]
    if key_mask is not None:
        check_key_mask(key_mask, batch, length, tokens.device)
    if segment_ids is not None:
        check_segment_ids(segment_ids, batch, length, tokens.device)


def _zero_padding(tokens: Tensor, key_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    if key_mask is not None:
        tokens = torch.where(key_mask[..., None], tokens, 0)
    if segment_ids is not None:
        tokens = torch.where((segment_ids >= 0)[..., None], tokens, 0)
    return tokens


def _name(value: object) -> str:
    return getattr(value, "__name__", type(value).__name__)
