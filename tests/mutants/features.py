"""Mutants of the feature maps: formulas, stabilisers, random features, what they declare."""

from __future__ import annotations

from .mutant import Mutant, Subject

FILE = "feature_maps.py"


def mutant(before: str, after: str, why: str, survives: str = "") -> Mutant:
    return Mutant(FILE, before, after, why, survives)


POINTWISE = (
    mutant(
        "torch.exp2(x.clamp(max=0) * _LOG2_E) + torch.relu(x)",
        "torch.nn.functional.elu(x) + 1",
        "fla#1261: elu + 1 cancels far below zero",
    ),
    mutant(
        "torch.exp2(x.clamp(max=0) * _LOG2_E) + torch.relu(x)",
        "torch.exp2(x * _LOG2_E).clamp(max=1) + torch.relu(x) - (x > 0).to(x.dtype)",
        "elu without the one",
    ),
    mutant(
        "torch.exp2(x.clamp(max=0) * _LOG2_E) + torch.relu(x)",
        "torch.exp2(x.clamp(max=0)) + torch.relu(x)",
        "elu in base 2",
    ),
    mutant(
        "grad.mul_(phi.values.clamp(max=1))",
        "grad.mul_(phi.values)",
        "the gradient of elu + 1 grows with x",
    ),
    mutant(
        "grad.mul_(phi.values.clamp(max=1))",
        "grad.mul_(phi.values > 1)",
        "the gradient of elu + 1 is that of relu",
    ),
    mutant(
        "grad.mul_(phi.values.clamp(max=1))",
        "grad.mul_(phi.values.clamp(min=1))",
        "a clamp on the wrong side",
    ),
    mutant(
        "return Features(torch.relu(x), None)",
        "return Features(torch.nn.functional.leaky_relu(x), None)",
        "features, and weights, that are negative",
    ),
    mutant(
        "return grad.masked_fill_(x <= 0, 0.0)",
        "return grad.masked_fill_(x < -1, 0.0)",
        "the gradient of relu reaches what it cut off",
    ),
    mutant(".clamp(min=-_LARGEST, max=_LARGEST)", "", "features that all vanish have an infinite exponent"),
    mutant(
        "torch.exp2(-exponent)[..., None]).square(), 2 * exponent)",
        "torch.exp2(-exponent)[..., None]).square(), exponent)",
        "the exponent of a square is that of its root",
    ),
    mutant(
        "(x * torch.exp2(-exponent)[..., None])",
        "(x * torch.exp2(exponent)[..., None])",
        "the stabiliser has the wrong sign",
    ),
    mutant(
        "torch.log2(x.detach().amax(-1))",
        "torch.log2(x.detach().amax((-2, -1))[..., None].expand(x.shape[:-1]) if x.numel() else x[..., 0])",
        "the stabiliser of squared relu is a maximum over the sequence",
    ),
    mutant(
        "scale = torch.exp2(-phi.exponent / 2)[..., None]",
        "scale = torch.exp2(-phi.exponent)[..., None]",
        "the gradient of a square is scaled by the square's exponent",
    ),
    mutant(
        ".mul_(2 * scale)",
        ".mul_(scale)",
        "the gradient of a square without its 2",
    ),
)

STABILISER = (
    mutant(
        "largest = log2_phi.detach().amax(-1, keepdim=True)",
        "largest = log2_phi.detach().amax((-2, -1), keepdim=True).expand_as(log2_phi[..., :1])"
        " if log2_phi.numel() else log2_phi[..., :1]",
        "performer-pytorch: the stabiliser is a maximum over the sequence",
    ),
    mutant(
        "largest = log2_phi.detach().amax(-1, keepdim=True)",
        "largest = log2_phi.detach()[..., :1].clone()",
        "the stabiliser is the first feature, not the largest",
    ),
    mutant(
        "largest = log2_phi.detach().amax(-1, keepdim=True)",
        "largest = torch.zeros_like(log2_phi[..., :1])",
        "no stabiliser: features overflow",
    ),
    mutant(
        "log2_phi.sub_(largest - (peak - exponent))",
        "log2_phi.sub_(largest)",
        "the rest below the power of two is forgotten",
    ),
    mutant(
        "log2_phi.sub_(largest - (peak - exponent))",
        "log2_phi.sub_(largest + (peak - exponent))",
        "the rest has the wrong sign",
    ),
    mutant(
        "log2_phi.sub_(largest - (peak - exponent)).exp2_()",
        "log2_phi.sub_(largest - (peak - exponent)).exp2_().add_(1e-4)",
        "performer-pytorch: 1e-4 is added to every feature",
    ),
    mutant(
        "exponent = torch.ceil(peak.detach())",
        "exponent = peak.detach()",
        "the exponent is no integer: rescaling by it rounds",
    ),
    mutant(
        "exponent = torch.ceil(peak.detach())",
        "exponent = torch.ceil(largest)",
        "the exponent forgets the shift: |x|^2 / 2 for a key",
    ),
    mutant(
        "peak = largest if shift is None else largest - shift",
        "peak = largest if shift is None else largest - shift.detach()",
        "the gradient does not pass through the shift",
    ),
)

