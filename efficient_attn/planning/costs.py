"""What a whole model costs: FLOPs, traffic and memory, by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from ..complexity import Cost, Flops, Shape
from ..complexity.cost import BASES, PHASES, check_choice
from ..feature_maps import formula_of
from ..inputs import check_flag, check_positive
from ..kernels.availability import MAX_HEAD_DIM
from ..kernels.chunked_linear.configs import LARGEST_PROJECTED
from ..layers import Attention
from ..mechanisms import LinearMechanism, Mechanism
from .devices import TYPES
from .models import Model, as_model

OPTIMIZERS = ("adamw", "sgd", "none")
INDEX_BYTES = 8
"""Of a token's number: int64."""
STATISTIC_BYTES = 4
"""Of what a norm keeps of each row: fp32."""


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes held at the worst moment, by what they are for; they sum to `total`.

    Attributes:
        weights: parameters.
        gradients: of the parameters, in their dtype; 0 unless training.
        optimizer: its state; 0 unless training.
        activations: kept for the backward pass; 0 unless training.
        workspace: what comes and goes while the most is held.
        state: the decode state of every layer; 0 unless the model is causal and not training.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    state: int

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self.as_dict().values())

    @property
    def largest(self) -> str:
        """The name of the largest one."""
        terms = self.as_dict()
        return max(terms, key=lambda name: terms[name])

    def as_dict(self) -> dict[str, int]:
        """The terms by name, in the order of the page."""
        return asdict(self)


@dataclass(frozen=True)
class ModelCost:
    """What a call of a model costs.

    Attributes:
        parts: a `Cost` for each part, all layers together: "attention" (the mechanisms), "projections", "ffn",
            "norms", "embedding", "head". Parts that the model lacks are left out.
        memory: bytes held at the worst moment.
    """

    parts: dict[str, Cost]
    memory: MemoryNeeds

    @property
    def total(self) -> Cost:
        """The parts one after another; its peak is that of activations, without parameters and what belongs to them."""
        whole = sum(self.parts.values(), Cost(Flops(0)))
        held = self.memory.activations + self.memory.workspace
        return replace(
            whole,
            saved_bytes=self.memory.activations,
            transient_bytes=self.memory.workspace,
            peak_bytes=held,
        )


@dataclass(frozen=True)
class _Call:
    """The checked arguments of `model_cost`."""

    model: Model
    batch: int
    seq_len: int
    training: bool
    checkpointing: bool
    phase: str
    basis: str
    device_type: str

    @property
    def tokens(self) -> int:
        """Tokens that go through the layers."""
        return self.batch * (1 if self.phase == "decode" else self.seq_len)

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return self.model.dtype.itemsize

    @property
    def stream_bytes(self) -> int:
        """Of the numbers that go from layer to layer."""
        return self.tokens * self.model.embed_dim * self.item

    @property
    def logit_rows(self) -> int:
        """Tokens whose successors are predicted."""
        return self.tokens if self.training else self.batch


def model_cost(
    model: Model | Attention,
    batch: int,
    seq_len: int,
    *,
    training: bool = False,
    checkpointing: bool = False,
    phase: str = "prefill",
    basis: str = "model",
    optimizer: str = "adamw",
    device_type: str = "cuda",
) -> ModelCost:
    """What one call of `model` on `batch` sequences of `seq_len` tokens costs.

    Memory is that of eager PyTorch in one dtype: each part keeps its inputs for the backward pass, a log-softmax is
    kept of the logits, and gradients of all parameters are held while activations are, as when they accumulate.

    Args:
        model: a description, or an `Attention` layer, alone.
        batch: sequences.
        seq_len: tokens of each.
        training: count the backward pass, and what it needs. Logits are then those of every token, and a loss
            follows; otherwise those of the last token, as generation needs.
        checkpointing: keep of each layer its input alone, and compute the rest again in the backward pass, but for its
            last product (Chen et al. 2016, arXiv:1604.06174). Only with `training`.
        phase: "prefill" for the whole sequence, "decode" for one more token, the last of `seq_len`.
        basis: "model", "hardware" or "torch", see `Mechanism.cost`.
        optimizer: "adamw": two moments in fp32, and a copy of weights of 16 bits in fp32 (Rajbhandari et al. 2020,
            arXiv:1910.02054, section 3.1); "sgd": that copy alone; "none".
        device_type: whose backends are counted: "cuda" (Triton's kernels where there are such), "rocm" or "cpu".
    Raises:
        ValueError: for sizes or names out of range, and for options that do not go together.
        TypeError: if model is neither a Model nor an Attention.
    """
    model = as_model(model)
    check_positive("batch", batch, least=0)
    check_positive("seq_len", seq_len, least=0)
    check_flag("training", training)
    check_flag("checkpointing", checkpointing)
    for name, value, allowed in (
        ("phase", phase, PHASES), ("basis", basis, BASES), ("optimizer", optimizer, OPTIMIZERS),
        ("device_type", device_type, TYPES),
    ):  # fmt: skip
        check_choice(name, value, allowed)
    if training and phase == "decode":
        raise ValueError("phase must be 'prefill' when training, got 'decode'")
    if checkpointing and not training:
        raise ValueError("checkpointing must be False without training: there is no backward pass")
    if phase == "decode" and seq_len == 0:
        raise ValueError("seq_len must be >= 1 when decoding: the new token counts, got 0")
    call = _Call(model, batch, seq_len, training, checkpointing, phase, basis, device_type)
    layers = _layers(call)
    parts = _parts(call, layers)
    return ModelCost(parts, _memory(call, layers, parts, optimizer))


