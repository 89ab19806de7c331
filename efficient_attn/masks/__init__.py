"""Structured masks: one predicate each, from which every other view follows. True means "may attend"."""

from .base import And, Causal, Everything, Mask, Or
from .layout import BlockLayout, Tile, TileGroup, plan, tile_groups
from .patterns import BlockWindow, Fixed, GlobalTokens, RandomBlocks, Sinks, Strided, Window
from .random_blocks import random_blocks
from .segments import segment_ids_from_cu_seqlens

__all__ = [
    "And",
    "BlockLayout",
    "BlockWindow",
    "Causal",
    "Everything",
    "Fixed",
    "GlobalTokens",
    "Mask",
    "Or",
    "RandomBlocks",
    "Sinks",
    "Strided",
    "Tile",
    "TileGroup",
    "Window",
    "plan",
    "random_blocks",
    "segment_ids_from_cu_seqlens",
    "tile_groups",
]
