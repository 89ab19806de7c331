"""Does the model see the future, and does it decode what it was trained to be?

A teacher-forced score only means something if no position looks ahead. A leak does not show in that score,
for it makes it better, and often not in the gradients. It shows when the future is taken away: the same
weights at the same positions, every byte after t replaced by another. A model that does not look ahead gives
the same logits up to t, bit for bit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_attn import create_mechanism

from .data import VOCABULARY
from .model import LanguageModel, Settings
from .train import next_byte_bits


@dataclass(frozen=True)
class Leak:
    """What blanking the future changed; `difference` is over every logit at or before the cut."""

    difference: float
    comparisons: int
    bits_teacher_forced: float
    bits_future_blanked: float

    @property
    def exact(self) -> bool:
        return self.difference == 0.0


@torch.no_grad()
def audit_leak(model: LanguageModel, windows: Tensor, positions: int, seed: int) -> Leak:
    """Compares the logits with and without the future, cutting each window at `positions` places."""
    model.eval()
    context = windows.shape[1] - 1
    generator = torch.Generator().manual_seed(seed)
    gaps: list[Tensor] = []
    comparisons = 0
    bits: list[tuple[Tensor, Tensor]] = []
    for window in windows:
        cuts = torch.randperm(context - 1, generator=generator)[:positions].sort().values
        tokens = window[:-1].expand(len(cuts), -1)
        # an offset of 1..255 makes every replaced byte another byte
        offset = torch.randint(1, VOCABULARY, tokens.shape, generator=generator)
        past = torch.arange(context) <= cuts[:, None]
        blanked = torch.where(past, tokens, (tokens + offset) % VOCABULARY)
        seen, unseen = model(tokens), model(blanked)
        gaps.append(torch.where(past[..., None], seen - unseen, 0.0).abs().max())
        comparisons += int(past.sum()) * VOCABULARY
        rows = torch.arange(len(cuts))
        following = window[cuts + 1]
        bits.append(
            (next_byte_bits(seen[rows, cuts], following), next_byte_bits(unseen[rows, cuts], following))
        )
    model.train()
    forced, without = (float(torch.cat(column).mean()) for column in zip(*bits, strict=True))
    return Leak(torch.stack(gaps).max().item(), comparisons, forced, without)


def looking_ahead(model: LanguageModel, settings: Settings) -> LanguageModel:
    """The same weights attending to the whole sequence: what the audit must catch, or it proves nothing."""
    leaky = LanguageModel(
        settings,
        lambda: create_mechanism(
            "full", num_heads=settings.num_heads, head_dim=settings.head_dim, is_causal=False
        ),
    )
    leaky.load_state_dict(model.shared_weights(), strict=False)
    return leaky


@torch.no_grad()
def decode_difference(model: LanguageModel, tokens: Tensor) -> float:
    """The largest difference between logits decoded byte by byte and teacher-forced ones, over (L,) bytes."""
    model.eval()
    expected = model(tokens[None])
    states = model.init_state(1)
    decoded = []
    for token in tokens:
        logits, states = model.step(token.view(1, 1), states)
        decoded.append(logits)
    model.train()
    return (torch.cat(decoded, 1) - expected).abs().max().item()


@dataclass(frozen=True)
class Sample:
    prompt: str
    continuation: str
    seconds_per_byte: float


@torch.no_grad()
def sample(model: LanguageModel, prompt: Tensor, count: int, seed: int, temperature: float = 0.7) -> Sample:
    """Continues `prompt` by `count` bytes: the prompt in one `step`, then one byte per `step`."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    logits, states = model.step(prompt[None], model.init_state(1))
    drawn: list[int] = []
    began = time.perf_counter()
    for _ in range(count):
        chances = (logits[0, -1].double() / temperature).softmax(-1)
        drawn.append(int(torch.multinomial(chances, 1, generator=generator)))
        logits, states = model.step(torch.tensor([drawn[-1:]]), states)
    seconds = (time.perf_counter() - began) / max(1, count)
    model.train()
    return Sample(_text(prompt.tolist()), _text(drawn), seconds)


def _text(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")
