"""One of two ranks that train together: `python -m properties.ranks (ddp | fsdp2) RANK FOLDER`.

Writes to FOLDER what the test compares: the gradients of each step, and how many comparisons between ranks held.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from efficient_attn import (
    Attention,
    BigBirdAttention,
    LinearAttention,
    LinformerAttention,
    Mechanism,
    PerformerAttention,
)

WORLD, STEPS, SAVED_AFTER = 2, 4, 2
BATCH, LENGTH, WIDTH, HEADS = 4, 24, 16, 2


class Model(nn.Module):
    """A residual layer around each mechanism that draws, or learns, something of its own."""

    def __init__(self) -> None:
        super().__init__()
        head_dim = WIDTH // HEADS
        mechanisms = (
            PerformerAttention(head_dim, num_features=12, is_causal=True),
            BigBirdAttention(block_size=2, num_window_blocks=1, num_global_blocks=1, num_random_blocks=2),
            PerformerAttention(head_dim, seed=3, kernel="relu"),
            LinformerAttention(LENGTH, HEADS, rank=5),
            LinearAttention(),
        )
        self.layers = nn.ModuleList(Attention(WIDTH, HEADS, mechanism) for mechanism in mechanisms)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def batch_of(step: int) -> Tensor:
    """All rows of a step, for every rank to take its share of."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> dict[str, Tensor]:
    """One step; the gradients that it took."""
    optimizer.zero_grad()
    (model(x) - x.roll(1, 1)).square().mean().backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    kept = {name: whole(g).clone() for name, g in gradients.items() if g is not None}
    optimizer.step()
    return kept


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def fingerprints(model: nn.Module) -> Iterator[Tensor]:
    """What each mechanism has drawn: projections, features of a probe, and the pattern."""
    probe = torch.randn(1, HEADS, LENGTH, WIDTH // HEADS, generator=torch.Generator().manual_seed(5)).double()
    for mechanism in (m for m in model.modules() if isinstance(m, Mechanism)):
        if isinstance(mechanism, PerformerAttention):
            yield mechanism.feature_map.projection
            yield from (x for x in mechanism.feature_map(probe) if x is not None)
        if isinstance(mechanism, BigBirdAttention):
            yield (mechanism.matrix(probe, probe) > 0).double()


class Rank:
    """What a rank does, and what it has compared with the other."""

    def __init__(self, kind: str, number: int, folder: Path) -> None:
        self.kind, self.number, self.folder = kind, number, folder
        self.gradients: list[dict[str, Tensor]] = []
        self.compared = 0

    def compare(self, model: nn.Module, when: str) -> None:
        """Raise unless both ranks have drawn the same, bit for bit."""
        for position, mine in enumerate(fingerprints(model)):
            both = [torch.empty_like(mine) for _ in range(WORLD)]
            dist.all_gather(both, mine.contiguous())
            if not torch.equal(*both):
                raise AssertionError(f"fingerprint {position} differs between ranks {when}")
            self.compared += 1

    def build(self, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A wrapped model, made while the ranks' global generators disagree."""
        torch.manual_seed(seed + self.number)
        model = Model()
        self.compare(model, "when made")
        initial = torch.load(self.folder / "initial.pt", weights_only=True)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(initial[name])
        if self.kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)
        return model, optimizer_of(model)

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        share = BATCH // WORLD
        mine = slice(self.number * share, (self.number + 1) * share)
        for step in steps:
            self.gradients.append(train_step(model, optimizer, batch_of(step)[mine]))
            self.compare(model, f"after step {step}")
            if step + 1 == SAVED_AFTER:
                states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                dcp.save(states, checkpoint_id=self.folder / "checkpoint")

    def resume(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Another model, from the checkpoint."""
        model, optimizer = self.build(seed=70)
        for buffer in model.buffers():
            buffer.fill_(0.5)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=self.folder / "checkpoint")
        set_state_dict(
            model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
        )
        self.compare(model, "after resuming")
        return model, optimizer


def main(kind: str, number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=WORLD)
    rank = Rank(kind, number, folder)
    model, optimizer = rank.build(seed=40)
    rank.train(model, optimizer, range(STEPS))
    drawn = list(fingerprints(model))

    resumed, its_optimizer = rank.resume()
    rank.train(resumed, its_optimizer, range(SAVED_AFTER, STEPS))
    for name, (a, b) in enumerate(zip(model.parameters(), resumed.parameters(), strict=True)):
        if not torch.equal(whole(a), whole(b)):
            raise AssertionError(f"parameter {name} differs after resuming")
    for position, (a, b) in enumerate(zip(drawn, fingerprints(resumed), strict=True)):
        if not torch.equal(a, b):
            raise AssertionError(f"fingerprint {position} differs after resuming")
    torch.save(rank.gradients, folder / f"gradients{number}.pt")
    (folder / f"compared{number}.json").write_text(json.dumps(rank.compared))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
