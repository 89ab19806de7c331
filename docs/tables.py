"""Prints the README's tables of mechanisms, from what the mechanisms declare and what `cost` counts.

python docs/tables.py            # print them
python docs/tables.py --write    # put them between the README's markers
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from efficient_attn import MECHANISMS, Mechanism, Shape, create_mechanism

README = Path(__file__).parent.parent / "README.md"
HEADS, HEAD_DIM, LENGTH = 8, 64, 16_384
TRIAL_LENGTH = 24

# What each mechanism is counted with; one that is not listed is counted as its first example.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "flash": {},
    "sliding_window": {"window_size": 512},
    "longformer": {"window_size": 512, "global_tokens": 64},
    "bigbird": {"block_size": 64},
    "sparse_transformer": {"pattern": "strided", "stride": 128},
    "linformer": {"rank": 256},
    "performer": {"num_features": 256},
    "linear": {"feature_map": "elu"},
}

DECLARED = ("against softmax attention", "time", "memory", "decode state", "path")
MASKS = {"key_mask": torch.bool, "segment_ids": torch.int64}
COUNTED = (
    "FLOPs, forward",
    "bytes kept for backward",
    "FLOPs, one more token",
    "bytes of decode state",
)


def build(name: str, length: int, options: Mapping[str, Any] | None, *, is_causal: bool) -> Mechanism | None:
    """The mechanism `name` with `options`, or its first example if None; None if it has no such causality."""
    cls = MECHANISMS[name]
    if not any(mechanism.is_causal == is_causal for mechanism in cls.examples(TRIAL_LENGTH, HEADS, HEAD_DIM)):
        return None
    if options is None:
        return next(m for m in cls.examples(length, HEADS, HEAD_DIM) if m.is_causal == is_causal)
    sizes = {"num_heads": HEADS, "head_dim": HEAD_DIM, "max_seq_len": length}
    return create_mechanism(name, **sizes, is_causal=is_causal, **options)


def declared_table() -> str:
    """What every mechanism declares, and what its examples turn out to accept."""
    rows = []
    for name, cls in MECHANISMS.items():
        says = cls.complexity
        examples = cls.examples(TRIAL_LENGTH, HEADS, HEAD_DIM)
        formulas = [formula(text) for text in (says.time, says.memory, says.state, says.path)]
        causal = "yes" if any(mechanism.is_causal for mechanism in examples) else "no"
        taken = [how_many(accepts(each, mask, dtype) for each in examples) for mask, dtype in MASKS.items()]
        rows.append([f"`{name}`", says.exactness, *formulas, causal, *taken])
    return markdown(["mechanism", *DECLARED, "causal", *(f"`{mask}`" for mask in MASKS)], rows)


def counted_table() -> str:
    """What `cost` counts for one sequence of LENGTH tokens in bfloat16: causal, where that exists."""
    rows = []
    for name in MECHANISMS:
        options = OPTIONS.get(name)
        causal = build(name, LENGTH, options, is_causal=True)
        mechanism = causal or build(name, LENGTH, options, is_causal=False)
        assert mechanism is not None, f"{name} has no examples"
        training = mechanism.cost(Shape(1, HEADS, LENGTH, LENGTH, HEAD_DIM), training=True)
        counts = [training.flops.forward, training.saved_bytes, 0, 0]
        if causal:
            one = causal.cost(Shape(1, HEADS, 1, LENGTH, HEAD_DIM), phase="decode")
            counts[2:] = [one.flops.forward, one.state_bytes]
        shown = [f"`{each}`" for each in assignments(mechanism, options)] + ["not causal"] * (not causal)
        rows.append([f"`{name}`", ", ".join(shown), *(f"{n:,}" if n else "none" for n in counts)])
    return markdown(["mechanism", "options", *COUNTED], rows, numbers=len(COUNTED))


def accepts(mechanism: Mechanism, mask: str, dtype: torch.dtype) -> bool:
    """Whether `forward` takes the mask, rather than refusing it by name."""
    q = torch.zeros(1, HEADS, TRIAL_LENGTH, HEAD_DIM)
    try:
        mechanism(q, q, q, **{mask: torch.ones(1, TRIAL_LENGTH, dtype=dtype)})
    except ValueError as error:
        if mask not in str(error):
            raise
        return False
    return True


def how_many(answers: Iterable[bool]) -> str:
    found = set(answers)
    return "in part" if len(found) == 2 else "yes" if True in found else "no"


def assignments(mechanism: Mechanism, options: Mapping[str, Any] | None) -> list[str]:
    """The options that `mechanism` was built with, as one writes them; of an example, its knob."""
    knob = mechanism.complexity.knob
    if options is None:
        options = {knob: getattr(mechanism, knob)} if knob else {}
    return [f"{key}={value!r}" for key, value in options.items()]


def formula(text: str) -> str:
    """A declared formula as one reads it; "0" is a decode state that does not exist."""
    spaced = (
        text.replace("**2", "²").replace("*", " ").replace("+", " + ").replace("/", " / ").replace("-", " - ")
    )
    return {"0": "none", "oo": "∞"}.get(text, spaced)


def markdown(headings: list[str], rows: list[list[str]], numbers: int = 0) -> str:
    rule = ["---"] * (len(headings) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))


def sections() -> dict[str, str]:
    """The generated parts of the README, by the name in their markers."""
    return {"mechanisms": declared_table(), "costs": counted_table()}


def filled_in(readme: str) -> str:
    """`readme` with each part between `<!-- name:begin -->` and `<!-- name:end -->` generated afresh."""
    for name, table in sections().items():
        before, begin, rest = readme.partition(f"<!-- {name}:begin -->\n")
        _, end, after = rest.partition(f"<!-- {name}:end -->")
        if not end:
            raise LookupError(f"the README has no <!-- {name}:begin --> ... <!-- {name}:end -->")
        readme = f"{before}{begin}{table}\n{end}{after}"
    return readme


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the tables into the README")
    if parser.parse_args().write:
        README.write_text(filled_in(README.read_text()))
    else:
        print("\n\n".join(sections().values()))