@dataclass(frozen=True)
class _Layers:
    """Layers of one kind: what one of them costs, by part, and how many there are."""

    attention: Cost
    projections: Cost
    ffn: Cost
    norms: Cost
    count: int

    @property
    def saved_bytes(self) -> int:
        """Kept by one layer."""
        return sum(part.saved_bytes for part in (self.attention, self.projections, self.ffn, self.norms))


def _layers(call: _Call) -> list[_Layers]:
    norms = _norm(call) * (0 if call.model.norm == "none" else 1 + (call.model.ffn_dim > 0))
    ffn, projections = _ffn(call), _projections(call)
    return [
        _Layers(_attention(call, mechanism), projections, ffn, norms, count)
        for mechanism, count in call.model.built_mechanisms(call.seq_len)
    ]


def _parts(call: _Call, layers: list[_Layers]) -> dict[str, Cost]:
    model, parts = call.model, {}
    for name in ("attention", "projections", "ffn", "norms"):
        part = sum((getattr(kind, name) * kind.count for kind in layers), Cost(Flops(0)))
        parts[name] = (
            _checkpointed(part, "down" if model.ffn_dim else "out_proj") if call.checkpointing else part
        )
    if model.norm != "none":
        parts["norms"] += _norm(call)
    else:
        del parts["norms"]
    if not model.ffn_dim:
        del parts["ffn"]
    if model.vocab_size:
        parts |= {"embedding": _embedding(call), "head": _head(call)}
    return parts


def _checkpointed(part: Cost, last: str) -> Cost:
    """`part` computed twice, but for `last`, the last product of a layer, whose result nothing needs again.

    What is kept, the layers' inputs, stands in `_memory`.
    """
    computed = part.flops.forward - part.terms.get(last, 0)
    again = replace(part.flops, recompute=part.flops.recompute + computed)
    return replace(part, flops=again, saved_bytes=0)


