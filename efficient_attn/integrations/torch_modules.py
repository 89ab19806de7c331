"""torch's own attention, `nn.MultiheadAttention`, alone or inside its transformer layers."""

from __future__ import annotations

from torch import nn

from ..mechanisms import FullAttention
from ..mechanisms.base import Mechanism
from .sites import Site, Undo, layer_number, replace_child
from .torch_mha import MultiheadAttention

CROSS = "multihead_attn"
"""What nn.TransformerDecoderLayer names its attention to the encoder's output."""


def find(model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """Every `nn.MultiheadAttention` in `model`; a decoder layer's attention to itself counts as causal."""
    sites: list[Site] = []
    others: dict[str, str] = {}
    for path, module in model.named_modules():
        if type(module) is nn.MultiheadAttention or isinstance(module, MultiheadAttention):
            sites.append(_site(model, path, module))
        elif isinstance(module, nn.MultiheadAttention):
            others[path] = (
                f"{type(module).__name__} is a subclass of nn.MultiheadAttention, with code of its own"
            )
    return sites, others


def _site(model: nn.Module, path: str, module: nn.MultiheadAttention | MultiheadAttention) -> Site:
    is_causal = _is_causal(model, path)
    return Site(
        path=path,
        module=module,
        num_heads=module.num_heads,
        num_kv_heads=module.num_heads,
        head_dim=module.head_dim,
        is_causal=is_causal,
        causal_by_mask=is_causal,
        layer=layer_number(path),
        is_cross=path.rpartition(".")[2] == CROSS,
        dropout=module.dropout,
    )


def _is_causal(model: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return name == "self_attn" and isinstance(model.get_submodule(parent), nn.TransformerDecoderLayer)


def refuse(site: Site, mechanism: Mechanism) -> str | None:
    """Why `mechanism` would be wrong at `site`, if it would."""
    module = site.module
    if isinstance(module, MultiheadAttention):
        return "it is swapped already: restore it first"
    if site.is_cross and mechanism.is_causal:
        return "cross-attention cannot be causal"
    if not isinstance(mechanism, FullAttention):
        for name, absent in (("bias_k", None), ("add_zero_attn", False)):
            if getattr(module, name) is not absent:
                return f"only full attention can append to the keys ({name})"
    return None


def install(model: nn.Module, chosen: list[tuple[Site, Mechanism]]) -> Undo:
    """Put a `MultiheadAttention` of ours in the place of each module, and keep encoders from nested tensors."""
    for site, mechanism in chosen:
        replace_child(model, site.path, _replacement(site, mechanism))
    new = {id(model.get_submodule(site.path)) for site, _ in chosen}
    encoders = [
        (encoder, encoder.use_nested_tensor)
        for encoder in model.modules()
        if isinstance(encoder, nn.TransformerEncoder) and new & {id(m) for m in encoder.modules()}
    ]
    for encoder, _ in encoders:
        encoder.use_nested_tensor = False

    def undo() -> None:
        for site, _ in chosen:
            site.module.train(model.get_submodule(site.path).training)
            replace_child(model, site.path, site.module)
        for encoder, nested in encoders:
            encoder.use_nested_tensor = nested

    return undo


def _replacement(site: Site, mechanism: Mechanism) -> MultiheadAttention:
    """Our module with the very parameters of torch's."""
    old = site.module
    assert isinstance(old, nn.MultiheadAttention)
    new = MultiheadAttention(
        old.embed_dim,
        old.num_heads,
        bias=old.in_proj_bias is not None,
        add_bias_kv=old.bias_k is not None,
        add_zero_attn=old.add_zero_attn,
        kdim=old.kdim,
        vdim=old.vdim,
        batch_first=old.batch_first,
        device="meta",
        mechanism=mechanism.to(old.out_proj.weight.device),
    )
    for name, parameter in old.named_parameters(recurse=False):
        setattr(new, name, parameter)
    new.out_proj = old.out_proj
    new.was_self_attention = not site.is_cross
    return new.train(old.training)
