"""torch's compiled flex_attention, which skips the blocks that its table leaves out.

The table comes from the predicate block by block instead of from `create_block_mask`, which evaluates N^2 predicates
at once. It is built outside what is timed, and so is compilation, one for each shape.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.harness.cells import TRAINING
from benchmarks.harness.worker import Unsupported
from efficient_attn import BigBirdAttention
from efficient_attn.masks import Mask
from efficient_attn.mechanisms import SoftmaxMechanism

from .contender import Contender, Race

BLOCK_SIZE = 64
"""About an eighth faster here than the default of 128: a window of 256 wastes less of it."""


def flex(race: Race) -> Contender:
    """The mechanism's pattern as a block mask; blocks of the mechanism's own size, if it has one."""
    if not isinstance(race.mechanism, SoftmaxMechanism):
        raise Unsupported(f"{type(race.mechanism).__name__} has no mask to give to flex_attention")
    if race.cell.work == TRAINING and race.q.device.type == "cpu":
        raise Unsupported("flex_attention has no backward pass on a CPU")
    n, device = race.cell.length, race.q.device
    mechanism = race.mechanism
    size = mechanism.block_size if isinstance(mechanism, BigBirdAttention) else BLOCK_SIZE
    table = block_mask(mechanism.mask, n, size, device)
    # One compilation of this shape, for this shape: a second one would make the first dimension dynamic.
    torch._dynamo.reset()
    with inductor.patch(compile_threads=1):
        compiled = torch.compile(flex_attention, dynamic=False)
        with torch.no_grad():
            compiled(*race.inputs, block_mask=table)

    def forward() -> Tensor:
        return compiled(*race.inputs, block_mask=table)

    return Contender(forward, race.inputs, mechanism, remark=f"blocks of {size}")


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
