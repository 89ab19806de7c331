"""Feature maps phi of linear attention, whose weights are phi(q) . phi(k).

A map returns `Features(values, exponent)`, standing for values * 2^exponent. The exponent is one integer a token,
taken from that token's own features alone, so that nothing overflows and nothing leaks between positions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .checkpoints import Loadable
from .inputs import check_positive


class Features(NamedTuple):
    """values * 2^exponent[..., None]; an exponent of None is zero."""

    values: Float[Tensor, "*batch length features"]
    exponent: Float[Tensor, "*batch length"] | None


class FeatureMap(Loadable, ABC):
    """Maps queries and keys (..., E) to non-negative features (..., M), in the accumulation dtype."""

    name: str
    has_exponent: bool = False
    """Whether `forward` returns exponents."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "*batch length head_dim"]) -> Features:
        """The features of `x`, which is in the accumulation dtype already."""

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError if the map was built for another size."""

    def num_features(self, head_dim: int) -> int:
        """M for inputs of `head_dim`."""
        return head_dim

    def flops(self, head_dim: int) -> int:
        """FLOPs in matrix products for one token of one head."""
        return 0

    def saved(self, head_dim: int) -> int:
        """Numbers kept for the backward pass for one token of one head, the features excepted.

        Asked of maps that are not in FORMULAS; of the others nothing is kept but the inputs.
        """
        return 0

    def params(self) -> int:
        """How many numbers are learnt."""
        return sum(p.numel() for p in self.parameters())


class Formula(ABC):
    """A feature map as a pure function with a known derivative: what operators compute block by block.

    `projection` is None, or the matrix (M, E) of random features.
    """

    has_exponent: bool = False

    @abstractmethod
    def values(self, x: Tensor, projection: Tensor | None) -> Features:
        """The features of `x`."""

    @abstractmethod
    def pull_back(self, x: Tensor, phi: Features, grad: Tensor, projection: Tensor | None) -> Tensor:
        """The gradient of `x`, given that of the values of `phi`, which is overwritten; exponents are constants."""


class EluPlusOne(FeatureMap):
    """phi(x) = elu(x) + 1 (Katharopoulos et al., "Transformers are RNNs", 2020, arXiv:2006.16236, equation 7).

    Written x + 1 for x > 0 and exp(x) below: elu(x) + 1 would cancel to 0 there in low precision.
    """

    name = "elu"

    def forward(self, x: Tensor) -> Features:
        return _ELU.values(x, None)


class _EluFormula(Formula):
    def values(self, x: Tensor, projection: Tensor | None) -> Features:
        return Features(torch.exp2(x.clamp(max=0) * _LOG2_E) + torch.relu(x), None)

    def pull_back(self, x: Tensor, phi: Features, grad: Tensor, projection: Tensor | None) -> Tensor:
        return grad.mul_(phi.values.clamp(max=1))


class Relu(FeatureMap):
    """phi(x) = max(x, 0); a query whose features are all zero gets a zero row."""

    name = "relu"

    def forward(self, x: Tensor) -> Features:
        return _RELU.values(x, None)


class _ReluFormula(Formula):
    def values(self, x: Tensor, projection: Tensor | None) -> Features:
        return Features(torch.relu(x), None)

    def pull_back(self, x: Tensor, phi: Features, grad: Tensor, projection: Tensor | None) -> Tensor:
        return grad.masked_fill_(x <= 0, 0.0)


class SquaredRelu(FeatureMap):
    """phi(x) = max(x, 0)^2, each token scaled by a power of two so that squares do not overflow."""

    name = "squared_relu"
    has_exponent = True

    def forward(self, x: Tensor) -> Features:
        return _SQUARED_RELU.values(x, None)


class _SquaredReluFormula(Formula):
    has_exponent = True

    def values(self, x: Tensor, projection: Tensor | None) -> Features:
        x = torch.relu(x)
        exponent = torch.ceil(torch.log2(x.detach().amax(-1))).clamp(min=-_LARGEST, max=_LARGEST)
        return Features((x * torch.exp2(-exponent)[..., None]).square(), 2 * exponent)

    def pull_back(self, x: Tensor, phi: Features, grad: Tensor, projection: Tensor | None) -> Tensor:
        assert phi.exponent is not None
        # x 2^-exponent first: its square root would be fine, but not x 2^(-2 exponent).
        scale = torch.exp2(-phi.exponent / 2)[..., None]
        return grad.mul_(torch.relu(x) * scale).mul_(2 * scale)


class Exp(FeatureMap):
    """phi(x) = exp(x), each token scaled by a power of two so that no input overflows."""

    name = "exp"
    has_exponent = True

    def forward(self, x: Tensor) -> Features:
        return _EXP.values(x, None)


class _ExpFormula(Formula):
    has_exponent = True

    def values(self, x: Tensor, projection: Tensor | None) -> Features:
        return from_logarithm(x * _LOG2_E)

    def pull_back(self, x: Tensor, phi: Features, grad: Tensor, projection: Tensor | None) -> Tensor:
        return grad.mul_(phi.values)


_LARGEST = 60.0  # |exponent| for features that are zero or subnormal: 2^60 still squares within fp32
_LOG2_E = math.log2(math.e)


def from_logarithm(log2_phi: Tensor, shift: Tensor | None = None) -> Features:
    """Features 2^(log2_phi - shift), scaled by the power of two that brings each token's largest into (1/2, 1].

    Args:
        log2_phi: (..., M), overwritten.
        shift: (..., 1), zero if None.
    """
    largest = log2_phi.detach().amax(-1, keepdim=True)
    peak = largest if shift is None else largest - shift
    exponent = torch.ceil(peak.detach())
    # One pass: what is taken from each logarithm is its token's largest, but for the rest in (-1, 0].
    return Features(log2_phi.sub_(largest - (peak - exponent)).exp2_(), exponent.squeeze(-1))


class Favor(FeatureMap):
    """Positive orthogonal random features of the softmax or ReLU kernel (FAVOR+).

        softmax: phi_f(x) = exp(w_f . x' - |x'|^2 / 2) / sqrt(M),   relu: phi_f(x) = max(w_f . x', 0) / sqrt(M),
        x' = x E^(-1/4)

    The rows w_f are orthogonal in blocks of E with the norms of Gaussian vectors, so that
    E[phi(q) . phi(k)] = exp(q . k / sqrt(E)) for the softmax kernel.
    Choromanski et al., "Rethinking Attention with Performers", 2020, arXiv:2009.14794, lemma 1 and section 2.4.

    Args:
        head_dim: E.
        num_features: M; the kernel's error falls like 1 / sqrt(M).
        seed: selects the projection; it lives in a buffer and is never redrawn by itself.
        kernel: "softmax" or "relu".
    Raises:
        ValueError: if a size is below 1 or the kernel is unknown.
    """

    projection: Tensor

    def __init__(self, head_dim: int, num_features: int, *, seed: int = 0, kernel: str = "softmax") -> None:
        super().__init__()
        if kernel not in ("softmax", "relu"):
            raise ValueError(f"kernel must be 'softmax' or 'relu', got {kernel!r}")
        self.head_dim = check_positive("head_dim", head_dim)
        self.size = check_positive("num_features", num_features)
        self.seed = check_positive("seed", seed, least=0)
        if seed >= 1 << 63:
            raise ValueError(f"seed must be below 2^63, got {seed}")
        self.kernel = kernel
        self.name = f"favor_{kernel}"
        self.has_exponent = kernel == "softmax"
        self.register_buffer("projection", torch.empty(num_features, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projection of `seed` again, on the device where the buffer is."""
        if not self.projection.is_meta:
            self.projection.copy_(orthogonal_gaussian(self.size, self.head_dim, self.seed))

    def forward(self, x: Tensor) -> Features:
        self.check_head_dim(x.shape[-1])
        return FORMULAS[self.name].values(x, self.projection.to(x.dtype))

    def check_head_dim(self, head_dim: int) -> None:
        if head_dim != self.head_dim:
            raise ValueError(f"head_dim of the mechanism is {self.head_dim}, q and k have {head_dim}")

    def num_features(self, head_dim: int) -> int:
        return self.size

    def flops(self, head_dim: int) -> int:
        return 2 * self.size * head_dim

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, num_features={self.size}, seed={self.seed}, kernel={self.kernel!r}"


class _FavorSoftmax(Formula):
    has_exponent = True

    def values(self, x: Tensor, projection: Tensor | None) -> Features:
        assert projection is not None
        size, width = projection.shape
        x = x * (width**-0.25 * _LOG2_E**0.5)
        # In base 2, with sqrt(log2 e) in x and in the projection.
        log2_phi = x @ (projection * _LOG2_E**0.5).mT
        return from_logarithm(log2_phi, x.square().sum(-1, keepdim=True) / 2 + math.log2(size) / 2)

    def pull_back(self, x: Tensor, phi: Features, grad: Tensor, projection: Tensor | None) -> Tensor:
        assert projection is not None
        scale = projection.shape[1] ** -0.25
        grad = grad.mul_(phi.values)
        return (grad @ projection) * scale - (grad.sum(-1, keepdim=True) * scale**2) * x


class _FavorRelu(Formula):
    def values(self, x: Tensor, projection: Tensor | None) -> Features:
        return Features(torch.relu(self._project(x, projection)), None)

    def pull_back(self, x: Tensor, phi: Features, grad: Tensor, projection: Tensor | None) -> Tensor:
        assert projection is not None
        return (grad.masked_fill_(phi.values <= 0, 0.0) @ projection) * self._scale(projection)

    def _project(self, x: Tensor, projection: Tensor | None) -> Tensor:
        assert projection is not None
        return (x @ projection.mT) * self._scale(projection)

    @staticmethod
    def _scale(projection: Tensor) -> float:
        size, width = projection.shape
        return width**-0.25 * size**-0.5


_ELU, _RELU, _SQUARED_RELU, _EXP = _EluFormula(), _ReluFormula(), _SquaredReluFormula(), _ExpFormula()

FORMULAS: dict[str, Formula] = {
    EluPlusOne.name: _ELU,
    Relu.name: _RELU,
    SquaredRelu.name: _SQUARED_RELU,
    Exp.name: _EXP,
    "favor_softmax": _FavorSoftmax(),
    "favor_relu": _FavorRelu(),
}
"""The maps that operators know, by name."""


def formula_of(phi: FeatureMap) -> str | None:
    """The key of `phi` in FORMULAS; None for a map of somebody else's, a subclass of ours and a learnt projection."""
    if type(phi) not in (EluPlusOne, Relu, SquaredRelu, Exp, Favor):
        return None
    return None if isinstance(phi, Favor) and phi.projection.requires_grad else phi.name


def orthogonal_gaussian(rows: int, columns: int, seed: int) -> Float[Tensor, "rows columns"]:
    """Gaussian vectors made orthogonal within blocks of `columns`, their norms kept; a pure function of `seed`."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    blocks = []
    for _ in range(-(-rows // columns)):
        basis, upper = torch.linalg.qr(gaussian(columns, columns))
        # The sign of R's diagonal makes Q uniform over rotations, whatever the factorisation prefers.
        blocks.append((basis * torch.sign(torch.diagonal(upper))).mT)
    norms = gaussian(rows, columns).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:rows] * norms).to(torch.float32)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {m.name: m for m in (EluPlusOne, Relu, SquaredRelu, Exp)}
