"""Mutants of blocked softmax attention: scales, log-sum-exps, merging, gradients, dropout."""

from __future__ import annotations

from .mutant import Mutant, Subject

FILE = "ops/blocked.py"


LOWERING = "ops/lowering.py"


def mutant(before: str, after: str, why: str, survives: str = "") -> Mutant:
    return Mutant(FILE, before, after, why, survives)


def of_lowering(before: str, after: str, why: str, survives: str = "") -> Mutant:
    return Mutant(LOWERING, before, after, why, survives)


FORWARD = (
    of_lowering(
        "torch.where(p.key_mask, 0 if k_segment is None else k_segment, -1)",
        "torch.where(p.key_mask, 0, -1)",
        "a key_mask replaces the segments",
    ),
    mutant(
        "batch.queries(scale * LOG2_E, dtype), batch.take_keys",
        "batch.queries(scale, dtype), batch.take_keys",
        "a softmax in base 2",
    ),
    mutant("LOG2_E = math.log2(math.e)", "LOG2_E = math.log(2)", "the change of base is its reciprocal"),
    mutant(
        ".clamp_(min=torch.finfo(dtype).min)",
        "",
        "a row without keys subtracts infinity from infinity",
    ),
    mutant("tile_out /= total.clamp(min=1)", "tile_out /= total", "a row without keys divides zero by zero"),
    mutant("(peak + total.log2())", "(peak - total.log2())", "the sign of the log-sum-exp"),
    mutant("(peak + total.log2())", "(peak + total.log())", "a log-sum-exp of two bases"),
    mutant("                part_out.zero_()\n", "", "rows without a tile keep what memory holds"),
    mutant(
        "out[group.index], lse[group.index] = part_out, part_lse",
        "out[group.index] = part_out",
        "the log-sum-exps of rows with an anchor of their own are not kept",
    ),
    mutant(
        "int(q_offset) - group.start",
        "int(q_offset)",
        "queries are counted from 0, keys from the anchor",
    ),
)

MERGE = (
    mutant(
        "    if batch.first:\n        batch.put_rows(out, tile_out)",
        "    if True:\n        batch.put_rows(out, tile_out)",
        "of the parts of a row the last one wins",
    ),
    mutant(
        "merged += old_out * (old_lse - base).exp2_()[..., None]",
        "merged += old_out",
        "what is there is not rescaled before something is added",
    ),
    mutant(
        "torch.logaddexp2(old_lse, new_lse)",
        "torch.logaddexp(old_lse, new_lse)",
        "log-sum-exps of base 2 are merged in base e",
    ),
    mutant(
        "base = joint.clamp(min=torch.finfo(joint.dtype).min)",
        "base = joint",
        "merging two parts without a key subtracts infinity from infinity",
    ),
    mutant(
        "tile.put_rows(lse, joint)",
        "tile.put_rows(lse, new_lse)",
        "the log-sum-exp of a row is that of its last part",
    ),
)

BACKWARD = (
    mutant(
        "delta = (grad.to(dtype) * out.to(dtype)).sum(-1)",
        "delta = torch.zeros_like(lse)",
        "the softmax's normaliser has no gradient",
    ),
    mutant(
        "    lse = lse.clamp(min=torch.finfo(dtype).min)\n",
        "",
        "the gradient of a row without keys is infinity minus infinity",
    ),
    mutant(
        "queries = batch.queries(scale * LOG2_E, dtype)",
        "queries = batch.queries(scale, dtype)",
        "weights are recomputed in another base",
    ),
    mutant(
        '"grad", dtype)',
        '"queries", dtype)',
        "the rows' gradient is written over the queries",
    ),
    mutant(
        'tile_values = batch.take_keys(values, "values", dtype)',
        'tile_values = batch.take_keys(values, "keys", dtype)',
        "values are written over the keys, which are still needed",
    ),
    mutant('"d_weights").view_as', '"scores").view_as', "the weights' gradient is written over the weights"),
    mutant("                dq_g.zero_()\n", "                pass\n", "gradients of rows without a tile"),
    mutant(
        "dk[group.index, :, group.start : group.stop] = dk_g",
        "dk[group.index, :, : group.stop - group.start] = dk_g",
        "gradients of keys are put where the padding is",
    ),
    mutant("dq.mul_(scale).to(q.dtype)", "dq.to(q.dtype)", "the gradient of q without the scale"),
    mutant(
        "dk.div_(LOG2_E).to(k.dtype)",
        "dk.to(k.dtype)",
        "the gradient of k keeps the change of base",
    ),
    mutant(
        "    if batch.first:\n        batch.put_rows(target, values)",
        "    if True:\n        batch.put_rows(target, values)",
        "of the gradients of a row's parts the last one wins",
    ),
    mutant(
        "tile.put_rows(target, tile.take_rows(target) + part)",
        "tile.put_rows(target, torch.maximum(tile.take_rows(target), part))",
        "gradients of a row's parts are not summed",
    ),
)

