"""transformers: swapped modules, and attention implementations by name, `efficient_attn:NAME`.

Importing this registers `efficient_attn` with transformers, and `efficient_attn:NAME` for each mechanism that has no
parameters and needs no options; `register` names others.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import NAME, attend_swapped
from .masks import mask
from .named import register, register_defaults

AttentionInterface.register(NAME, attend_swapped)
AttentionMaskInterface.register(NAME, mask)
register_defaults()

__all__ = ["register"]
