"""Trains a small vision transformer on scikit-learn's digits, swaps its attention, and finetunes it.

    pip install -e '.[examples]'
    python examples/swap_vit_digits.py            # a minute or two on one core, nothing to download
    python examples/swap_vit_digits.py --quick    # does everything work? about 20 seconds

Every 2 x 2 pixels are a token, behind a class token that reads the image. Printed is the accuracy on images that
were never trained on: before the swap, after it and after finetuning, and also that of the model that was finetuned
as long without a swap. Exits with 1 if finetuning wins nothing back.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from efficient_attn import measure_approximation, swap_attention

SWAPS = (
    # A class token must see the whole image: a plain window would cut it off.
    ("longformer", {"window_size": 4, "global_tokens": 1}),
    ("sliding_window", {"window_size": 4}),
    ("linear", {}),
)
BATCH = 64


@dataclass(frozen=True)
class Settings:
    """Sizes of the model, and epochs of training and finetuning."""

    width: int
    layers: int
    epochs: int
    finetune_epochs: int


FULL, QUICK = Settings(64, 4, 40, 15), Settings(48, 2, 10, 4)


@dataclass(frozen=True)
class Digits:
    """1,797 images of 8 x 8 pixels, a fifth of them held out."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model, trained for less long")
    settings = QUICK if parser.parse_args(arguments).quick else FULL

    digits = load()
    torch.manual_seed(0)
    model = vision_transformer(settings)
    train(model, digits, settings.epochs, learning_rate=2e-3)
    before = accuracy(model, digits)
    print(
        f"{len(digits.test[1])} held-out images, 17 tokens each; accuracy of the trained model: {before:.3f}"
    )

    longer = copy.deepcopy(model)
    train(longer, digits, settings.finetune_epochs, learning_rate=1e-3)
    rows = [("(no swap)", before, accuracy(longer, digits))]
    for name, options in SWAPS:
        swapped = copy.deepcopy(model)
        swap_attention(swapped, name, **options)
        print(f"\n{measure_approximation(swapped, digits.test[0][:32])}")
        after = accuracy(swapped, digits)
        train(swapped, digits, settings.finetune_epochs, learning_rate=1e-3)
        rows.append((name, after, accuracy(swapped, digits)))

    print(f"\n{'mechanism':15} {'after the swap':>14} {'after finetuning':>16}")
    for name, after, finetuned in rows:
        print(f"{name:15} {after:14.3f} {finetuned:16.3f}")
    lost = [(after, finetuned) for _, after, finetuned in rows[1:] if after < before]
    won_back = all(finetuned > after for after, finetuned in lost)
    print(f"\nfinetuning won back accuracy for every mechanism that had lost some: {won_back}")
    return 0 if won_back else 1


def load() -> Digits:
    """Scikit-learn's digits, in a fixed random order."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    cut = len(labels) * 4 // 5
    return Digits((images[:cut], labels[:cut]), (images[cut:], labels[cut:]))


def vision_transformer(settings: Settings) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def train(model: nn.Module, digits: Digits, epochs: int, learning_rate: float) -> None:
    images, labels = digits.train
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    steps = epochs * -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(images[chosen]).logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of held-out images whose digit the model names."""
    images, labels = digits.test
    model.eval()
    return float((model(images).logits.argmax(-1) == labels).float().mean())


if __name__ == "__main__":
    sys.exit(main())
