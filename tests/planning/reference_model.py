"""The transformer that `planning.Model` describes, written in torch: what descriptions are held against."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from efficient_attn import Attention
from efficient_attn.planning import Model


class Ffn(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        wide, narrow = model.ffn_dim, model.embed_dim
        self.gate = nn.Linear(narrow, wide, bias=model.bias) if model.gated_ffn else None
        self.up = nn.Linear(narrow, wide, bias=model.bias)
        self.down = nn.Linear(wide, narrow, bias=model.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Rms(torch.autograd.Function):
    """x / rms(x) * weight, keeping x and one number a row, as the fused kernels of GPUs do and torch's CPU code not."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        inverse = x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, inverse = ctx.saved_tensors
        normed, scaled = x * inverse, grad * weight
        inner = (scaled * normed).mean(-1, keepdim=True)
        return ((scaled - normed * inner) * inverse).to(x.dtype), (grad * normed).flatten(0, -2).sum(0)


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return Rms.apply(x, self.weight)


def norm(model: Model) -> nn.Module:
    kinds = {"layer": nn.LayerNorm, "rms": RmsNorm, "none": lambda width: nn.Identity()}
    return kinds[model.norm](model.embed_dim)


class Layer(nn.Module):
    def __init__(self, model: Model, number: int, seq_len: int) -> None:
        super().__init__()
        mechanism = model.build(model.layer_mechanisms[number], seq_len)
        if any(x.is_meta for x in (*mechanism.parameters(), *mechanism.buffers())):
            mechanism.to_empty(device="cpu").reset_parameters()
        self.attention = Attention(
            model.embed_dim,
            model.num_heads,
            mechanism,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            bias=model.bias,
        )
        self.norm_1, self.norm_2 = norm(model), norm(model) if model.ffn_dim else None
        self.ffn = Ffn(model) if model.ffn_dim else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x if self.ffn is None or self.norm_2 is None else x + self.ffn(self.norm_2(x))


class Transformer(nn.Module):
    """A causal model gives the logits of every token in training mode, else of the last one."""

    def __init__(self, model: Model, seq_len: int, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.model, self.checkpointing = model, checkpointing
        self.embedding = nn.Embedding(model.vocab_size, model.embed_dim)
        self.positions = nn.Embedding(model.max_positions, model.embed_dim) if model.max_positions else None
        self.layers = nn.ModuleList(Layer(model, number, seq_len) for number in range(model.num_layers))
        self.norm = norm(model)
        self.head = nn.Linear(model.embed_dim, model.vocab_size, bias=False)
        if model.tied_embeddings:
            self.head.weight = self.embedding.weight
        self.to(model.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        x = x if self.training else x[:, -1:]
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


def sample_tokens(model: Model, batch: int, seq_len: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (batch, seq_len + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
