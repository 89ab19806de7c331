"""Mutants of what every operator starts from: checks, lowered masks, the dense reference, compression."""

from __future__ import annotations

from .mechanisms import ALL
from .mutant import Mutant, Subject

INPUTS, BACKENDS = "inputs.py", "backends.py"
PROBLEM, DENSE, COMPRESS = "ops/problem.py", "ops/dense.py", "ops/compress.py"

CHECKS = (
    Mutant(
        INPUTS,
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return dtype",
        "sums are kept in the dtype of the inputs",
    ),
    Mutant(
        INPUTS,
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return torch.float32",
        "fp64 inputs are summed in fp32",
    ),
    Mutant(
        INPUTS,
        "    return torch.autocast(device.type, enabled=False)",
        "    return nullcontext()",
        "autocast rounds the sums that are kept in fp32",
    ),
    Mutant(
        INPUTS,
        "        return num_keys - q_len\n",
        "        return 0\n",
        "pytorch#108108: queries are aligned with the first keys",
    ),
    Mutant(
        INPUTS,
        "        return num_keys - q_len\n",
        "        return num_keys - q_len - 1\n",
        "the last query stands before the last key",
    ),
    Mutant(INPUTS, "if not 0 <= value < 1:", "if not 0 <= value <= 1:", "all weights may be dropped"),
    Mutant(
        INPUTS,
        'if not 0 < value < float("inf"):',
        'if not 0 <= value < float("inf"):',
        "a scale of 0 is taken",
    ),
    Mutant(
        INPUTS,
        "if q.shape[1] % k.shape[1] != 0:",
        "if q.shape[1] < k.shape[1]:",
        "heads that do not group are taken",
    ),
    Mutant(
        INPUTS,
        "return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)",
        "return not (dtype.is_floating_point or dtype.is_complex)",
        "a key mask passes for segment ids",
    ),
    Mutant(
        BACKENDS,
        'if backend.name != requested and (requested != "auto" or backend.by_name_only):',
        'if requested != "auto" and backend.by_name_only:',
        "an explicit backend that cannot run falls back to another",
    ),
    Mutant(
        BACKENDS,
        "        if not reasons:\n            return backend\n",
        "        return backend\n",
        "the first backend runs whatever it refuses",
    ),
    Mutant(
        BACKENDS,
        "        elif chosen is None:\n",
        '        elif chosen is None or requested == "auto":\n',
        "explain names the last backend that could run",
    ),
)

LOWERING = (
    Mutant(
        PROBLEM,
        "stop = torch.where(key_mask, position + 1, 0).amax(1)",
        "stop = torch.where(key_mask, position, 0).amax(1)",
        "a row ends before its last key",
    ),
    Mutant(
        PROBLEM,
        "stop = torch.where(key_mask, position + 1, 0).amax(1)",
        "stop = key_mask.sum(1)",
        "the length of a row is its number of valid keys, holes left out",
    ),
    Mutant(
        PROBLEM,
        "first = torch.where(key_mask, position, key_mask.shape[1]).amin(1)",
        "first = (~key_mask).sum(1)",
        "all padding is thought to be on the left",
    ),
    Mutant(
        PROBLEM,
        "position = torch.arange(q_len, device=segment_ids.device) + q_offset",
        "position = torch.arange(q_len, device=segment_ids.device)",
        "the segments of queries ignore the offset",
    ),
    Mutant(
        PROBLEM,
        "inside = (position >= 0) & (position < segment_ids.shape[1])",
        "inside = position >= 0",
        "queries behind the last key belong to its segment",
    ),
    Mutant(
        PROBLEM,
        "q_pos, k_pos = q_pos - start, k_pos - start",
        "k_pos = k_pos - start",
        "keys count from the anchor, queries from the start",
    ),
    Mutant(
        PROBLEM,
        "allowed = mask.sized(stop - start).allows(q_pos, k_pos)[:, None]",
        "allowed = mask.sized(num_keys).allows(q_pos, k_pos)[:, None]",
        "padding changes what is drawn over the sequence",
    ),
    Mutant(
        PROBLEM,
        "if p.key_mask is not None and mask.anchored:",
        "if p.key_mask is not None and p.is_causal and mask.anchored:",
        "only causal patterns count from the anchor",
    ),
    Mutant(
        PROBLEM,
        "        allowed = allowed & p.key_mask[:, None, None, :]\n",
        "        pass\n",
        "masked keys keep their weight",
    ),
    Mutant(
        PROBLEM,
        "allowed & (same & (p.segment_ids >= 0)[:, None, :])[:, None]",
        "allowed & same[:, None]",
        "padding segments attend to each other",
    ),
    Mutant(
        PROBLEM,
        "same = q_segment[:, :, None] == p.segment_ids[:, None, :]",
        "same = q_segment[:, :, None] >= p.segment_ids[:, None, :]",
        "a document sees the ones before it",
    ),
)

