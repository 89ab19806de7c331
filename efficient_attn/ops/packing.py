"""Packed documents as sorted positions."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import LinearProblem, segments_of_queries


class Packing:
    """Documents side by side: positions sorted by segment, stably, so that the order within one stays."""

    def __init__(self, p: LinearProblem) -> None:
        assert p.segment_ids is not None
        self.length, self.num_keys = p.q.shape[2], p.k.shape[2]
        self.order = p.segment_ids.argsort(dim=1, stable=True)
        self.segment = p.segment_ids.gather(1, self.order)
        positions = torch.arange(self.num_keys, device=p.q.device)
        self.query_at = positions - p.q_offset
        self.position_of = torch.arange(self.length, device=p.q.device) + p.q_offset
        self.own = segments_of_queries(p.segment_ids, self.length, p.q_offset) >= 0

    def keys(self, x: Tensor) -> Tensor:
        """x (B, H, S, ...) in sorted order."""
        return self._gather(x, self.order)

    def queries(self, x: Tensor) -> Tensor:
        """x (B, H, L, E) moved to the positions that the queries stand at, zero elsewhere, in sorted order."""
        there = (self.query_at >= 0) & (self.query_at < self.length)
        one_more = torch.nn.functional.pad(x, (0, 0, 0, 1))
        return self.keys(one_more[:, :, torch.where(there, self.query_at, self.length)])

    def outputs(self, x: Tensor) -> Tensor:
        """Back from sorted positions to queries; zero where a query is padding."""
        x = self._gather(x, self.order.argsort(dim=1))[:, :, self.position_of.clamp(0, self.num_keys - 1)]
        return torch.where(self.own[:, None, :, None], x, 0.0)

    @staticmethod
    def _gather(x: Tensor, index: Tensor) -> Tensor:
        index = index[(slice(None), None, slice(None), *[None] * (x.dim() - 3))]
        return x.gather(2, index.expand(x.shape))
