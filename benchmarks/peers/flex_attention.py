"""torch's compiled flex_attention, which skips the blocks that its table leaves out.

The table comes from the predicate block by block instead of from `create_block_mask`, which evaluates N^2 predicates
at once. It is built outside what is timed, and so is compilation, one for each shape. On a GPU it is tuned: Inductor
times its configurations, and of two block sizes the faster one runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from efficient_attn import BigBirdAttention
from efficient_attn.benchmarking.cells import BACKWARD, FORWARD
from efficient_attn.benchmarking.contender import Contender
from efficient_attn.benchmarking.worker import Unsupported
from efficient_attn.masks import Mask
from efficient_attn.mechanisms import SoftmaxMechanism

from .contender import Race

BLOCK_SIZE = 64
"""About an eighth faster on a CPU than the default of 128: a window of 256 wastes less of it."""
GPU_BLOCK_SIZES = (128, 64)
TUNED = "max-autotune-no-cudagraphs"
TRIED_CALLS = 10
DRY = "dry"
"""The effort of a run that shows that everything works: compiling would take most of it."""


def flex(race: Race) -> Contender:
    """The mechanism's pattern as a block mask; blocks of the mechanism's own size, if it has one."""
    mechanism, cell = race.mechanism, race.cell
    if not isinstance(mechanism, SoftmaxMechanism):
        raise Unsupported(f"{type(mechanism).__name__} has no mask to give to flex_attention")
    if cell.work != FORWARD and cell.device == "cpu":
        raise Unsupported("flex_attention has no backward pass on a CPU")
    sizes = (BLOCK_SIZE,) if cell.device == "cpu" else GPU_BLOCK_SIZES if cell.effort == "full" else (128,)
    if isinstance(mechanism, BigBirdAttention):
        sizes = (mechanism.block_size,)
    # One compilation of this shape, for this shape: a second one would make the first dimension dynamic.
    torch._dynamo.reset()
    forwards = {size: _forward(race, mechanism, size) for size in sizes}
    size = min(sizes, key=lambda size: _seconds(race, forwards[size])) if len(sizes) > 1 else sizes[0]
    remark = f"blocks of {size}" + (", not compiled" if cell.effort == DRY else "")
    return Contender(forwards[size], race.inputs, mechanism, remark=remark)


def _forward(race: Race, mechanism: SoftmaxMechanism, size: int) -> Callable[[], Tensor]:
    """flex_attention over a table with blocks of `size`, compiled for it."""
    cell = race.cell
    table = block_mask(mechanism.mask, cell.length, size, race.q.device)
    if cell.effort == DRY:
        return lambda: flex_attention(*race.inputs, block_mask=table)
    mode = TUNED if cell.device != "cpu" and cell.effort == "full" else None
    compiled = torch.compile(flex_attention, dynamic=False, mode=mode)

    def forward() -> Tensor:
        return compiled(*race.inputs, block_mask=table)

    # A backward pass that is timed alone runs many times over what one forward pass has kept.
    kept = functorch.patch(donated_buffer=False) if cell.work == BACKWARD else nullcontext()
    threads = inductor.patch(compile_threads=1) if cell.device == "cpu" else nullcontext()
    with kept, threads, torch.set_grad_enabled(cell.work != FORWARD):
        out = forward()
        if cell.work != FORWARD:
            torch.autograd.grad(out, race.inputs, torch.ones_like(out), retain_graph=cell.work == BACKWARD)
    return forward


def _seconds(race: Race, forward: Callable[[], Tensor]) -> float:
    """Of the passes that the cell is about, roughly."""

    def work() -> object:
        with torch.set_grad_enabled(race.cell.work != FORWARD):
            out = forward()
            if race.cell.work == FORWARD:
                return out
            return torch.autograd.grad(out, race.inputs, torch.ones_like(out))

    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(TRIED_CALLS):
        work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def block_mask(mask: Mask, length: int, size: int, device: torch.device) -> BlockMask:
    """The table of `mask`, with blocks that are full told from blocks that are partly so."""
    sized, blocks = mask.sized(length), -(-length // size)
    keys = torch.arange(blocks * size, device=device)
    rows = []
    for start in range(0, length, size):
        queries = keys[start : start + size, None]
        allowed = sized.allows(queries, keys) & (keys < length) & (queries < length)
        rows.append(allowed.view(size, blocks, size).sum((0, 2)))
    pairs = torch.stack(rows)
    full = pairs == size * size
    partial = (pairs > 0) & ~full

    def everything(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= 0

    # Without partial blocks nobody asks the predicate, and flex need not compile a complicated one.
    predicate = mask.mask_mod(length) if bool(partial.any()) else everything
    return BlockMask.from_kv_blocks(
        *_compressed(partial),
        *_compressed(full),
        BLOCK_SIZE=size,
        mask_mod=predicate,
        seq_lengths=(length, length),
    )


def _compressed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and which, those first."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()