REFERENCE = (
    Mutant(
        DENSE,
        "torch.exp(scores - torch.where(peak == -torch.inf, 0.0, peak))",
        "torch.exp(scores)",
        "softmax without its maximum overflows",
    ),
    Mutant(
        DENSE,
        "torch.exp(scores - torch.where(peak == -torch.inf, 0.0, peak))",
        "torch.exp(scores - peak)",
        "pytorch#41508: NaN where everything is masked",
    ),
    Mutant(
        DENSE,
        "peak = scores.detach().amax(-1, keepdim=True)",
        "peak = scores.detach().amax((-2, -1), keepdim=True)",
        "one maximum for the whole matrix",
    ),
    Mutant(
        DENSE,
        "return weights / torch.where(total == 0, 1.0, total)",
        "return weights / (total + 1e-6)",
        "an epsilon in the normaliser",
    ),
    Mutant(
        DENSE,
        'folded = rearrange(x, "b (h g) n m -> b h (g n) m", h=heads) @ y',
        'folded = rearrange(x, "b (g h) n m -> b h (g n) m", h=heads) @ y',
        "head h reads key head h % Hkv",
    ),
    Mutant(
        DENSE,
        "grouped_matmul(p.q.to(dtype), p.k.to(dtype).mT) * p.scale",
        "grouped_matmul(p.q, p.k.mT).to(dtype) * p.scale",
        "scores are rounded to the dtype of the inputs",
    ),
    Mutant(
        DENSE, "allowed = allowed & p.attn_bias\n", "allowed = allowed & ~p.attn_bias\n", "a bool bias hides"
    ),
    Mutant(
        DENSE,
        "scores = scores + p.attn_bias.to(dtype)",
        "scores = scores + p.attn_bias.to(dtype) * p.scale",
        "the bias is scaled with the scores",
    ),
    Mutant(
        DENSE,
        "safe_softmax(scores.masked_fill(~allowed, -torch.inf))",
        "safe_softmax(scores.masked_fill(~allowed, torch.finfo(dtype).min))",
        "finfo.min in place of -inf: a fully masked row attends to everything",
    ),
    Mutant(
        DENSE,
        "torch.nn.functional.dropout(softmax_matrix(p), p.dropout_p)",
        "softmax_matrix(p)",
        "the reference ignores dropout",
    ),
)

COMPRESSION = (
    Mutant(
        COMPRESS,
        "index = start[:, None] + torch.arange(length, device=x.device)",
        "index = 0 * start[:, None] + torch.arange(length, device=x.device)",
        "rows of the projection count from the start of the padded row",
    ),
    Mutant(
        COMPRESS,
        "x = torch.where(inside, x.gather(2, index.expand(x.shape)), 0.0)",
        "x = x.gather(2, index.expand(x.shape))",
        "the last key is compressed once for each token of left padding",
    ),
    Mutant(
        COMPRESS,
        "inside = (index < length)[:, None, :, None]",
        "inside = (index <= length)[:, None, :, None]",
        "the last key of a left-padded row is compressed twice",
    ),
    Mutant(
        COMPRESS,
        "projection[..., :length, :].to(dtype)",
        "projection[..., -length:, :].to(dtype)",
        "short sequences use the last rows of the projection",
    ),
    Mutant(
        COMPRESS,
        "    dtype = accumulation_dtype(x.dtype)\n    projection, x",
        "    dtype = x.dtype\n    projection, x",
        "sums along the sequence in half precision",
    ),
    Mutant(
        COMPRESS,
        "v = compress(p.v, p.value_projection, start)",
        "v = compress(p.v, p.key_projection, start)",
        "values are compressed by E",
    ),
    Mutant(
        COMPRESS,
        "v = compress(p.v, p.value_projection, start)",
        "v = compress(p.v, p.value_projection, None)",
        "values ignore the anchor, keys do not",
    ),
    Mutant(
        COMPRESS,
        "attend_where(p.q.to(k.dtype), k, v, None, p.scale, p.dropout_p)",
        "attend_where(p.q.to(k.dtype), k, v, None, p.q.shape[3] ** -0.5, p.dropout_p)",
        "the scale is ignored",
    ),
    Mutant(
        COMPRESS,
        "attend_where(p.q.to(k.dtype), k, v, None, p.scale, p.dropout_p)",
        "attend_where(p.q.to(k.dtype), k, v, None, p.scale, 0.0)",
        "dropout is ignored",
    ),
    Mutant(
        COMPRESS,
        "attend_where(p.q.to(k.dtype), k, v, None, p.scale, p.dropout_p).to(p.q.dtype)",
        "attend_where(p.q, k.to(p.q.dtype), v.to(p.q.dtype), None, p.scale, p.dropout_p)",
        "what was summed in fp32 is rounded before it is attended to",
    ),
    Mutant(
        COMPRESS,
        "safe_softmax(grouped_matmul(p.q.to(dtype), k.mT) * p.scale)",
        "safe_softmax(grouped_matmul(p.q.to(dtype), k.mT))",
        "the matrix forgets the scale",
    ),
    Mutant(
        COMPRESS,
        "index = (index - start[:, None]).clamp(min=0)",
        "index = (index + start[:, None]).clamp(max=projection.shape[1] - 1)",
        "the matrix counts from the anchor in the wrong direction",
    ),
    Mutant(
        COMPRESS,
        "        rows = torch.where(p.key_mask[:, None, :, None], rows, 0.0)\n",
        "        pass\n",
        "masked keys keep a column in the matrix",
    ),
)

SUBJECT = Subject(
    "operands",
    CHECKS + LOWERING + REFERENCE + COMPRESSION,
    tests=("tests/test_errors.py",),
    mechanisms=ALL,
    others=("tests/test_regressions.py", "tests/test_properties.py", "tests/test_layers.py"),
)
