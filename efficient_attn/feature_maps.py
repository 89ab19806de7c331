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
from torch import Tensor, nn

from .inputs import check_positive


class Features(NamedTuple):
    """values * 2^exponent[..., None]; an exponent of None is zero."""

    values: Float[Tensor, "*batch length features"]
    exponent: Float[Tensor, "*batch length"] | None


class FeatureMap(nn.Module, ABC):
    """Maps queries and keys (..., E) to non-negative features (..., M), in the accumulation dtype."""

    name: str
    has_exponent: bool = False
    """Whether `forward` returns exponents."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "*batch length head_dim"]) -> Features:
        """The features of `x`, which is in the accumulation dtype already."""

    def num_features(self, head_dim: int) -> int:
        """M for inputs of `head_dim`."""
        return head_dim

    def flops(self, head_dim: int) -> int:
        """FLOPs in matrix products for one token of one head."""
        return 0

    def saved(self, head_dim: int) -> int:
        """Numbers kept for the backward pass for one token of one head, the features excepted."""
        return 0

    def cast(self, dtype: torch.dtype) -> int:
        """Numbers kept because parameters in `dtype` are cast to the accumulation dtype, for one call."""
        return 0

    def params(self) -> int:
        """How many numbers are learnt."""
        return sum(p.numel() for p in self.parameters())


class EluPlusOne(FeatureMap):
    """phi(x) = elu(x) + 1 (Katharopoulos et al., "Transformers are RNNs", 2020, arXiv:2006.16236, equation 7).

    Written x + 1 for x > 0 and exp(x) below: elu(x) + 1 would cancel to 0 there in low precision.
    """

    name = "elu"

    def forward(self, x: Tensor) -> Features:
        return Features(_EluPlusOne.apply(x), None)


class _EluPlusOne(torch.autograd.Function):
    """Keeps its output alone for the backward pass: the derivative is min(phi, 1)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        phi = torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))
        ctx.save_for_backward(phi)
        return phi

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (phi,) = ctx.saved_tensors
        return grad * phi.clamp(max=1)


class Relu(FeatureMap):
    """phi(x) = max(x, 0); a query whose features are all zero gets a zero row."""

    name = "relu"

    def forward(self, x: Tensor) -> Features:
        return Features(torch.relu(x), None)


class SquaredRelu(FeatureMap):
    """phi(x) = max(x, 0)^2, each token scaled by a power of two so that squares do not overflow."""

    name = "squared_relu"
    has_exponent = True

    def forward(self, x: Tensor) -> Features:
        x = torch.relu(x)
        exponent = torch.ceil(torch.log2(x.detach().amax(-1))).clamp(min=-_LARGEST, max=_LARGEST)
        return Features((x * torch.exp2(-exponent)[..., None]).square(), 2 * exponent)

    def saved(self, head_dim: int) -> int:
        return 2 * head_dim + 1


class Exp(FeatureMap):
    """phi(x) = exp(x), each token scaled by a power of two so that no input overflows."""

    name = "exp"
    has_exponent = True

    def forward(self, x: Tensor) -> Features:
        return from_logarithm(x)


_LARGEST = 60.0  # |exponent| for features that are zero or subnormal: 2^60 still squares within fp32


def from_logarithm(log_phi: Tensor) -> Features:
    """Features exp(log_phi), scaled by the power of two that brings each token's largest into (1/2, 1]."""
    peak = log_phi.detach().amax(-1)
    exponent = torch.ceil(peak / math.log(2))
    # The rest lies in (-log 2, 0], but a large peak rounds coarser than that.
    rest = (peak - exponent * math.log(2)).clamp(-math.log(2), 0)
    return Features(torch.exp((log_phi - peak[..., None]) + rest[..., None]), exponent)


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
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"head_dim of the mechanism is {self.head_dim}, q and k have {x.shape[-1]}")
        x = x * self.head_dim**-0.25
        projected = x @ self.projection.to(x.dtype).mT
        if self.kernel == "relu":
            return Features(torch.relu(projected * self.size**-0.5), None)
        return from_logarithm(projected - x.square().sum(-1, keepdim=True) / 2 - math.log(self.size) / 2)

    def num_features(self, head_dim: int) -> int:
        return self.size

    def flops(self, head_dim: int) -> int:
        return 2 * self.size * head_dim

    def saved(self, head_dim: int) -> int:
        return head_dim if self.kernel == "softmax" else 0

    def cast(self, dtype: torch.dtype) -> int:
        return self.projection.numel() if dtype.itemsize < 4 else 0

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, num_features={self.size}, seed={self.seed}, kernel={self.kernel!r}"


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
