"""timm's vision transformers."""

from __future__ import annotations

import sys
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ..mechanisms.base import Mechanism
from .sites import Site, Undo, layer_number, replace_child


class TimmAttention(nn.Module):
    """timm's `Attention` with a choice of mechanism: the same submodules, so the same state_dict keys.

        out = proj_drop(proj(gate * norm(mechanism(q_norm(q), k_norm(k), v))))    where q, k, v = qkv(x)

    Args:
        old: the module whose submodules this one takes over.
        mechanism: how heads attend.
    """

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    gate: nn.Module | None

    def __init__(self, old: Any, mechanism: Mechanism) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = old.num_heads, old.head_dim, old.attn_dim
        self.scale, self.fused_attn = old.scale, old.fused_attn
        for name, child in old.named_children():
            self.add_module(name, child)
        self.gate = getattr(old, "gate", None)
        self.mechanism = mechanism
        self.train(old.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend among the tokens of `x` (B, N, C).

        Args:
            attn_mask: broadcasts to (B, H, N, N); bool with True = may attend, or added. Full attention only.
            is_causal: must be what the mechanism was built with.
        Raises:
            ValueError: if the mechanism cannot honour a mask.
        """
        if is_causal and not self.mechanism.is_causal:
            raise ValueError(f"is_causal=True needs a causal mechanism, this is {self.mechanism}")
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
        heads = self.mechanism(self.q_norm(q), self.k_norm(k), v, attn_bias=attn_mask)
        out = self.norm(rearrange(heads, "b h n e -> b n (h e)"))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def find(model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """timm's attention modules in `model`; those of another kind cannot be swapped."""
    timm = sys.modules.get("timm.layers")
    plain = None if timm is None else timm.Attention
    sites: list[Site] = []
    others: dict[str, str] = {}
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for path, module in modules:
        if type(module) is plain or isinstance(module, TimmAttention):
            sites.append(
                Site(
                    path=path,
                    module=module,
                    num_heads=module.num_heads,
                    num_kv_heads=module.num_heads,
                    head_dim=module.head_dim,
                    is_causal=False,
                    layer=layer_number(path),
                    dropout=float(module.get_submodule("attn_drop").p),  # type: ignore[arg-type]
                )
            )
        elif type(module).__module__.startswith("timm.") and "Attention" in type(module).__name__:
            others[path] = f"{type(module).__name__} is not timm.layers.Attention"
    return sites, others


def refuse(site: Site, mechanism: Mechanism) -> str | None:
    """Why `mechanism` would be wrong at `site`, if it would."""
    if isinstance(site.module, TimmAttention):
        return "it is swapped already: restore it first"
    if mechanism.is_causal:
        return "the layer is not causal, the mechanism is"
    return None


def install(model: nn.Module, chosen: list[tuple[Site, Mechanism]]) -> Undo:
    """Put a `TimmAttention` in the place of each module."""
    for site, mechanism in chosen:
        mechanism.to(next(site.module.parameters()).device)
        replace_child(model, site.path, TimmAttention(site.module, mechanism))

    def undo() -> None:
        for site, _ in chosen:
            site.module.train(model.get_submodule(site.path).training)
            replace_child(model, site.path, site.module)

    return undo
