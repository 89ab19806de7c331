"""A small byte-level transformer whose attention is a parameter, and the sizes it is run at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from efficient_attn import MECHANISMS, Attention, Mechanism, create_mechanism

from . import DemoError
from .data import VOCABULARY


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on besides the text, the mechanisms and the number of threads."""

    context: int = 512
    d_model: int = 128
    num_layers: int = 2
    num_heads: int = 4
    batch_size: int = 2
    steps: int = 400
    learning_rate: float = 3e-3
    evaluations: int = 8
    windows: int = 32
    seed: int = 0
    audit_windows: int = 2
    audit_positions: int = 16
    sample_bytes: int = 160
    scaling_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    state_lengths: tuple[int, ...] = (256, 1024, 4096, 16384)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    def training(self) -> dict[str, int | float]:
        """What decides the weights: two runs that agree on it continue each other."""
        names = "context d_model num_layers num_heads batch_size steps learning_rate evaluations windows seed"
        return {name: getattr(self, name) for name in names.split()}


PRESETS = {
    "default": Settings(),
    "quick": Settings(
        context=64,
        d_model=32,
        num_layers=2,
        num_heads=2,
        batch_size=4,
        steps=24,
        evaluations=3,
        windows=8,
        audit_windows=1,
        audit_positions=8,
        sample_bytes=24,
        scaling_lengths=(128, 256, 512),
        state_lengths=(64, 256, 1024),
    ),
    "long": Settings(
        context=1024,
        d_model=256,
        num_layers=4,
        num_heads=8,
        batch_size=4,
        steps=3000,
        learning_rate=2e-3,
        evaluations=20,
        audit_windows=4,
        sample_bytes=600,
        scaling_lengths=(1024, 2048, 4096, 8192, 16384, 32768),
        state_lengths=(256, 1024, 4096, 16384, 65536),
    ),
}


class Rotary:
    """Rotates pairs of channels by the position, so that a dot product depends on the distance.

    Su et al., "RoFormer", 2021, arXiv:2104.09864, equation 34.
    """

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        self.frequencies = base ** (-torch.arange(0, head_dim, 2) / head_dim)

    def __call__(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm MLP, each added to the stream."""

    def __init__(self, settings: Settings, mechanism: Mechanism) -> None:
        super().__init__()
        width = settings.d_model
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, settings.num_heads, mechanism, rotary=Rotary(settings.head_dim))
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.attention.step(self.attention_norm(x), state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out: sequences by `forward`, any number of new bytes by `step`."""

    def __init__(self, settings: Settings, make_mechanism: Callable[[], Mechanism]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, settings.d_model)
        self.blocks = nn.ModuleList(Block(settings, make_mechanism()) for _ in range(settings.num_layers))
        self.norm = nn.LayerNorm(settings.d_model)
        self.head = nn.Linear(settings.d_model, VOCABULARY, bias=False)
        _initialise(self, settings)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self._blocks():
            x = block(x)
        return self.head(self.norm(x))

    def init_state(self, batch_size: int) -> list[Any]:
        return [block.attention.init_state(batch_size) for block in self._blocks()]

    def step(self, tokens: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        x = self.embedding(tokens)
        advanced = []
        for block, state in zip(self._blocks(), states, strict=True):
            x, state = block.step(x, state)
            advanced.append(state)
        return self.head(self.norm(x)), advanced

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def shared_weights(self) -> dict[str, Tensor]:
        """The parameters that every mechanism has: all but the mechanism's own."""
        return {name: p for name, p in self.named_parameters() if ".mechanism." not in name}


def mechanism_options(name: str, context: int) -> dict[str, Any]:
    """What each mechanism is given: a quarter of the trained context to look at, the same at every length."""
    window = max(1, context // 4)
    return {
        "sliding_window": {"window_size": window},
        "longformer": {"window_size": window, "global_tokens": 4},
        "bigbird": {"block_size": max(1, context // 16)},
        "sparse_transformer": {"pattern": "fixed", "stride": window, "summary": max(1, window // 16)},
    }.get(name, {})


def make_mechanism(name: str, settings: Settings, *, max_seq_len: int | None = None) -> Mechanism:
    """The causal mechanism `name`, for the model's heads."""
    return create_mechanism(
        name,
        num_heads=settings.num_heads,
        head_dim=settings.head_dim,
        max_seq_len=settings.context if max_seq_len is None else max_seq_len,
        is_causal=True,
        **mechanism_options(name, settings.context),
    )


def build_model(name: str, settings: Settings) -> LanguageModel:
    return LanguageModel(settings, lambda: make_mechanism(name, settings))


def select_mechanisms(request: str, settings: Settings) -> tuple[list[str], dict[str, str]]:
    """The mechanisms of a comma-separated request, and why each one that `all` left out cannot be used here.

    Raises:
        DemoError: if a name is unknown, or names a mechanism that has no causal form.
    """
    names = list(MECHANISMS) if request == "all" else [name.strip() for name in request.split(",")]
    chosen: list[str] = []
    refused: dict[str, str] = {}
    for name in names:
        if name not in MECHANISMS:
            raise DemoError(f"--mechanisms: unknown {name!r}; allowed: all, {', '.join(MECHANISMS)}")
        try:
            make_mechanism(name, settings)
        except (ValueError, NotImplementedError) as error:
            if request != "all":
                raise DemoError(f"--mechanisms: {name} cannot model a language here: {error}") from None
            refused[name] = str(error)
        else:
            chosen.extend([name] if name not in chosen else [])
    return chosen, refused


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _initialise(model: LanguageModel, settings: Settings) -> None:
    """The same weights for every mechanism: drawn in order from a generator that no mechanism can advance."""
    generator = torch.Generator().manual_seed(settings.seed)
    residual = 1 / math.sqrt(2 * settings.num_layers)
    with torch.no_grad():
        for name, weight in model.shared_weights().items():
            if weight.dim() == 1:
                weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            std = {"embedding.weight": 0.5, "head.weight": 0.02}.get(name, 1 / math.sqrt(weight.shape[1]))
            writes_to_stream = name.endswith(("out_proj.weight", "mlp.2.weight"))
            weight.normal_(0, std * (residual if writes_to_stream else 1.0), generator=generator)
