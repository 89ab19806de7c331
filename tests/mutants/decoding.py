"""Mutants of what a softmax mechanism and a linear one carry from step to step, and of the room that it grows in."""

from __future__ import annotations

from .mutant import Mutant, Subject

STATE, FAMILIES = "state.py", "mechanisms/families.py"

GROWING = (
    Mutant(
        STATE,
        "x.new_ones(x.shape[0], x.shape[2], dtype=torch.bool)",
        "x.new_zeros(x.shape[0], x.shape[2], dtype=torch.bool)",
        "tokens without a key_mask, beside tokens with one, are padding",
    ),
    Mutant(
        STATE,
        "past is not self._newest",
        "past.data_ptr() != buffer.data_ptr()",
        "a second step from one state overwrites the tokens of the first",
    ),
    Mutant(
        STATE,
        "past is not self._newest",
        "past.shape != self._newest.shape",
        "a state goes on in the buffer of its branch",
    ),
    Mutant(
        STATE,
        "            buffer.narrow(dim, 0, past.shape[dim]).copy_(past)\n",
        "",
        "a buffer that is too small forgets what it held",
    ),
    Mutant(
        FAMILIES,
        "in_place=not recorded",
        "in_place=True",
        "steps that want gradients write over what autograd has saved",
    ),
    Mutant(
        FAMILIES,
        "any(x.requires_grad for x in (q, k, v, state.k, state.v))",
        "all(x.requires_grad for x in (q, k, v))",
        "the gradient of the first token of a decoded sequence is lost",
    ),
    Mutant(
        STATE,
        "return torch.is_inference_mode_enabled() or not buffer.is_inference()",
        "return True",
        "a state made in inference mode cannot go on outside of it",
    ),
    Mutant(
        STATE,
        "None if x is None else x.clone() for name",
        "x for name",
        "a pickled state takes the room for more tokens along",
    ),
)

STEPS = (
    Mutant(
        FAMILIES,
        "slots, sinks = self.retained[0] - 1, self.retained[1]",
        "slots, sinks = self.retained[0], self.retained[1]",
        "a window keeps one token too many",
    ),
    Mutant(
        FAMILIES,
        "key_mask=state.key_mask), state",
        "key_mask=None), state",
        "the key_mask of earlier steps is forgotten",
    ),
    Mutant(
        FAMILIES,
        "state.valid & (near[:, :slots] >= sinks)",
        "state.valid",
        "sinks that are in the window are counted twice",
    ),
    Mutant(
        FAMILIES,
        "valid & (near[:, slots:] >= sinks)]",
        "valid]",
        "new tokens that are sinks are counted twice",
    ),
    Mutant(
        FAMILIES,
        "near = position - state.anchor[:, None]",
        "near = position.expand(len(k), -1)",
        "a step counts from position 0, not from the anchor",
    ),
    Mutant(
        FAMILIES,
        "q_pos = near[:, slots:, None]",
        "q_pos = near[:, -1:, None]",
        "every new token stands where the last one does",
    ),
    Mutant(
        FAMILIES,
        "self.mask.allows(q_pos, k_pos) & present[:, None, :]",
        "present[:, None, :].expand(-1, q.shape[2], -1)",
        "new tokens see each other, and all that is kept",
    ),
    Mutant(
        FAMILIES,
        "scale = q.shape[3] ** -0.5 if self.scale is None else self.scale\n        out = attend_where",
        "scale = q.shape[3] ** -0.5\n        out = attend_where",
        "a step in a window ignores the scale",
    ),
    Mutant(
        FAMILIES,
        "torch.full((batch, heads), NOTHING, dtype=dtype, device=device)",
        "torch.zeros(batch, heads, dtype=dtype, device=device)",
        "beside the exponent of an empty state, small weights vanish",
    ),
)

BYTES = (
    Mutant(
        FAMILIES,
        "return shape.num_kv_heads * (",
        "return shape.num_heads * (",
        "a state is said to hold keys for every query head",
    ),
    Mutant(
        FAMILIES,
        "shape.batch * (slots * (per_token + 1) + 8)",
        "shape.batch * (slots * per_token + 8)",
        "the validity of a window's slots is said to take nothing",
    ),
    Mutant(
        FAMILIES,
        "        numbers += self.feature_map.has_exponent\n",
        "",
        "the exponent of a linear state is said to take nothing",
    ),
    Mutant(
        FAMILIES,
        "numbers * inputs.accumulation_dtype(shape.dtype).itemsize",
        "numbers * shape.dtype.itemsize",
        "a linear state is said to be in the dtype of its inputs",
    ),
)

ROOM = Subject("room for tokens", GROWING, tests=("tests/test_states.py", "tests/test_regressions.py"))

SUBJECT = Subject(
    "decoding",
    STEPS + BYTES,
    mechanisms=("full", "sliding_window", "longformer", "linear", "performer"),
    first=(
        "state_size_is_declared",
        "stepping_equals_forward",
    ),
    others=("tests/test_states.py", "tests/ops/test_small_budgets.py::test_steps"),
)
