"""Efficient attention for PyTorch: mechanisms that share one interface, and say what they cost."""

from . import masks, planning
from .backends import BackendError
from .complexity import Complexity, Cost, Shape, count_flops
from .integrations.approximation import ApproximationReport, measure_approximation
from .integrations.loading import load_swapped
from .integrations.swap import SwapError, SwapReport, swap_attention
from .integrations.torch_mha import MultiheadAttention
from .integrations.transfer import TransferReport, transfer_attention
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
    "ApproximationReport",
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
    "SwapError",
    "SwapReport",
    "TransferReport",
    "count_flops",
    "create_mechanism",
    "load_swapped",
    "masks",
    "measure_approximation",
    "planning",
    "segment_ids_from_cu_seqlens",
    "swap_attention",
    "transfer_attention",
]