def planned_backend(mechanism: Mechanism, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """The backend that "auto" is taken to choose on a device; None for the mechanism's own choice."""
    if device_type != "cuda" or mechanism.backend != "auto" or dtype == torch.float64:
        return None
    if not any(backend.name == "triton" for backend in mechanism.backends):
        return None
    largest = MAX_HEAD_DIM
    if isinstance(mechanism, LinearMechanism):
        if formula_of(mechanism.feature_map) is None:
            return None
        if getattr(mechanism.feature_map, "projection", None) is not None:
            largest = LARGEST_PROJECTED
    return "triton" if head_dim <= largest else None


def _attention(call: _Call, mechanism: Mechanism) -> Cost:
    model, decode = call.model, call.phase == "decode"
    shape = Shape(
        call.batch, model.num_heads, 1 if decode else call.seq_len, call.seq_len, model.head_dim,
        num_kv_heads=model.num_kv_heads, dtype=model.dtype,
    )  # fmt: skip
    backend = planned_backend(mechanism, call.device_type, model.dtype, model.head_dim)
    return mechanism.cost(shape, training=call.training, phase=call.phase, basis=call.basis, backend=backend)


def _products(call: _Call, sizes: tuple[tuple[str, int, int], ...]) -> Cost:
    total = Cost(Flops(0))
    for name, in_features, out_features in sizes:
        total += Cost.of_product(
            name, call.tokens, in_features, out_features,
            bias=call.model.bias, itemsize=call.item, training=call.training,
        )  # fmt: skip
    return total


def _projections(call: _Call) -> Cost:
    """Saved are the tokens and the merged heads; queries, keys and values are the mechanism's."""
    merged = call.tokens * call.model.num_heads * call.model.head_dim * call.item
    saved = (call.stream_bytes + merged) * call.training
    return replace(_products(call, call.model.projection_sizes), saved_bytes=saved)


def _ffn(call: _Call) -> Cost:
    """Saved are the tokens, and hidden features: before and after gelu; or gate, silu(gate), up and their product."""
    model = call.model
    hidden = call.tokens * model.ffn_dim * call.item
    saved = (call.stream_bytes + hidden * (4 if model.gated_ffn else 2)) * call.training
    return replace(_products(call, model.ffn_sizes), saved_bytes=saved if model.ffn_dim else 0)


def _norm(call: _Call) -> Cost:
    """Saved are the input, and of each row the mean and the inverse deviation, or the latter alone."""
    numbers = 2 if call.model.norm == "layer" else 1
    params = numbers * call.model.embed_dim
    saved = call.stream_bytes + call.tokens * numbers * STATISTIC_BYTES
    return Cost(
        Flops(0),
        bytes_read=call.stream_bytes + params * call.item,
        bytes_written=call.stream_bytes,
        params=params,
        saved_bytes=saved * call.training,
    )


def _embedding(call: _Call) -> Cost:
    model = call.model
    indices = call.tokens * INDEX_BYTES
    return Cost(
        Flops(0),
        bytes_read=call.stream_bytes * (2 if model.max_positions else 1) + indices,
        bytes_written=call.stream_bytes,
        params=(model.vocab_size + model.max_positions) * model.embed_dim,
        saved_bytes=indices * call.training,
    )


def _head(call: _Call) -> Cost:
    """Saved are its input, the log-softmax of its output, and the targets."""
    model = call.model
    product = Cost.of_product(
        "head", call.logit_rows, model.embed_dim, model.vocab_size,
        bias=False, itemsize=call.item, training=call.training,
    )  # fmt: skip
    row = (model.embed_dim + model.vocab_size) * call.item + INDEX_BYTES
    saved = (call.logit_rows * row + call.item) * call.training  # with the sum of the rows' weights
    return replace(
        product,
        params=0 if model.tied_embeddings else product.params,
        saved_bytes=saved,
    )


def _memory(call: _Call, layers: list[_Layers], parts: dict[str, Cost], optimizer: str) -> MemoryNeeds:
    params = sum(part.params for part in parts.values())
    weights = params * call.item
    activations = sum(part.saved_bytes for part in parts.values())
    if call.checkpointing:
        activations += call.stream_bytes * call.model.num_layers
    return MemoryNeeds(
        weights=weights,
        gradients=weights * call.training,
        optimizer=params * _optimizer_bytes(optimizer, call.model.dtype) * call.training,
        activations=activations,
        workspace=_workspace(call, layers, parts),
        state=0 if call.training else sum(part.state_bytes for part in parts.values()),
    )


def _optimizer_bytes(optimizer: str, dtype: torch.dtype) -> int:
    """Bytes a parameter: moments in fp32 (fp64 for fp64), and a copy of weights that are coarser than that."""
    width = max(4, dtype.itemsize)
    copy = width if dtype.itemsize < width else 0
    return {"adamw": 2 * width + copy, "sgd": copy, "none": 0}[optimizer]


def _workspace(call: _Call, layers: list[_Layers], parts: dict[str, Cost]) -> int:
    """The most that is held beside what is kept.

    Training: logits and their gradient while everything is kept; or one layer in its backward pass, when what the
    head kept is gone already, and so is what its feed-forward network kept once attention is reached.
    """
    head = _head_workspace(call)
    if not call.training:
        return max(head, *(_forward_workspace(call, kind) for kind in layers))
    gone = parts["head"].saved_bytes if "head" in parts else 0
    held = []
    for kind in layers:
        recomputed = kind.saved_bytes if call.checkpointing else 0
        attention, ffn = _backward_workspaces(call, kind)
        held += [recomputed + ffn - gone, recomputed + attention - gone - kind.ffn.saved_bytes]
    return max(head, *held)


def _backward_workspaces(call: _Call, layer: _Layers) -> tuple[int, int]:
    """Of attention and of the feed-forward network: the gradients of the stream, of inputs and of hidden features."""
    model, stream = call.model, 3 * call.stream_bytes
    merged = call.tokens * model.num_heads * model.head_dim * call.item
    hidden = call.tokens * model.ffn_dim * call.item
    return stream + merged + layer.attention.transient_bytes, stream + hidden * (3 if model.gated_ffn else 2)


def _forward_workspace(call: _Call, layer: _Layers) -> int:
    """The stream, and the larger of what attention computes of it, and the hidden features."""
    model = call.model
    merged = call.tokens * model.num_heads * model.head_dim * call.item
    qkv = merged + 2 * call.tokens * model.num_kv_heads * model.head_dim * call.item
    hidden = call.tokens * model.ffn_dim * call.item
    attention = qkv + layer.attention.peak_bytes + merged
    return 3 * call.stream_bytes + max(attention, hidden * (3 if model.gated_ffn else 2))


def _head_workspace(call: _Call) -> int:
    """Logits beside what is computed of them: their log-softmax, or backward its gradient."""
    logits = call.logit_rows * call.model.vocab_size * call.item
    return (2 * logits if call.training else logits) + 2 * call.stream_bytes
