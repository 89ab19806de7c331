"""Dropout where one-hot values do not show the weights: behind a compression."""

from __future__ import annotations

import pytest
import torch

from efficient_attn import LinformerAttention

LENGTH, HEADS, HEAD_DIM, SEEDS = 24, 4, 8, 20


@pytest.mark.parametrize("sharing", ["headwise", "key-value", "none"])
def test_linformer_keeps_its_share_of_compressed_weights(sharing, record_property):
    """With F^T F = I, the output for one-hot values is weights F^T, and times F it is the weights."""
    mechanism = LinformerAttention(LENGTH, HEADS, rank=9, sharing=sharing).double()
    for projection in mechanism.parameters():
        for head in projection.data.view(-1, LENGTH, 9):
            torch.nn.init.orthogonal_(head)
    f = mechanism.key_projection if mechanism.value_projection is None else mechanism.value_projection
    q, k = (torch.randn(2, HEADS, LENGTH, HEAD_DIM, dtype=torch.float64) for _ in range(2))
    v = torch.eye(LENGTH, dtype=torch.float64).expand(2, HEADS, -1, -1)
    clean = mechanism(q, k, v) @ f
    mechanism.train()
    for p in (0.1, 0.3, 0.5):
        mechanism.dropout_p = p
        kept = total = 0
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            left = mechanism(q, k, v) @ f
            alive = left.abs() > 1e-9
            torch.testing.assert_close(left[alive], clean[alive] / (1 - p))
            kept, total = kept + int(alive.sum()), total + alive.numel()
        assert abs(kept / total - (1 - p)) <= 5 * (p * (1 - p) / total) ** 0.5
    record_property("cases", 3 * SEEDS)
