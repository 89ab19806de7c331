"""States that travel: into another seed, through safetensors, from other versions, and damaged on the way."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from efficient_attn import MECHANISMS, Attention, LinformerAttention, Mechanism, PerformerAttention

WIDTH, HEADS, HEAD_DIM, LENGTH = 32, 4, 8, 37
TRUNCATED = (RuntimeError, ValueError, OSError, EOFError, UnpicklingError, SafetensorError)


def performer(seed: int, **options: Any) -> PerformerAttention:
    return PerformerAttention(HEAD_DIM, num_features=12, seed=seed, **options)


def linformer() -> LinformerAttention:
    return LinformerAttention(LENGTH, HEADS, rank=5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads() -> list[Tensor]:
    return [normal(2, HEADS, LENGTH, HEAD_DIM, seed=seed) for seed in range(3)]


def values_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


def maker(cls: type[Mechanism], number: int) -> Callable[[], Mechanism]:
    return lambda: cls.examples(LENGTH, HEADS, HEAD_DIM)[number]


EXAMPLES = {
    f"{name}{number}": maker(cls, number)
    for name, cls in MECHANISMS.items()
    for number in range(len(cls.examples(LENGTH, HEADS, HEAD_DIM)))
}


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"kernel": "relu"}], ids=str)
def test_a_performer_with_the_state_of_another_seed_is_that_performer(options, record_property):
    source, target = performer(0, **options), performer(1, **options)
    inputs = heads()
    assert not torch.equal(source(*inputs), target(*inputs))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(*inputs), target(*inputs))
    assert torch.equal(source.matrix(*inputs[:2]), target.matrix(*inputs[:2]))
    for twin in (copy.deepcopy(target), target.double().float()):
        assert torch.equal(source(*inputs), twin(*inputs))
    target.reset_parameters()
    assert torch.equal(target(*inputs), performer(1, **options)(*inputs)), "its own seed, drawn again"
    record_property("cases", 5)


@pytest.mark.parametrize("make", EXAMPLES.values(), ids=EXAMPLES)
def test_safetensors_round_trip(make, tmp_path, record_property):
    layer, other = (Attention(WIDTH, HEADS, make()) for _ in range(2))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    with torch.no_grad():
        for x in (*other.parameters(), *other.buffers()):
            x.fill_(0.5)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
    x = normal(2, LENGTH, WIDTH)
    assert torch.equal(layer(x), other(x))
    with torch.device("meta"):
        lazy = Attention(WIDTH, HEADS, make())
    lazy.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True, assign=True)
    assert torch.equal(layer(x), lazy(x))
    record_property("cases", 2)


# Versions. A state dict knows the version of each module; safetensors keeps none.

STATEFUL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "performer": (lambda: performer(0), "feature_map"),
    "linformer": (linformer, ""),
    "layer around performer": (lambda: Attention(WIDTH, HEADS, performer(0)), "mechanism.feature_map"),
    "layer around linformer": (lambda: Attention(WIDTH, HEADS, linformer()), "mechanism"),
    "layer": (lambda: Attention(WIDTH, HEADS, linformer()), ""),
}
"""Modules with something to load, and the module inside whose version is changed."""


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_state_of_a_newer_version_is_refused(kind):
    make, inside = STATEFUL[kind]
    state: Any = make().state_dict()
    state._metadata[inside]["version"] = 99
    module = make()
    before = values_of(module)
    with pytest.raises(
        RuntimeError, match=rf"{inside or type(module).__name__} is of version 99, .* up to 1"
    ):
        module.load_state_dict(state)
    assert_unchanged(module, before)


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_state_of_an_older_version_or_of_none_loads(kind, record_property):
    make, inside = STATEFUL[kind]
    source = make()
    for version in (0, 1, None):
        state: Any = source.state_dict()
        if version is None:
            state = dict(state)
        else:
            state._metadata[inside]["version"] = version
        module = make()
        module.load_state_dict(state)
        assert_unchanged(module, values_of(source))
    record_property("cases", 3)


# Damage. torch copies what fits and raises afterwards; here nothing is changed by what cannot be loaded whole.


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert [name for name, x in after.items() if not torch.equal(x, before[name])] == []


def lacks(state: dict[str, Tensor], name: str) -> None:
    del state[name]


def has_another_shape(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name][:-1]


def has_one_more(state: dict[str, Tensor], name: str) -> None:
    state[f"{name}_of_another"] = state.pop(name)


def holds_nan(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name].clone().index_fill_(0, torch.tensor([1]), torch.nan)


def holds_infinity(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name].clone().index_fill_(0, torch.tensor([2]), -torch.inf)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "performer": (lambda: performer(0), ("feature_map.projection",)),
    "linformer": (linformer, ("key_projection", "value_projection")),
    "layer around performer": (
        lambda: Attention(WIDTH, HEADS, performer(0)),
        ("mechanism.feature_map.projection", "v_proj.weight", "out_proj.bias"),
    ),
    "layer around linformer": (
        lambda: Attention(WIDTH, HEADS, linformer()),
        ("mechanism.value_projection", "q_proj.weight"),
    ),
}
DAMAGE = [
    (kind, name, damage)
    for kind, (_, names) in MODULES.items()
    for name in names
    for damage in (lacks, has_another_shape, has_one_more)
] + [
    (kind, name, damage)
    for kind, (_, names) in MODULES.items()
    for name in names
    for damage in (holds_nan, holds_infinity)
    # Of a parameter it may be true: training can diverge.
    if name.endswith("feature_map.projection")
]


@pytest.mark.parametrize(("kind", "name", "damage"), DAMAGE, ids=lambda x: getattr(x, "__name__", x))
def test_a_damaged_state_is_refused_by_name_and_nothing_is_loaded(kind, name, damage, record_property):
    make, _ = MODULES[kind]
    for assign in (False, True):
        state = values_of(make())
        for x in state.values():
            x.add_(1)
        damage(state, name)
        module = make()
        before, tensors = values_of(module), dict(module.named_parameters())
        with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
            module.load_state_dict(state, assign=assign)
        assert_unchanged(module, before)
        assert all(x is tensors[key] for key, x in module.named_parameters()), "a parameter was replaced"
    record_property("cases", 2)


def test_a_damaged_projection_is_named_within_a_whole_model():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Attention(WIDTH, HEADS, performer(0)))
    name = "1.mechanism.feature_map.projection"
    state = model.state_dict() | {name: torch.full((12, HEAD_DIM), torch.nan)}
    with pytest.raises(RuntimeError, match=r"1\.mechanism\.feature_map\.projection is damaged: not finite"):
        model.load_state_dict(state)
    assert model(normal(2, LENGTH, WIDTH)).isfinite().all()


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_a_truncated_file_is_refused_and_nothing_is_loaded(form, tmp_path, record_property):
    module = Attention(WIDTH, HEADS, performer(0))
    before = values_of(module)
    content = serialise(form, {name: x + 1 for name, x in before.items()}, tmp_path)
    stops = [0, 1, 8, 100, len(content) // 3, len(content) // 2, len(content) - 200, len(content) - 1]
    for stop in stops:
        path = tmp_path / f"{stop}.{form}"
        path.write_bytes(content[:stop])
        with pytest.raises(TRUNCATED):
            module.load_state_dict(
                load_file(path) if form == "safetensors" else torch.load(path, weights_only=True)
            )
        assert_unchanged(module, before)
    record_property("cases", len(stops))


def serialise(form: str, state: dict[str, Tensor], folder: Path) -> bytes:
    if form == "safetensors":
        save_file(state, folder / "whole")
        return (folder / "whole").read_bytes()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