DROPOUT = (
    mutant(
        "                total = weights.sum(-1, keepdim=True)\n"
        "                if generator is not None:\n"
        "                    weights = weights * _keep(weights, generator, dropout_p)\n",
        "                if generator is not None:\n"
        "                    weights = weights * _keep(weights, generator, dropout_p)\n"
        "                total = weights.sum(-1, keepdim=True)\n",
        "rows are normalised after the dropout",
    ),
    mutant(
        "kept, d_weights = weights * keep, d_weights * keep",
        "kept = weights * keep",
        "the gradient passes what was dropped",
    ),
    mutant(
        "kept, d_weights = weights * keep, d_weights * keep",
        "d_weights = d_weights * keep",
        "dropped weights give their values a gradient",
    ),
    mutant(
        "[..., None]).mul_(weights)",
        "[..., None]).mul_(kept)",
        "the softmax's derivative at the weights that were left",
    ),
    mutant(
        "keep = _keep(weights, generator, dropout_p)",
        "keep = _keep(weights.mT, generator, dropout_p).mT",
        "the backward pass draws its dropout in another order",
    ),
    mutant("/ (1 - dropout_p)", "/ 1", "what is kept is not scaled up"),
    mutant(
        "generator=generator, dtype=torch.float32, device",
        "generator=generator, device",
        "dropout is drawn in torch's default dtype",
    ),
    Mutant(
        "ops/transforms.py",
        'if any(name == "seed" and isinstance(x, Tensor)',
        'if False and any(name == "seed" and isinstance(x, Tensor)',
        "under vmap the backward pass draws another dropout",
    ),
    mutant("(draw >= dropout_p)", "(draw < dropout_p)", "the share that is kept is the share to drop"),
    Mutant(
        "mechanisms/families.py",
        "return self.dropout_p or 0.0 if self.training else 0.0",
        "return self.dropout_p or 0.0",
        "dropout in evaluation mode",
    ),
    of_lowering(
        'torch.randint(1 << 62, (), device="cpu")',
        "torch.tensor(0)",
        "every call drops the same weights",
    ),
)

SUBJECT = Subject(
    "blocked",
    FORWARD + MERGE + BACKWARD,
    tests=("tests/ops/test_small_budgets.py::test_tiles",),
    mechanisms=("flash", "sliding_window", "longformer", "bigbird", "sparse_transformer"),
    first=("matrix_is_the_paper", "equals_its_matrix", "nothing_to_attend_to_gives_zero"),
)

DROPPING = Subject(
    "dropout",
    DROPOUT,
    tests=("tests/ops/test_small_budgets.py::test_dropout_is_the_same_in_the_backward_pass",),
    mechanisms=("sliding_window",),
    first=("dropout_is_dropout", "dropout_keeps_its_share"),
    others=("tests/test_regressions.py",),
)

OFFSETS = Subject(
    "offsets that move",
    (
        of_lowering(
            "p.q_offset.clone()",
            "p.q_offset",
            "the backward pass of softmax reads an offset that has moved on",
        ),
        Mutant(
            "ops/linear.py",
            "offset = q_offset.clone() if moving",
            "offset = q_offset if moving",
            "the backward pass of a scan reads an offset that has moved on",
        ),
    ),
    tests=("tests/test_regressions.py",),
)
