"""Blocks: a window of them, some global, some random."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..complexity import Complexity
from ..inputs import check_flag, check_positive
from ..masks import BlockWindow, GlobalTokens, Mask, RandomBlocks
from .base import Mechanism
from .families import SoftmaxMechanism


class BigBirdAttention(SoftmaxMechanism):
    """Row blocks attend to neighbouring blocks, to the first ones, and to a few drawn at random.

        out_i = sum_j softmax_j(scale q_i . k_j) v_j    over blocks a = i // block_size, b = j // block_size with
        |a - b| <= num_window_blocks // 2, or a < num_global_blocks, or b < num_global_blocks, or b drawn for a

    Exact softmax attention within the pattern; causality, if asked for, on top. The blocks of row block a are a
    pure function of (seed, a) over the earlier blocks if causal, else of (seed, a, number of blocks) over the
    whole sequence, the same for every head; a draw may fall on a block that is visible anyway. Time O(L r b E)
    for r blocks of b keys a row. State O(L E): a later row block may draw any earlier block.
    Zaheer et al., "Big Bird", 2020, arXiv:2007.14062, section 2 and appendix D.

    Args:
        block_size: tokens in a block; blocks count from each row's first valid key.
        num_window_blocks: width of the band of blocks, odd.
        num_global_blocks: first blocks, which see all and are seen by all.
        num_random_blocks: blocks drawn for each row block.
        seed: selects the draw.
        is_causal: whether a query sees only keys at or before its position.
        scale: of the scores; 1 / sqrt(E) if None.
        dropout_p: probability of dropping a weight, in training mode.
        backend: "auto", "triton", "blocked" or "reference".
    Raises:
        ValueError: if a size is out of range, or num_window_blocks is even.
    """

    complexity = Complexity(
        time="L*r*b*E", memory="L*E", decode_time="r*b*E", state="L*E", path="2",
        exactness="exact within a pattern", knob="num_random_blocks",
        symbols={"r": "blocks_per_row", "b": "block_size"},
    )  # fmt: skip

    def __init__(
        self,
        *,
        block_size: int = 64,
        num_window_blocks: int = 3,
        num_global_blocks: int = 1,
        num_random_blocks: int = 3,
        seed: int = 0,
        is_causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        backend: str = "auto",
    ) -> None:
        check_positive("block_size", block_size)
        if check_positive("num_window_blocks", num_window_blocks) % 2 == 0:
            raise ValueError(
                f"num_window_blocks must be odd (as many blocks on each side), got {num_window_blocks}"
            )
        check_positive("num_global_blocks", num_global_blocks, least=0)
        check_positive("num_random_blocks", num_random_blocks, least=0)
        check_positive("seed", seed, least=0)
        mask: Mask = BlockWindow(block_size, num_window_blocks)
        if num_global_blocks:
            mask = mask | GlobalTokens.first(num_global_blocks * block_size)
        if num_random_blocks:
            mask = mask | RandomBlocks(
                block_size, num_random_blocks, seed, check_flag("is_causal", is_causal)
            )
        super().__init__(mask, is_causal=is_causal, scale=scale, dropout_p=dropout_p, backend=backend)
        self.block_size = block_size
        self.num_window_blocks = num_window_blocks
        self.num_global_blocks = num_global_blocks
        self.num_random_blocks = num_random_blocks
        self.seed = seed
        if not num_global_blocks:
            # Where random blocks lead is not known beforehand.
            path = "L/b" if num_window_blocks > 1 else "oo"
            self.complexity = replace(self.complexity, path=path)

    @property
    def blocks_per_row(self) -> int:
        """Blocks of keys that a block of queries sees, at most, if it is not global."""
        return self.num_window_blocks + self.num_global_blocks + self.num_random_blocks

    def random_block_choices(self, block: int, num_blocks: int) -> tuple[int, ...]:
        """The blocks drawn for row block `block` of a sequence of `num_blocks` (which causal draws ignore)."""
        drawn = RandomBlocks(self.block_size, self.num_random_blocks, self.seed, self.is_causal, num_blocks)
        return tuple(b for b in drawn.choices(torch.tensor(block)).tolist() if b >= 0)

    def _describe(self) -> dict[str, Any]:
        names = ("block_size", "num_window_blocks", "num_global_blocks", "num_random_blocks", "seed")
        return {name: getattr(self, name) for name in names}

    def exact_limit(self, seq_len: int) -> Mechanism | None:
        blocks = -(-seq_len // self.block_size)
        options = {**self._describe(), "num_window_blocks": 2 * blocks + 1}
        return type(self)(**options, is_causal=self.is_causal, scale=self.scale, backend=self.backend)

    @classmethod
    def examples(cls, seq_len: int, num_heads: int, head_dim: int) -> list[Mechanism]:
        block = max(1, seq_len // 9)
        return [
            cls(block_size=block, num_random_blocks=2),
            cls(block_size=block, num_random_blocks=2, seed=1, is_causal=True),
            cls(block_size=block, num_window_blocks=1, num_global_blocks=0, num_random_blocks=1),
            cls(block_size=block, num_random_blocks=0, is_causal=True),
        ]
