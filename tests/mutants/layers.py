"""Mutants of the `Attention` layer."""

from __future__ import annotations

from .mutant import Mutant, Subject

FILE = "layers.py"


def mutant(before: str, after: str, why: str, survives: str = "") -> Mutant:
    return Mutant(FILE, before, after, why, survives)


HEADS = (
    mutant(
        'rearrange(self.q_proj(x), "b l (h e) -> b h l e", h=self.num_heads)',
        'rearrange(self.q_proj(x), "b l (e h) -> b h l e", h=self.num_heads)',
        "features of a head lie apart",
    ),
    mutant("rearrange(self.v_proj(tokens),", "rearrange(self.k_proj(tokens),", "values are projected by W_k"),
    mutant(
        "rearrange(self.k_proj(tokens),",
        "rearrange(self.k_proj(x if x.shape == tokens.shape else tokens),",
        "keys of a context as long as the queries come from the queries",
    ),
    mutant(
        'rearrange(heads, "b h l e -> b l (h e)")',
        'rearrange(heads, "b h l e -> b l (e h)")',
        "heads are interleaved",
    ),
    mutant(
        "self.k_proj = linear(embed_dim, self.num_kv_heads * self.head_dim)",
        "self.k_proj = nn.Linear(embed_dim, self.num_kv_heads * self.head_dim, device=device, dtype=dtype)",
        "keys have a bias that was not asked for",
    ),
    mutant(
        "nn.init.zeros_(projection.bias)",
        "nn.init.normal_(projection.bias)",
        "biases do not start at zero",
    ),
    mutant(
        "nn.init.xavier_uniform_(projection.weight)",
        "nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)",
        "weights start too small",
    ),
    mutant(
        "            reset_mechanism()\n",
        "            pass\n",
        "reset_parameters leaves the mechanism's as they are",
    ),
    mutant(
        "        self._reset_projections()\n\n    def reset_parameters",
        "        self.reset_parameters()\n\n    def reset_parameters",
        "construction draws the mechanism's parameters again",
    ),
)

MASKS = (
    mutant(
        "        tokens = _zero_padding(tokens, key_mask, segment_ids)\n",
        "",
        "NaN in padding reaches the gradient of a weight",
    ),
    mutant(
        "        x = _zero_padding(x, key_mask, None)\n",
        "",
        "NaN in the padding of a step reaches the gradient of a weight",
    ),
    mutant(
        "tokens = torch.where((segment_ids >= 0)[..., None], tokens, 0)",
        "tokens = torch.where((segment_ids > 0)[..., None], tokens, 0)",
        "the first document is taken for padding",
    ),
    mutant(
        "out = self.mechanism(q, k, v, key_mask=key_mask, segment_ids=segment_ids)",
        "out = self.mechanism(q, k, v, key_mask=key_mask)",
        "documents see each other",
    ),
    mutant(
        "out = self.mechanism(q, k, v, key_mask=key_mask, segment_ids=segment_ids)",
        "out = self.mechanism(q, k, v, segment_ids=segment_ids)",
        "padding is zeroed but still attended to",
    ),
    mutant(
        "self.mechanism.step(q, k, v, state.mechanism, key_mask=key_mask)",
        "self.mechanism.step(q, k, v, state.mechanism)",
        "padding of a step is attended to",
    ),
    mutant(
        "self._heads(tokens if context is None else x, tokens, position=0)",
        "self._heads(x, tokens, position=0)",
        "padded queries keep their NaN",
    ),
    mutant(
        '        if self.mechanism.is_causal:\n            raise ValueError(\n                f"context cannot',
        '        if self.mechanism.is_causal is None:\n            raise ValueError(\n                f"context cannot',
        "a causal mechanism takes a context",
    ),
)

STEPS = (
    mutant(
        "positions = torch.arange(position, position + x.shape[1], device=x.device)",
        "positions = torch.arange(x.shape[1], device=x.device)",
        "every step starts at position 0",
    ),
    mutant(
        "            q, k = q.to(v.dtype), k.to(v.dtype)\n",
        "",
        "a rotation in fp32 meets values of autocast",
    ),
    mutant(
        "q, k = self.rotary(q, k, positions)",
        "q, _ = self.rotary(q, k, positions)",
        "only queries are rotated",
    ),
    mutant(
        "LayerState(inner, state.position + x.shape[1])",
        "LayerState(inner, state.position + 1)",
        "a chunk moves the position by one",
    ),
    mutant(
        "return LayerState(self.mechanism.clone(), self.position)",
        "return LayerState(self.mechanism.clone())",
        "a clone starts at position 0",
    ),
    mutant(
        "return LayerState(self.mechanism.clone(), self.position)",
        "return LayerState(self.mechanism, self.position)",
        "a clone is stepped with its original",
    ),
    mutant(
        "return LayerState(self.mechanism.reorder(indices), self.position)",
        "return LayerState(self.mechanism.reorder(indices.flip(0)), self.position)",
        "beams are reordered backwards",
    ),
    mutant(
        "dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype",
        "dtype = weight.dtype",
        "the state ignores autocast",
    ),
    mutant(
        "batch_size, self.num_kv_heads, self.head_dim, dtype=dtype",
        "batch_size, self.num_heads, self.head_dim, dtype=dtype",
        "the state has a slot for each query head",
    ),
)

COSTS = (
    mutant(
        '            1 if phase == "decode" else seq_len,\n',
        "            seq_len,\n",
        "a decoded token costs a whole sequence",
    ),
    mutant(
        'new_keys = 1 if phase == "decode" else keys',
        "new_keys = keys",
        "decoding projects every key again",
    ),
    mutant(
        "(queries, keys, keys, queries), strict=True",
        "(queries, queries, queries, queries), strict=True",
        "the context costs as much as the queries",
    ),
    mutant(
        "tokens = (queries + keys if cross else queries) * self.embed_dim * item",
        "tokens = queries * self.embed_dim * item",
        "the context is not kept for the backward pass",
    ),
    mutant(
        "saved = inner.saved_bytes + merged + tokens if training else 0",
        "saved = inner.saved_bytes + tokens if training else 0",
        "the merged heads are not kept for the backward pass",
    ),
    mutant(
        "peak = qkv + max(inner.peak_bytes, kept + heads + merged + out)",
        "peak = max(inner.peak_bytes, kept + heads + merged + out)",
        "q, k and v take no memory",
    ),
)

SUBJECT = Subject(
    "layers",
    HEADS + MASKS + STEPS + COSTS,
    tests=("tests/test_layers.py", "tests/test_layer_parameters.py", "tests/test_errors.py"),
)
