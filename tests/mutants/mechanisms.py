"""Mutants of the mechanisms: what each makes of its arguments, and what they all do the same way."""

from __future__ import annotations

from .mutant import Mutant, Subject

BASE = "mechanisms/base.py"
WINDOW, LONGFORMER = "mechanisms/sliding_window.py", "mechanisms/longformer.py"
BIGBIRD, SPARSE = "mechanisms/bigbird.py", "mechanisms/sparse_transformer.py"
FULL, FLASH, LINFORMER = "mechanisms/full.py", "mechanisms/flash.py", "mechanisms/linformer.py"
PERFORMER, LINEAR = "mechanisms/performer.py", "mechanisms/linear.py"

ALL = (
    "full", "flash", "sliding_window", "longformer", "bigbird", "sparse_transformer", "linformer",
    "performer", "linear",
)  # fmt: skip

COMMON = (
    Mutant(
        BASE,
        "            inputs.check_key_mask(key_mask, batch, num_keys, k.device)\n"
        "            k, v = zero_where_masked(key_mask, k, v)",
        "            inputs.check_key_mask(key_mask, batch, num_keys, k.device)\n"
        "            (k,) = zero_where_masked(key_mask, k)",
        "masked values are not zeroed: 0 * NaN is NaN",
    ),
    Mutant(
        BASE,
        "            inputs.check_key_mask(key_mask, batch, num_keys, k.device)\n"
        "            k, v = zero_where_masked(key_mask, k, v)",
        "            inputs.check_key_mask(key_mask, batch, num_keys, k.device)\n"
        "            (v,) = zero_where_masked(key_mask, v)",
        "fla#1263, performer-pytorch: padding masks v, not k",
    ),
    Mutant(
        BASE,
        "            inputs.check_key_mask(key_mask, k.shape[0], k.shape[2], k.device)\n"
        "            k, v = zero_where_masked(key_mask, k, v)",
        "            inputs.check_key_mask(key_mask, k.shape[0], k.shape[2], k.device)",
        "NaN in the padding of a step stays in the state",
    ),
    Mutant(
        BASE,
        "            k, v = zero_where_masked(segment_ids >= 0, k, v)\n",
        "",
        "NaN in a padding segment is read",
    ),
    Mutant(
        BASE,
        "zero_where_masked(segment_ids >= 0, k, v)",
        "zero_where_masked(segment_ids > 0, k, v)",
        "segment 0 is taken for padding",
    ),
    Mutant(
        BASE,
        "            segment_ids = segment_ids.to(torch.int64)\n",
        "",
        "unsigned segments have no -1 for queries outside",
    ),
    Mutant(
        BASE,
        "torch.where(key_mask[:, None, :, None], x, 0.0)",
        "x * key_mask[:, None, :, None]",
        "padding is multiplied away: NaN stays",
    ),
    Mutant(
        BASE,
        '"scale": q.shape[3] ** -0.5 if self.scale is None else self.scale,',
        '"scale": q.shape[3] ** -0.5,',
        "the scale that was asked for is ignored",
    ),
    Mutant(
        BASE,
        '"scale": q.shape[3] ** -0.5 if self.scale is None else self.scale,',
        '"scale": q.shape[3] ** -1.0 if self.scale is None else self.scale,',
        "the scale is 1 / E",
    ),
    Mutant(
        BASE,
        '"scale": q.shape[3] ** -0.5 if self.scale is None else self.scale,',
        '"scale": (v.shape[3] if v is not None else 1) ** -0.5 if self.scale is None else self.scale,',
        "the scale is that of the values",
    ),
    Mutant(
        BASE,
        '            "segment_ids": segment_ids,\n',
        "",
        "segment_ids is checked, then dropped (transformers#45811)",
    ),
    Mutant(
        BASE,
        '            "key_mask": key_mask,\n',
        "",
        "key_mask is checked, then dropped (lucidrains/linformer)",
    ),
    Mutant(
        BASE,
        "        if q.shape[2] == 0:\n            return q.new_zeros(*q.shape[:3], v.shape[3]), state\n",
        "",
        "a step without tokens is taken like any other",
    ),
    Mutant(
        BASE,
        "list(have.shape) != shape or have.dtype != want.dtype or",
        "list(have.shape) != shape or",
        "a state of another dtype is taken",
    ),
    Mutant(
        BASE,
        "            self._refuse(\n"
        '                "segment_ids", self.supports_segments, "its pattern or projection counts from the start"\n'
        "            )\n",
        "",
        "anchored patterns take segments that they cannot honour",
    ),
    Mutant(
        BASE,
        '            self._refuse("attn_bias", self.supports_bias, "only FullAttention adds a bias")\n',
        "",
        "a bias is accepted and dropped",
    ),
    Mutant(
        BASE,
        "        if not self.is_causal:\n            raise ValueError(",
        "        if self.is_causal is None:\n            raise ValueError(",
        "mechanisms that are not causal decode",
    ),
)

