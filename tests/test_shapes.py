"""The shapes and types in signatures hold: the laws once more, every annotated call checked by beartype.

In an interpreter of its own, because checked functions cannot be compiled, and check before the library does.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from efficient_attn.mechanisms import MECHANISMS

PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from jaxtyping import install_import_hook
modules = ["mechanisms", "layers", "integrations", "feature_maps", "state", "masks.segments"]
install_import_hook([f"efficient_attn.{module}" for module in modules], "beartype.beartype")
from efficient_attn.mechanisms import MECHANISMS
from efficient_attn.testing import LAWS, check_mechanism
from efficient_attn.testing.laws import costs, tracing

# Counting laws enter modes in which tensors are not what they seem; tracing laws compile.
laws = [name for name in LAWS if not hasattr(tracing, name) and not hasattr(costs, name)]
for mechanism in MECHANISMS[sys.argv[1]].examples(37, 4, 8)[:2]:
    report = check_mechanism(mechanism, laws=laws, raise_on_failure=False)
    print(report)
    if report.broken:
        sys.exit(1)
"""


@pytest.mark.parametrize("name", MECHANISMS)
def test_signatures_hold(name):
    run = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "0 broken" in run.stdout