FAVOR = (
    mutant(
        "x = x * (width**-0.25 * _LOG2_E**0.5)",
        "x = x * (width**-0.5 * _LOG2_E**0.5)",
        "both q and k carry the whole scale",
    ),
    mutant(
        "x = x * (width**-0.25 * _LOG2_E**0.5)",
        "x = x * _LOG2_E**0.5",
        "random features of the unscaled kernel",
    ),
    mutant(
        "log2_phi = x @ (projection * _LOG2_E**0.5).mT",
        "log2_phi = x @ projection.mT",
        "half of the change of base is forgotten",
    ),
    mutant(
        "x.square().sum(-1, keepdim=True) / 2 + math",
        "x.square().sum(-1, keepdim=True) + math",
        "|x|^2 is not halved",
    ),
    mutant(
        "x.square().sum(-1, keepdim=True) / 2 + math.log2(size) / 2)",
        "0 * x[..., :1] + math.log2(size) / 2)",
        "|x|^2 / 2 is left out: keys of larger norm weigh more",
    ),
    mutant(
        "x.square().sum(-1, keepdim=True) / 2 + math.log2(size) / 2)",
        "x.square().sum(-1, keepdim=True) / 2)",
        "softmax features without 1 / sqrt(M)",
    ),
    mutant(
        "        grad = grad.mul_(phi.values)\n        return (grad @ projection)",
        "        return (grad @ projection)",
        "the gradient of an exponential without the exponential",
    ),
    mutant(
        "return (grad @ projection) * scale - (grad.sum(-1, keepdim=True) * scale**2) * x",
        "return (grad @ projection) * scale",
        "the gradient forgets |x|^2 / 2",
    ),
    mutant(
        "(grad.sum(-1, keepdim=True) * scale**2) * x",
        "(grad.sum(-1, keepdim=True) * scale) * x",
        "the gradient of |x'|^2 / 2 has E^(-1/4) once, not twice",
    ),
    mutant(
        "(grad.masked_fill_(phi.values <= 0, 0.0) @ projection)",
        "(grad @ projection)",
        "the gradient of relu features reaches those that are zero",
    ),
    mutant("return width**-0.25 * size**-0.5", "return width**-0.25", "relu features without 1 / sqrt(M)"),
    mutant(
        "return 2 * self.size * head_dim", "return self.size * head_dim", "a multiply-accumulate counts 1"
    ),
    mutant(
        "orthogonal_gaussian(self.size, self.head_dim, self.seed))",
        "orthogonal_gaussian(self.size, self.head_dim, 0))",
        "the features ignore their seed",
    ),
    mutant(
        'self.register_buffer("projection", torch.empty(num_features, head_dim))',
        'self.register_buffer("projection", torch.empty(num_features, head_dim), persistent=False)',
        "the projection is not in the state_dict",
    ),
    mutant(
        'generator = torch.Generator("cpu").manual_seed(seed)',
        "generator = torch.manual_seed(seed)",
        "HF BigBird: construction reseeds the global generator",
    ),
    mutant(
        'generator = torch.Generator("cpu").manual_seed(seed)',
        "generator = torch.default_generator",
        "the projection is drawn from the global generator",
    ),
    mutant(
        "(basis * torch.sign(torch.diagonal(upper))).mT",
        "basis.mT",
        "rotations are not uniform: LAPACK's choice of signs is kept",
    ),
    mutant("(torch.cat(blocks)[:rows] * norms)", "torch.cat(blocks)[:rows]", "all features have norm one"),
    mutant(
        "return None if isinstance(phi, Favor) and phi.projection.requires_grad else phi.name",
        "return phi.name",
        "a learnt projection gets no gradient",
    ),
    mutant(
        "norms = gaussian(rows, columns).norm(dim=1, keepdim=True)",
        "norms = gaussian(rows, 1).abs() * columns**0.5",
        "norms of one Gaussian number, not of a vector",
    ),
    mutant(
        "torch.linalg.qr(gaussian(columns, columns))",
        "(gaussian(columns, columns) / columns**0.5, torch.eye(columns, dtype=torch.float64))",
        "features are not orthogonal",
    ),
)

SUBJECT = Subject(
    "features",
    POINTWISE + STABILISER + FAVOR,
    tests=("tests/test_feature_maps.py", "tests/test_arguments.py"),
    mechanisms=("linear", "performer"),
    first=("passes_gradcheck", "hardware_flops_are_counted", "survives_copies"),
    others=("tests/test_properties.py", "tests/test_regressions.py"),
)
