"""Efficient attention for PyTorch: mechanisms that share one interface, and say what they cost."""

from . import masks, planning
from .backends import BackendError
from .complexity import Complexity, Cost, Shape, count_flops
from .integrations.torch_mha import MultiheadAttention
from .layers import Attention
from .masks import segment_ids_from_cu_seqlens
from .mechanisms import (
    MECHANISMS,
    BigBirdAttention,
    FlashAttention,
    FullAttention,
    LinearAttention,
    LinformerAttention,
    LongformerAttention,
    Mechanism,
    PerformerAttention,
    SlidingWindowAttention,
    SparseTransformerAttention,
    create_mechanism,
)

__version__ = "0.1.0"

__all__ = [
    "MECHANISMS",
    "Attention",
    "BackendError",
    "BigBirdAttention",
    "Complexity",
    "Cost",
    "FlashAttention",
    "FullAttention",
    "LinearAttention",
    "LinformerAttention",
    "LongformerAttention",
    "Mechanism",
    "MultiheadAttention",
    "PerformerAttention",
    "Shape",
    "SlidingWindowAttention",
    "SparseTransformerAttention",
    "count_flops",
    "create_mechanism",
    "masks",
    "planning",
    "segment_ids_from_cu_seqlens",
]
