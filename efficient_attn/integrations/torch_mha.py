"""A drop-in `torch.nn.MultiheadAttention` around any mechanism."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..masks import Everything
from ..mechanisms import FullAttention
from ..mechanisms.base import Mechanism


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with a choice of mechanism: same arguments, polarity and state_dict keys.

        out = concat_h(mechanism(query W_q, key W_k, value W_v)_h) W_o

    Masks keep PyTorch's polarity: True in `key_padding_mask` or a bool `attn_mask` means *may not* attend.
    With `mechanism=None`, which is full attention, it equals PyTorch's module but for three things:

    - a query with nothing to attend to gives the output bias, where PyTorch gives NaN;
    - NaN and Inf in padded keys and values do not spread, nor in padded queries of self-attention;
    - the weights returned in training are those before dropout.

    Inside `nn.TransformerEncoder` it is always called: PyTorch's inference fast path, which computes full
    attention whatever the mechanism, never bypasses it.
    Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.2.2.

    Args:
        embed_dim: features of a query and of the output.
        num_heads: heads; a divisor of `embed_dim`.
        dropout: probability of dropping an attention weight in training. With a `mechanism`, give it to that.
        bias: whether the projections have one.
        add_bias_kv: append a learned key and value. Full attention only.
        add_zero_attn: append a zero key and value. Full attention only.
        kdim: features of a key; `embed_dim` by default.
        vdim: features of a value; `embed_dim` by default.
        batch_first: whether batched tensors are (batch, length, features), not (length, batch, features).
        device: where the parameters live.
        dtype: what the parameters are stored in.
        mechanism: how heads attend; None is `FullAttention(dropout_p=dropout)`.
        dense_weights: let a mechanism other than full answer `need_weights=True`, which builds its matrix in
            O(L S) time and memory.
    Raises:
        TypeError: if `mechanism` is no Mechanism.
        ValueError: if the sizes do not fit together, or the mechanism cannot do what is asked of it.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mechanism: Mechanism | None = None,
        dense_weights: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                "embed_dim and num_heads must be positive, and num_heads divide embed_dim; "
                f"got embed_dim={embed_dim}, num_heads={num_heads}"
            )
        if mechanism is None:
            mechanism = FullAttention(dropout_p=dropout)
        elif not isinstance(mechanism, Mechanism):
            raise TypeError(f"mechanism must be a Mechanism instance or None, got {_name(mechanism)}")
        elif dropout:
            raise ValueError(
                f"dropout={dropout} must be 0 beside a mechanism: give {_name(mechanism)} its own"
            )
        if add_bias_kv or add_zero_attn:
            _check_can_append("add_bias_kv" if add_bias_kv else "add_zero_attn", mechanism)

        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.mechanism = mechanism
        self.dense_weights = dense_weights
        self.was_self_attention = False
        # Where this is True, the fast path of nn.TransformerEncoderLayer skips forward altogether.
        self._qkv_same_embed_dim = False
        self._add_parameters(bias, add_bias_kv, device, dtype)
        self._reset_projections()

    def _add_parameters(
        self, bias: bool, add_bias_kv: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        embed_dim = self.embed_dim
        packed = self.kdim == embed_dim and self.vdim == embed_dim
        self.in_proj_weight = parameter(3 * embed_dim, embed_dim) if packed else None
        self.q_proj_weight = None if packed else parameter(embed_dim, embed_dim)
        self.k_proj_weight = None if packed else parameter(embed_dim, self.kdim)
        self.v_proj_weight = None if packed else parameter(embed_dim, self.vdim)
        self.in_proj_bias = parameter(3 * embed_dim) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.bias_k = parameter(1, 1, embed_dim) if add_bias_kv else None
        self.bias_v = parameter(1, 1, embed_dim) if add_bias_kv else None

    def reset_parameters(self) -> None:
        """Draw the parameters afresh as PyTorch's module does, and the mechanism's if it has any."""
        self.out_proj.reset_parameters()
        self._reset_projections()
        reset_mechanism = getattr(self.mechanism, "reset_parameters", None)
        if reset_mechanism is not None:
            reset_mechanism()

    def _reset_projections(self) -> None:
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for appended in (self.bias_k, self.bias_v):
            if appended is not None:
                nn.init.xavier_normal_(appended)

    @property
    def dropout(self) -> float:
        """The mechanism's dropout probability."""
        return getattr(self.mechanism, "dropout_p", 0.0)

    def forward(
        self,
        query: Float[Tensor, "*query embed"],
        key: Float[Tensor, "*key kdim"],
        value: Float[Tensor, "*value vdim"],
        key_padding_mask: Bool[Tensor, "*padding"] | Float[Tensor, "*padding"] | None = None,
        need_weights: bool = True,
        attn_mask: Bool[Tensor, "*heads length keys"] | Float[Tensor, "*heads length keys"] | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Float[Tensor, "*query embed"], Float[Tensor, "*weights"] | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: (L, embed_dim), or batched (B, L, embed_dim) if `batch_first` else (L, B, embed_dim).
            key: likewise, with S tokens of `kdim` features.
            value: likewise, with S tokens of `vdim` features.
            key_padding_mask: (B, S), or (S,) unbatched. Bool: True = ignore this key. Float: added to its
                scores; a mechanism that takes no bias accepts 0 and -inf alone.
            need_weights: also return the weights.
            attn_mask: (L, S) or (B * num_heads, L, S). Bool: True = may not attend. Float: added to scores.
            average_attn_weights: average the returned weights over the heads.
            is_causal: a hint, trusted as PyTorch trusts it, that `attn_mask` is the causal one. A causal
                mechanism then does without the mask.
        Returns:
            The output, shaped like `query`, and the weights: None unless `need_weights`, else (B, L, S) if
            averaged, (B, num_heads, L, S) if not, without B when unbatched.
        Raises:
            RuntimeError: if `is_causal` comes without `attn_mask`, as in PyTorch.
            ValueError: if shapes disagree, or the mechanism cannot honour a mask or `need_weights`.
            TypeError: if a mask is neither bool nor floating point.
        """
        query_is_key, key_is_value = query is key, key is value
        batched = self._check_inputs(query, key, value)
        query, key, value = (self._batch_first(x, batched) for x in (query, key, value))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        self._check_masks(query, key, key_padding_mask, attn_mask)
        self._check_mechanism_can(need_weights, attn_mask, is_causal, square=query.shape[1] == key.shape[1])
        if self.was_self_attention:
            self._check_still_fits(attn_mask, same_length=query.shape[1] == key.shape[1])

        if is_causal and self.mechanism.is_causal:
            attn_mask = None
        key_mask, attn_bias = self._lower_masks(key_padding_mask, attn_mask)
        if key_mask is not None:
            key = _contain_padding(key, key_mask)
            value = key if key_is_value else _contain_padding(value, key_mask)
            query = key if query_is_key else query

        q, k, v = self._project(query, key, value, packed=query_is_key and key_is_value)
        k, v, key_mask, attn_bias = self._append(k, v, key_mask, attn_bias)
        q, k, v = (rearrange(x, "b s (h e) -> b h s e", h=self.num_heads) for x in (q, k, v))
        heads = self.mechanism(q, k, v, key_mask=key_mask, attn_bias=attn_bias)
        out = self.out_proj(rearrange(heads, "b h l e -> b l (h e)"))
        out = self._batch_first(out, batched) if batched else out.squeeze(0)
        if not need_weights:
            return out, None

        weights = self.mechanism.matrix(q, k, key_mask=key_mask, attn_bias=attn_bias).to(q.dtype)
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, *, packed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif packed:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = map(F.linear, (query, key, value), weights, biases)  # type: ignore[arg-type]
        return q, k, v

    def _append(
        self, k: Tensor, v: Tensor, key_mask: Tensor | None, attn_bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        batch = k.shape[0]
        extra_keys, extra_values = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            extra_keys.append(self.bias_k.to(k.dtype).expand(batch, -1, -1))
            extra_values.append(self.bias_v.to(v.dtype).expand(batch, -1, -1))
        if self.add_zero_attn:
            extra_keys.append(k.new_zeros(batch, 1, k.shape[-1]))
            extra_values.append(v.new_zeros(batch, 1, v.shape[-1]))
        appended = len(extra_keys) - 1
        if not appended:
            return k, v, key_mask, attn_bias
        if key_mask is not None:
            key_mask = F.pad(key_mask, (0, appended), value=True)
        if attn_bias is not None:
            attn_bias = F.pad(attn_bias, (0, appended), value=attn_bias.dtype == torch.bool)
        return torch.cat(extra_keys, dim=1), torch.cat(extra_values, dim=1), key_mask, attn_bias

    def _lower_masks(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """PyTorch's two masks as this library's: a bool `key_mask`, True = may attend, and an `attn_bias`."""
        attn_bias = attn_mask
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_bias = ~attn_mask
        if attn_bias is not None and attn_bias.dim() == 3:
            attn_bias = rearrange(attn_bias, "(b h) l s -> b h l s", h=self.num_heads)
        if key_padding_mask is None:
            return None, attn_bias
        if key_padding_mask.dtype == torch.bool:
            return ~key_padding_mask, attn_bias

        # nn.TransformerEncoder turns every bool mask into 0 and -inf before it calls us.
        key_mask = key_padding_mask != -torch.inf
        key_bias = torch.where(key_mask, key_padding_mask, 0)
        if not self.mechanism.supports_bias:
            _check_zero(key_bias, self.mechanism)
            return key_mask, attn_bias
        return key_mask, _add_bias(attn_bias, rearrange(key_bias, "b s -> b 1 1 s"))

    def _check_still_fits(self, attn_mask: Tensor | None, same_length: bool) -> None:
        """Raise where a mechanism that was swapped in would compute something else than what it replaced."""
        mask = getattr(self.mechanism, "mask", None)
        if not same_length and (self.mechanism.is_causal or mask not in (None, Everything())):
            raise ValueError(
                f"{_name(self.mechanism)} was swapped in for self-attention, and is given keys of another sequence: "
                "its pattern has no meaning there"
            )
        if self.mechanism.is_causal and attn_mask is None:
            raise ValueError(
                f"{_name(self.mechanism)} is causal, and was swapped in where causality comes as attn_mask: none came"
            )

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the inputs are batched."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "query, key and value must be dense, got a nested tensor; an nn.TransformerEncoder built "
                "around another attention makes them: set its use_nested_tensor to False"
            )
        if query.dim() not in (2, 3):
            raise ValueError(f"query must have 2 (unbatched) or 3 dimensions, got shape {tuple(query.shape)}")
        sizes = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (x, features) in sizes.items():
            if x.dim() != query.dim() or x.shape[-1] != features:
                raise ValueError(
                    f"{name} must have {query.dim()} dimensions, as query has, the last of size {features}; "
                    f"got shape {tuple(x.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value must have as many tokens as key, whose shape is {tuple(key.shape)}; "
                f"got shape {tuple(value.shape)}"
            )
        return query.dim() == 3

    def _check_masks(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        batch, length, keys = query.shape[0], query.shape[1], key.shape[1]
        if key.shape[0] != batch:
            raise ValueError(f"key must have the batch size of query, {batch}, got {key.shape[0]}")
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, [(batch, keys)])
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, [(length, keys), (batch * self.num_heads, length, keys)])

    def _check_mechanism_can(
        self, need_weights: bool, attn_mask: Tensor | None, is_causal: bool, *, square: bool
    ) -> None:
        mechanism, name = self.mechanism, _name(self.mechanism)
        if need_weights and not (self.dense_weights or isinstance(mechanism, FullAttention)):
            raise ValueError(
                f"need_weights=True makes {name} build its matrix, which it exists to avoid: "
                "pass need_weights=False, or construct with dense_weights=True"
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask and needs one, as in PyTorch")
        if is_causal and mechanism.is_causal:
            if not square:
                raise ValueError(
                    "is_causal=True needs as many queries as keys: PyTorch counts both from the first, "
                    f"{name} counts queries back from the last key"
                )
        elif attn_mask is not None and not mechanism.supports_bias:
            argument = "is_causal=True" if is_causal else "attn_mask"
            advice = "build it with is_causal=True"
            if mechanism.is_causal:
                advice = "if the mask is the causal one, pass is_causal=True as well"
            raise ValueError(f"{argument} cannot be honoured by {name}, which takes no bias; {advice}")


def _check_can_append(argument: str, mechanism: Mechanism) -> None:
    if not isinstance(mechanism, FullAttention):
        raise ValueError(f"{argument}=True needs full attention, got {_name(mechanism)}")
    if mechanism.is_causal:
        raise ValueError(f"{argument}=True needs is_causal=False: what it appends comes after every query")


def _check_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool (True = may not attend) or floating point, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        allowed = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name} must have shape {allowed}, got {tuple(mask.shape)}")


def _check_zero(key_bias: Tensor, mechanism: Mechanism) -> None:
    name = _name(mechanism)
    message = f"key_padding_mask must be bool, or 0 and -inf alone, for {name}, which takes no bias"
    zero = (key_bias == 0).all()
    # Reading the answer on the host would make an accelerator wait, and is impossible while compiling.
    if torch.compiler.is_compiling() or key_bias.device.type != "cpu":
        torch._assert_async(zero, message)  # type: ignore[reportPrivateImportUsage]
    elif not zero:
        raise ValueError(message)


def _contain_padding(tokens: Tensor, key_mask: Tensor) -> Tensor:
    """`tokens` with NaN and Inf removed from padding: a weight's gradient multiplies them by 0, which is NaN.

    Finite padding stays: the mechanism does not read it, and in self-attention it is a query as well, whose
    output PyTorch computes.
    """
    finite = torch.nan_to_num(tokens, nan=0.0, posinf=0.0, neginf=0.0)
    return torch.where(key_mask[..., None], tokens, finite)


def _add_bias(attn_bias: Tensor | None, key_bias: Tensor) -> Tensor:
    if attn_bias is None:
        return key_bias
    if attn_bias.dtype == torch.bool:
        return torch.where(attn_bias, key_bias, -torch.inf)
    return attn_bias + key_bias


def _name(mechanism: object) -> str:
    return type(mechanism).__name__
