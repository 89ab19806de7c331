"""performer-pytorch, linformer and local-attention, each called as its README shows, on the inputs of ours.

They compute the same as ours where they can: performer-pytorch gets our projection, linformer our E and F, and
local-attention a window that sees exactly the same keys.
"""

from __future__ import annotations

import contextlib
import io

import torch
from torch import Tensor, nn

from efficient_attn import (
    LinformerAttention,
    LongformerAttention,
    PerformerAttention,
    SlidingWindowAttention,
)
from efficient_attn.benchmarking.contender import Contender
from efficient_attn.benchmarking.worker import Unsupported

from .contender import Race, needed


def performer_pytorch(race: Race) -> Contender:
    """FastAttention with our random projection. Its features are not those of the paper: see the remark."""
    module, ours = needed("performer-pytorch", "performer_pytorch"), race.mechanism
    if not (isinstance(ours, PerformerAttention) and ours.kernel == "softmax"):
        raise Unsupported("compared for the Performer with the softmax kernel")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has no CUDA code
        theirs = module.FastAttention(
            race.cell.head_dim, nb_features=ours.feature_map.size, causal=ours.is_causal
        ).to(race.q)
    theirs.projection_matrix.copy_(ours.feature_map.projection)
    remark = "divides keys by the largest feature of the whole sequence, the future included, then adds 1e-4 to each"
    return Contender(lambda: theirs(*race.inputs), race.inputs, ours, remark=remark)


class _Given(nn.Module):
    """A projection that has been made already."""

    def __init__(self, projected: Tensor) -> None:
        super().__init__()
        self.projected = projected

    def forward(self, x: Tensor) -> Tensor:
        return self.projected


def linformer(race: Race) -> Contender:
    """LinformerSelfAttention with our E and F, and its four projections of tokens left out."""
    module, ours = needed("linformer", "linformer"), race.mechanism
    if not (isinstance(ours, LinformerAttention) and ours.value_projection is not None):
        raise Unsupported("compared for Linformer with one E and one F for all heads")
    batch, heads, length, dim = race.q.shape
    q, k, v = (x.detach().transpose(1, 2).reshape(batch, length, -1) for x in race.inputs)
    for x in (q, k, v):
        x.requires_grad_(race.q.requires_grad)
    theirs = module.LinformerSelfAttention(heads * dim, ours.max_seq_len, k=ours.rank, heads=heads).to(q)
    theirs.to_q, theirs.to_k, theirs.to_v = _Given(q), _Given(k), _Given(v)
    theirs.to_out = nn.Identity()
    with torch.no_grad():
        theirs.proj_k.copy_(ours.key_projection)
        theirs.proj_v.copy_(ours.value_projection)

    def to_heads(x: Tensor) -> Tensor:
        return x.view(batch, length, heads, dim).transpose(1, 2)

    return Contender(
        lambda: theirs(q),
        (q, k, v, theirs.proj_k, theirs.proj_v),
        ours,
        to_heads,
        remark="its own layout (B, L, H E)",
    )


def local_attention(race: Race) -> Contender:
    """LocalAttention(exact_windowsize=True): |i - j| <= window_size * look_backward, so 255 for a window of 256.

    255 = 51 * 5 = 85 * 3: of the buckets that fit, the fastest here. With Longformer it computes the band alone.
    """
    module, ours = needed("local-attention", "local_attention"), race.mechanism
    if not isinstance(ours, SlidingWindowAttention | LongformerAttention) or ours.window_size != 256:
        raise Unsupported("compared for windows of 256")
    causal = ours.is_causal
    size, look = (51, 5) if causal else (85, 3)
    theirs = module.LocalAttention(
        size,
        causal=causal,
        look_backward=look,
        look_forward=0 if causal else look,
        exact_windowsize=True,
        autopad=True,
        use_rotary_pos_emb=False,
    )
    # Its own padding is visible from the last rows, unless there is a mask or causality.
    mask = (
        None
        if causal
        else torch.ones(race.q.shape[0], race.q.shape[2], dtype=torch.bool, device=race.q.device)
    )
    remark = f"window_size={size}, look_backward={look}, exact_windowsize=True"
    if isinstance(ours, LongformerAttention):
        remark += "; the band alone, without global tokens"
    return Contender(
        lambda: theirs(*race.inputs, mask=mask),
        race.inputs,
        SlidingWindowAttention(256, is_causal=causal),
        remark=remark,
    )
