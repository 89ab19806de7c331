"""Mutants of the drop-in `MultiheadAttention`."""

from __future__ import annotations

from .mutant import Mutant, Subject

FILE = "integrations/torch_mha.py"


def mutant(before: str, after: str, why: str, survives: str = "") -> Mutant:
    return Mutant(FILE, before, after, why, survives)


MASKS = (
    mutant(
        "attn_bias = ~attn_mask", "attn_bias = attn_mask", "a bool attn_mask keeps PyTorch's polarity inside"
    ),
    mutant(
        "return ~key_padding_mask, attn_bias",
        "return key_padding_mask, attn_bias",
        "key_padding_mask keeps PyTorch's polarity inside",
    ),
    mutant('"(b h) l s -> b h l s"', '"(h b) l s -> b h l s"', "a mask for each head goes to another row's"),
    mutant(
        "key_bias = torch.where(key_mask, key_padding_mask, 0)",
        "key_bias = torch.where(key_mask, 0 * key_padding_mask, 0)",
        "finite values of a float padding mask are dropped",
    ),
    mutant(
        "            _check_zero(key_bias, self.mechanism)\n",
        "",
        "a float padding mask is dropped where no bias is taken",
    ),
    mutant(
        "return torch.where(attn_bias, key_bias, -torch.inf)",
        "return attn_bias + key_bias",
        "a bool mask is added as 0 and 1",
    ),
    mutant("return attn_bias + key_bias", "return attn_bias", "of two float masks the second is dropped"),
    mutant(
        "key_mask = F.pad(key_mask, (0, appended), value=True)",
        "key_mask = F.pad(key_mask, (0, appended), value=False)",
        "the appended key and value are padding",
    ),
    mutant(
        "attn_bias = F.pad(attn_bias, (0, appended), value=attn_bias.dtype == torch.bool)",
        "attn_bias = F.pad(attn_bias, (0, appended))",
        "a bool mask hides the appended key and value",
    ),
    mutant(
        "            key = _contain_padding(key, key_mask)\n            value",
        "            value",
        "NaN in padded keys reaches the gradient of a weight",
    ),
    mutant(
        "            query = key if query_is_key else query\n",
        "",
        "NaN in padded queries of self-attention reaches the gradient of a weight",
    ),
    mutant(
        "return torch.where(key_mask[..., None], tokens, finite)",
        "return torch.where(key_mask[..., None], tokens, 0)",
        "finite padding is zeroed, though as a query it has an output",
    ),
    mutant(
        "        if is_causal and self.mechanism.is_causal:\n            attn_mask = None\n",
        "        if is_causal:\n            attn_mask = None\n",
        "the causal hint drops the mask of a mechanism that is not causal",
    ),
    mutant(
        "heads = self.mechanism(q, k, v, key_mask=key_mask, attn_bias=attn_bias)",
        "heads = self.mechanism(q, k, v, attn_bias=attn_bias)",
        "padding is attended to",
    ),
)

PARAMETERS = (
    mutant(
        "self._qkv_same_embed_dim = False",
        "self._qkv_same_embed_dim = True",
        "PyTorch's fast path bypasses the mechanism",
    ),
    mutant(
        "packed = self.kdim == embed_dim and self.vdim == embed_dim",
        "packed = self.kdim == embed_dim or self.vdim == embed_dim",
        "weights are packed where keys and values differ in width",
    ),
    mutant(
        "mechanism = FullAttention(dropout_p=dropout)",
        "mechanism = FullAttention()",
        "dropout is accepted and dropped",
    ),
    mutant(
        "            weights = self.in_proj_weight.chunk(3)\n",
        "            q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)\n"
        "            weights = (q_weight, v_weight, k_weight)\n",
        "the packed weights are taken in the order q, v, k",
    ),
    mutant(
        "biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)",
        "biases = (None, None, None)",
        "the bias of the projections is ignored unless all inputs are one",
    ),
    mutant(
        "nn.init.xavier_normal_(appended)",
        "nn.init.zeros_(appended)",
        "the appended key and value start at zero",
    ),
    mutant(
        "        for bias in (self.in_proj_bias, self.out_proj.bias):\n",
        "        for bias in (self.in_proj_bias,):\n",
        "the output bias does not start at zero",
    ),
    mutant(
        "            extra_keys.append(k.new_zeros(batch, 1, k.shape[-1]))\n",
        "            extra_keys.insert(1, k.new_zeros(batch, 1, k.shape[-1]))\n",
        "the zero key comes before the learnt one, its value after",
    ),
)

RESULTS = (
    mutant(
        "return x if self.batch_first else x.transpose(0, 1)",
        "return x.transpose(0, 1)",
        "batch_first is ignored",
    ),
    mutant(
        "out = self._batch_first(out, batched) if batched else out.squeeze(0)",
        "out = out if batched else out.squeeze(0)",
        "the output is batch first whatever the input was",
    ),
    mutant(
        "weights = weights.mean(dim=1) if average_attn_weights else weights",
        "weights = weights.mean(dim=1)",
        "weights are always averaged",
    ),
    mutant(
        "weights = weights.mean(dim=1) if average_attn_weights else weights",
        "weights = weights.sum(dim=1) if average_attn_weights else weights",
        "weights are summed over the heads",
    ),
    mutant(
        "self.mechanism.matrix(q, k, key_mask=key_mask, attn_bias=attn_bias).to(q.dtype)",
        "self.mechanism.matrix(q, k, key_mask=key_mask).to(q.dtype)",
        "the weights returned ignore attn_mask",
    ),
    mutant(
        "need_weights and not (self.dense_weights or isinstance(mechanism, FullAttention))",
        "need_weights and not isinstance(mechanism, FullAttention)",
        "dense_weights is ignored",
    ),
    mutant(
        "            if not square:\n",
        "            if False:\n",
        "the causal hint is taken though queries and keys are aligned otherwise",
    ),
    mutant(
        'rearrange(heads, "b h l e -> b l (h e)")',
        'rearrange(heads, "b h l e -> b l (e h)")',
        "heads are interleaved",
    ),
)

SUBJECT = Subject(
    "torch_mha",
    MASKS + PARAMETERS + RESULTS,
    tests=("tests/integrations/test_torch_mha.py", "tests/test_errors.py"),
)
