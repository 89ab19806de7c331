"""Trains a small Llama on real text, swaps its attention, wins the loss back, and generates in constant memory.

    pip install -e '.[examples]'
    python examples/swap_language_model.py                  # some minutes on one core, nothing to download
    python examples/swap_language_model.py --quick          # does everything work? about 20 seconds
    python examples/swap_language_model.py --data book.txt

The model of transformers is built from a config, and reads bytes. After the swap each layer first learns to give
what exact attention gave (attention transfer: no labels, every layer on its own), then the whole model is
finetuned. The row of the model that was not swapped was trained on as long, and says what finetuning alone does.
Exits with 1 if the loss is not won back, or generation is not what it should be.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm import DemoError
from lm.data import VOCABULARY, Corpus, load_corpus
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from efficient_attn import measure_approximation, swap_attention, transfer_attention

BATCH = 8


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and of what it is trained on; steps of each phase."""

    width: int
    layers: int
    context: int
    window: int
    steps: int
    transfer_steps: int
    finetune_steps: int
    windows: int
    """Held-out windows of `context` bytes that the loss is measured on."""
    lengths: tuple[int, int]
    """Bytes to generate, for two sizes of the cache."""


FULL = Settings(96, 4, 256, 16, 800, 150, 300, 32, (256, 1000))
QUICK = Settings(64, 2, 64, 4, 300, 80, 150, 16, (32, 128))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model, trained for less long")
    parser.add_argument("--data", type=Path, help="a UTF-8 text file (default: CPython's documentation)")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    try:
        corpus = load_corpus(options.data, settings.context)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    torch.manual_seed(0)
    model = language_model(settings)
    train(model, corpus, settings, settings.steps, learning_rate=4e-3, seed=0)
    before = bits_per_byte(model, corpus, settings)
    print(f"trained {settings.steps} steps on {corpus.source}: {before:.3f} bits per byte, held out\n")
    longer = copy.deepcopy(model)
    finetune(longer, corpus, settings)

    rows: list[tuple[str, list[float]]] = []
    swapped: dict[str, nn.Module] = {}
    choices = (("sliding_window", {"window_size": settings.window}), ("linear", {"feature_map": "exp"}))
    for name, chosen in choices:
        swapped[name] = copy.deepcopy(model)
        rows.append((name, swap_and_recover(swapped[name], name, chosen, corpus, settings)))
    recovered = report(before, bits_per_byte(longer, corpus, settings), rows)

    print(
        "\nbytes of the cache after generating, and how far its logits are from those of one pass over all tokens"
    )
    print(f"{'':15}" + "".join(f"{length:>10,} tokens" for length in settings.lengths) + f"{'logits':>13}")
    generated = [
        generate(name, each, corpus, settings, constant=name != "(no swap)")
        for name, each in {"(no swap)": model, **swapped}.items()
    ]
    print(f"\nmost of the loss was won back: {recovered}")
    print(f"generated what one pass gives, after a swap in constant memory: {all(generated)}")
    return 0 if recovered and all(generated) else 1


def language_model(settings: Settings) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4 * settings.context,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def swap_and_recover(
    model: nn.Module, name: str, chosen: dict[str, Any], corpus: Corpus, settings: Settings
) -> list[float]:
    """Bits per byte after the swap, after attention transfer, and after finetuning."""
    print(swap_attention(model, name, **chosen))
    tokens = corpus.validation_windows(BATCH, settings.context)[:, :-1]
    print(f"\n{measure_approximation(model, tokens)}\n")
    bits = [bits_per_byte(model, corpus, settings)]
    batches = (tokens[:, :-1] for tokens in draw(corpus, settings, seed=1))
    print(transfer_attention(model, batches, steps=settings.transfer_steps, lr=1e-2, projections=True), "\n")
    bits.append(bits_per_byte(model, corpus, settings))
    finetune(model, corpus, settings)
    return [*bits, bits_per_byte(model, corpus, settings)]


def draw(corpus: Corpus, settings: Settings, seed: int) -> Iterator[Tensor]:
    step = 0
    while True:
        yield corpus.batch(seed=seed, step=step, batch_size=BATCH, context=settings.context)
        step += 1


def finetune(model: nn.Module, corpus: Corpus, settings: Settings) -> None:
    train(model, corpus, settings, settings.finetune_steps, learning_rate=2e-3, seed=2)


def train(
    model: nn.Module, corpus: Corpus, settings: Settings, steps: int, learning_rate: float, seed: int
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for _, tokens in zip(range(steps), draw(corpus, settings, seed), strict=False):
        loss = next_byte_loss(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def next_byte_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, corpus: Corpus, settings: Settings) -> float:
    """The loss on held-out text, in bits."""
    model.eval()
    windows = corpus.validation_windows(settings.windows, settings.context)
    return float(next_byte_loss(model, windows)) / math.log(2)


def report(before: float, longer: float, rows: list[tuple[str, list[float]]]) -> bool:
    """Print the losses; whether at least half of what each swap lost was won back."""
    print(f"bits per byte   {'trained':>8} {'swapped':>8} {'transfer':>8} {'finetuned':>9} {'won back':>8}")
    print(f"{'(no swap)':15} {before:8.3f} {'':8} {'':8} {longer:9.3f}")
    shares = []
    for name, (after, transferred, finetuned) in rows:
        shares.append(1.0 if finetuned <= before else (after - finetuned) / (after - before))
        print(f"{name:15} {before:8.3f} {after:8.3f} {transferred:8.3f} {finetuned:9.3f} {shares[-1]:8.0%}")
    print("won back: of what the swap lost; (no swap) says what finetuning gives without one")
    return min(shares) > 0.5


@torch.no_grad()
def generate(name: str, model: Any, corpus: Corpus, settings: Settings, constant: bool) -> bool:
    """Print the bytes of the cache at both lengths; whether they and what was generated are as they should be."""
    model.eval()
    prompt = corpus.validation[None, :16].long()
    sizes, difference = [], 0.0
    for length in settings.lengths:
        out = model.generate(
            prompt,
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        sizes.append(cache_bytes(out.past_key_values))
        at_once = model(out.sequences[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
        difference = max(difference, float((torch.stack(out.logits, 1) - at_once).abs().max()))
    print(f"{name:15}" + "".join(f"{size:17,}" for size in sizes) + f"{difference:13.0e}")
    return difference < 1e-3 and (sizes[0] == sizes[1]) == constant


def cache_bytes(cache: Any) -> int:
    """What a swapped layer's state takes, or the keys and values of another."""
    return sum(
        layer.nbytes if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )


if __name__ == "__main__":
    sys.exit(main())