PATTERNED = (
    Mutant(
        WINDOW,
        "mask = mask | Sinks(num_sinks)",
        "mask = mask & Sinks(num_sinks)",
        "the window sees sinks alone",
    ),
    Mutant(
        WINDOW,
        "retained=(window_size, num_sinks),",
        "retained=(window_size - 1 or 1, num_sinks),",
        "the decode state is a slot short",
    ),
    Mutant(
        WINDOW,
        "retained=(window_size, num_sinks),",
        "retained=(window_size, 0),",
        "the decode state holds no sinks",
    ),
    Mutant(
        WINDOW,
        "            max(seq_len, 1),\n",
        "            max(seq_len // 2, 1),\n",
        "the exact limit is half the sequence",
    ),
    Mutant(
        WINDOW,
        "            dropout_p=dropout_p,\n",
        "",
        "dropout is accepted and dropped",
    ),
    Mutant(
        LONGFORMER,
        "retained=(window_size, global_tokens) if prefix else None,",
        "retained=(window_size, global_tokens if prefix else len(global_tokens)),",
        "global tokens in the middle are remembered as if they came first",
    ),
    Mutant(
        LONGFORMER,
        'self.complexity = replace(self.complexity, state="L*E")',
        "pass",
        "a state that grows is declared constant",
    ),
    Mutant(
        LONGFORMER,
        'Window(check_positive("window_size", window_size)) | _global_mask(global_tokens)',
        'Window(check_positive("window_size", window_size) + 1) | _global_mask(global_tokens)',
        "a window one key too wide on each side",
    ),
    Mutant(
        LONGFORMER,
        "            is_causal=self.is_causal,\n",
        "            is_causal=False,\n",
        "the exact limit of a causal mechanism sees the future",
    ),
    Mutant(
        BIGBIRD,
        "GlobalTokens.first(num_global_blocks * block_size)",
        "GlobalTokens.first(num_global_blocks)",
        "global blocks are taken for global tokens",
    ),
    Mutant(
        BIGBIRD,
        "        if num_global_blocks:\n            mask = mask | GlobalTokens",
        "        if num_global_blocks > 1:\n            mask = mask | GlobalTokens",
        "a single global block is forgotten",
    ),
    Mutant(
        BIGBIRD,
        'block_size, num_random_blocks, seed, check_flag("is_causal", is_causal)\n',
        "block_size, num_random_blocks, seed, False\n",
        "causal draws look at the whole sequence",
    ),
    Mutant(
        BIGBIRD,
        'block_size, num_random_blocks, seed, check_flag("is_causal", is_causal)\n',
        'block_size, num_random_blocks, 0, check_flag("is_causal", is_causal)\n',
        "the seed is ignored",
    ),
    Mutant(
        BIGBIRD,
        '"num_window_blocks": 2 * blocks + 1}',
        '"num_window_blocks": 2 * (blocks // 2) + 1}',
        "at its exact limit the window is half the sequence",
    ),
    Mutant(
        BIGBIRD,
        "mask: Mask = BlockWindow(block_size, num_window_blocks)",
        "mask: Mask = BlockWindow(num_window_blocks, block_size | 1)",
        "block size and number of blocks are exchanged",
    ),
    Mutant(SPARSE, "else Fixed(stride, summary)", "else Fixed(stride, 1)", "summary is ignored"),
    Mutant(
        SPARSE,
        'Strided(stride) if pattern == "strided" else',
        'Strided(stride) if pattern == "fixed" else',
        "the two patterns are exchanged",
    ),
    Mutant(
        SPARSE,
        "stride = max(seq_len, self.stride)",
        "stride = self.stride",
        "the exact limit keeps its stride",
    ),
    Mutant(
        FULL,
        "return type(self)(is_causal=self.is_causal, scale=self.scale, backend=self.backend)",
        "return type(self)(is_causal=self.is_causal, backend=self.backend)",
        "the exact limit forgets the scale",
    ),
    Mutant(
        FULL,
        "is_causal=is_causal, scale=scale, dropout_p=dropout_p, backend=backend)",
        "is_causal=is_causal, dropout_p=dropout_p, backend=backend)",
        "the constructor drops the scale",
    ),
    Mutant(
        FULL,
        "largest_input = 1000.0",
        "largest_input = 65504.0",
        "logits of 1e9 are declared safe for the fused kernel",
    ),
    Mutant(
        FLASH,
        "is_causal=is_causal, scale=scale, dropout_p=dropout_p, backend=backend)",
        "is_causal=is_causal, scale=scale, dropout_p=dropout_p)",
        "the constructor drops the backend",
    ),
    Mutant(
        "mechanisms/base.py",
        "for backend in self.backends if backend.portable)",
        "for backend in self.backends)",
        "the cost of a kernel that cannot run here is declared",
    ),
)

