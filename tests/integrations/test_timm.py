"""`swap_attention` on timm's vision transformers."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from efficient_attn import (
    MECHANISMS,
    FullAttention,
    SwapError,
    measure_approximation,
    swap_attention,
    transfer_attention,
)

from .test_swap import EMBED, HEADS, OPTIONS


class Named(type):
    """A class that has whatever member is asked for: its name."""

    def __getattr__(cls, name: str) -> str:
        return name


class Anything(types.ModuleType):
    """A module that has whatever is imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        child = f"{self.__name__}.{name}"
        return sys.modules[child] if child in sys.modules else Named(name, (), {})


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    """timm, with empty modules for torchvision: its models do not need it, and not every torch has a build of it."""
    parts = (
        "",
        ".datasets",
        ".io",
        ".models",
        ".models.feature_extraction",
        ".ops",
        ".ops.misc",
        ".transforms",
    )
    stubs: dict[str, types.ModuleType] = {}
    for part in (*parts, ".transforms.functional"):
        name = "torchvision" + part
        stubs[name] = Anything(name)
        stubs[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        stubs[name].__path__ = []
    sys.modules.update(stubs)
    yield importlib.import_module("timm")
    for name in stubs:
        del sys.modules[name]


def vision(timm: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": EMBED,
        "depth": 2,
        "num_heads": HEADS,
        "num_classes": 5,
    }
    return timm.models.VisionTransformer(**sizes, **options).double().eval()


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}])
def test_full_attention_changes_nothing_in_timm(timm: Any, options: dict[str, Any]) -> None:
    ours, theirs = vision(timm, **options), vision(timm, **options)
    keys = list(ours.state_dict())
    report = swap_attention(ours, "full")
    assert list(ours.state_dict()) == keys
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert (ours(images) - theirs(images)).abs().max() < 1e-12
    ours.load_state_dict(theirs.state_dict(), strict=True)
    report.restore()
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("to", MECHANISMS)
def test_every_mechanism_trains_in_timm(timm: Any, to: str) -> None:
    model = vision(timm).train()
    swap_attention(model, to, **OPTIONS.get(to, {}))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters())


def test_masks_in_timm(timm: Any) -> None:
    module, stock = vision(timm).blocks[0].attn, vision(timm).blocks[0].attn
    holder = nn.ModuleDict({"attn": module})
    swap_attention(holder, "full")
    x, mask = torch.randn(2, 7, EMBED, dtype=torch.float64), torch.rand(7, 7) < 0.7
    mask.fill_diagonal_(True)
    assert (holder["attn"](x, attn_mask=mask) - stock(x, attn_mask=mask)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="is_causal=True needs a causal mechanism"):
        holder["attn"](x, is_causal=True)
    other = nn.ModuleDict({"attn": stock})
    swap_attention(other, "linear")
    with pytest.raises(ValueError, match="cannot honour attn_bias"):
        other["attn"](x, attn_mask=mask)
    with pytest.raises(SwapError, match="the layer is not causal, the mechanism is"):
        swap_attention(
            nn.ModuleDict({"attn": vision(timm).blocks[0].attn}), lambda site: FullAttention(is_causal=True)
        )


@torch.no_grad()
def test_errors_in_timm_are_those_between_the_heads_of_the_two_models(timm: Any) -> None:
    model, stock = vision(timm), vision(timm)
    for each in (model, stock):
        for block in each.blocks:
            block.attn.qkv.weight.mul_(30)
    swap_attention(model, "longformer", window_size=3, global_tokens=1)
    images, merged = torch.randn(2, 3, 16, 16, dtype=torch.float64), []
    for each in (model, stock):
        hook = each.blocks[0].attn.proj.register_forward_pre_hook(lambda module, args: merged.append(args[0]))
        each(images)
        hook.remove()
    by_hand = float((merged[0] - merged[1]).norm() / merged[1].norm())
    first, second = measure_approximation(model, images).layers
    assert first.name == "blocks.0.attn.mechanism"
    assert first.error == pytest.approx(by_hand, rel=1e-6)
    assert first.error > 0.05
    report = transfer_attention(model, [images], steps=20, lr=1e-3, projections=True)
    assert report.before[first.name] == pytest.approx(by_hand, rel=1e-6)
    assert all(report.after[name] < report.before[name] for name in (first.name, second.name))
    assert {name.split(".")[3] for name in report.trained} == {"qkv"}
