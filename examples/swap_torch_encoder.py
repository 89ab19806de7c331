"""Swaps the attention of a torch.nn.TransformerEncoder: equal where it must be, measured where it cannot be.

    pip install -e .
    python examples/swap_torch_encoder.py            # seconds
    python examples/swap_torch_encoder.py --quick

Exact mechanisms leave the outputs and gradients as they were, up to rounding. A window is another model, unless it
is as wide as the sequence. `restore` brings back the first one, bit for bit. Exits with 1 if any of that is not so.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

from efficient_attn import measure_approximation, swap_attention

TOLERANCE = 1e-4
"""Far above the rounding errors of a few layers in fp32, far below what another mechanism changes."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shorter sequences")
    length = 64 if parser.parse_args(arguments).quick else 512

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, num_layers=3)
    x = torch.randn(4, length, 64)
    padding = torch.arange(length) >= torch.tensor([length, length // 2, length - 5, 9])[:, None]
    outputs, gradients = run(encoder, x, padding)

    print(f"{'mechanism':33} {'outputs differ by':>17} {'gradients by':>12}")
    kept = []
    choices = (
        ("full", {}, True),
        ("flash", {}, True),
        ("sliding_window", {"window_size": length}, True),
        ("sliding_window", {"window_size": length // 8}, False),
    )
    for name, options, exact in choices:
        report = swap_attention(encoder, name, **options)
        swapped = run(encoder, x, padding)
        differences = largest_difference(outputs, swapped[0]), largest_difference(gradients, swapped[1])
        kept.append((max(differences) < TOLERANCE) == exact)
        text = ", ".join([name, *(f"{key}={value}" for key, value in options.items())])
        print(f"{text:33} {differences[0]:17.0e} {differences[1]:12.0e}")
        if not exact:
            print(f"\n{report}\n\n{measure_approximation(encoder, x, src_key_padding_mask=padding)}\n")
        report.restore()

    again = run(encoder, x, padding)
    same = all(map(torch.equal, [outputs, *gradients], [again[0], *again[1]]))
    print(f"restored: outputs and gradients are {'the same in every bit' if same else 'NOT the same'}")
    print(f"exact mechanisms equal, windows not: {all(kept)}")
    return 0 if same and all(kept) else 1


def run(encoder: nn.Module, x: Tensor, padding: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs of the tokens that are not padding, and the gradients of all parameters."""
    outputs = encoder(x, src_key_padding_mask=padding)[~padding]
    # A sum of squares would say nothing: the last layer norm makes it nearly constant.
    loss = (outputs * torch.linspace(-1, 1, outputs.numel()).view_as(outputs)).sum()
    gradients = torch.autograd.grad(loss, list(encoder.parameters()))
    return outputs.detach(), list(gradients)


def largest_difference(a: Tensor | list[Tensor], b: Tensor | list[Tensor]) -> float:
    """Relative to the largest number there is."""
    pairs = list(zip(a, b, strict=True))
    return max(float((x - y).abs().max()) for x, y in pairs) / max(float(x.abs().max()) for x, _ in pairs)


if __name__ == "__main__":
    sys.exit(main())