LEARNT = (
    Mutant(
        LINFORMER,
        "std=self.rank**-0.5)",
        "std=1.0)",
        "projections start with variance 1: scores grow with the rank",
    ),
    Mutant(
        LINFORMER,
        "value_projection=self.key_projection if self.value_projection is None else self.value_projection,",
        "value_projection=self.key_projection,",
        "F is E, whatever the sharing",
    ),
    Mutant(
        LINFORMER,
        'self.value_projection = None if sharing == "key-value" else',
        'self.value_projection = None if sharing != "none" else',
        "sharing between heads shares between keys and values too",
    ),
    Mutant(
        LINFORMER,
        'self.num_kv_heads = kv_heads if sharing == "none" else None',
        "self.num_kv_heads = None",
        "projections for each head take any number of heads",
    ),
    Mutant(
        LINFORMER,
        "dropout_p=self.dropout_p or 0.0 if self.training else 0.0,",
        "dropout_p=self.dropout_p or 0.0,",
        "dropout acts in evaluation",
    ),
    Mutant(
        LINFORMER,
        "self.max_seq_len is not None and num_keys > self.max_seq_len",
        "self.max_seq_len is not None and num_keys >= self.max_seq_len",
        "linformer-pytorch: the longest sequence is refused",
    ),
    Mutant(
        LINFORMER,
        "        if is_causal:\n            raise ValueError(",
        "        if is_causal is None:\n            raise ValueError(",
        "linformer-pytorch: causal=True is accepted and leaks",
    ),
    Mutant(
        LINFORMER,
        "    supports_segments = False\n",
        "",
        "packed documents are accepted and mixed",
    ),
    Mutant(
        LINFORMER,
        "compressed_cost(self.rank, self.num_kv_heads or 1, num_params,",
        "compressed_cost(self.max_seq_len, self.num_kv_heads or 1, num_params,",
        "the cost is that of no compression",
    ),
    Mutant(
        PERFORMER,
        "features = 4 * check_positive",
        "features = check_positive",
        "the default is a quarter of the promised features",
    ),
    Mutant(
        PERFORMER,
        "Favor(head_dim, features, seed=seed, kernel=kernel)",
        "Favor(head_dim, features, kernel=kernel)",
        "the constructor drops the seed",
    ),
    Mutant(
        PERFORMER,
        "Favor(head_dim, features, seed=seed, kernel=kernel)",
        "Favor(head_dim, features, seed=seed)",
        "the constructor drops the kernel",
    ),
    Mutant(
        PERFORMER,
        "        self.feature_map.reset_parameters()\n",
        "        pass\n",
        "after to_empty the projection stays empty",
    ),
    Mutant(
        PERFORMER,
        'decode_time="m*E", state="m*E", path="1",',
        'decode_time="m*E", state="L*m*E", path="1",',
        "a state of fixed size is declared to grow",
    ),
    Mutant(
        LINEAR,
        "super().__init__(feature_map, is_causal=is_causal, scale=scale, backend=backend)",
        "super().__init__(feature_map, is_causal=is_causal, backend=backend)",
        "the constructor drops the scale",
    ),
    Mutant(
        LINEAR,
        'time="L*E**2",',
        'time="L**2*E",',
        "linear attention is declared quadratic",
    ),
)

SUBJECT = Subject(
    "mechanisms",
    COMMON + PATTERNED + LEARNT,
    tests=("tests/test_arguments.py", "tests/test_errors.py"),
    mechanisms=ALL,
    others=(
        "tests/test_properties.py",
        "tests/test_regressions.py",
        "tests/test_layers.py",
    ),
)
