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

from efficient_attn import MECHANISMS, Mechanism, Shape
from efficient_attn.cli.describe import formula
from efficient_attn.cli.figures.matrices import HEAD_DIM, HEADS, TRIAL_LENGTH, assignments, build

README = Path(__file__).parent.parent / "README.md"
LENGTH = 16_384

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


def markdown(headings: list[str], rows: list[list[str]], numbers: int = 0) -> str:
    rule = ["---"] * (len(headings) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))


def sections() -> dict[str, str]:
    """The generated parts of the README, by the name in their markers."""
    return {"mechanisms": declared_table(), "costs": counted_table()}


def filled_in(readme: str) -> str:
    """`readme` with its tables generated afresh."""
    return put(readme, sections())


def put(readme: str, parts: Mapping[str, str]) -> str:
    """`readme` with each part between its `<!-- name:begin -->` and `<!-- name:end -->`."""
    for name, part in parts.items():
        before, begin, rest = readme.partition(f"<!-- {name}:begin -->\n")
        _, end, after = rest.partition(f"<!-- {name}:end -->")
        if not end:
            raise LookupError(f"the README has no <!-- {name}:begin --> ... <!-- {name}:end -->")
        readme = f"{before}{begin}{part}\n{end}{after}"
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
