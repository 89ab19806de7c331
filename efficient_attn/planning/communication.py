"""What ranks send each other when a sequence is split among them."""

from __future__ import annotations

import math

from ..inputs import accumulation_dtype, check_positive
from ..layers import Attention
from ..mechanisms import LinearMechanism
from .models import Model, as_model


def sent_bytes(model: Model | Attention, batch: int, seq_len: int, ranks: int) -> int:
    """Bytes that each of `ranks` sends in a forward pass under context parallelism, all layers together.

    The formula `complexity.sent` of every layer, for each batch row and key-value head: keys and values in the dtype
    of the model, states of linear attention in that of sums. Derived from the algorithms that it cites; no run on
    several ranks stands behind it.

    Args:
        model: a description, or an `Attention` layer, alone.
        batch: sequences.
        seq_len: tokens of each, over all ranks.
        ranks: among which every sequence is split evenly.
    Raises:
        ValueError: if a size is out of range.
    """
    model = as_model(model)
    check_positive("batch", batch, least=0)
    check_positive("seq_len", seq_len)
    check_positive("ranks", ranks)
    total = 0
    for mechanism, count in model.built_mechanisms(seq_len):
        numbers = math.ceil(mechanism.evaluate("sent", seq_len, model.head_dim, ranks=ranks))
        dtype = accumulation_dtype(model.dtype) if isinstance(mechanism, LinearMechanism) else model.dtype
        total += count * batch * model.num_kv_heads * numbers * dtype.itemsize
    return total
