"""Softmax attention over a structured mask: the implementations, and which of them can run what."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..backends import Backend
from ..inputs import accumulation_dtype
from ..masks import Causal, Everything
from .block_sparse import TRITON
from .blocked import blocked
from .dense import reference
from .problem import SoftmaxProblem, allowed_pairs


def is_plain(p: SoftmaxProblem) -> bool:
    """Whether full or causal over a square, or non-causal over any shape: what a bare flag can say."""
    if isinstance(p.mask, Everything):
        return True
    square = isinstance(p.q_offset, int) and p.q_offset == 0 and p.q.shape[2] == p.k.shape[2]
    return isinstance(p.mask, Causal) and square


def _last_query_alone(p: SoftmaxProblem) -> bool:
    """One query at the last position: causality hides nothing from it."""
    return p.q.shape[2] == 1 and isinstance(p.q_offset, int) and p.q_offset == p.k.shape[2] - 1


def _needs_dense_mask(p: SoftmaxProblem) -> bool:
    """Whether the masks together need one entry for each pair, (L, S) or more."""
    if p.segment_ids is not None or p.attn_bias is not None:
        return True
    if _last_query_alone(p):
        return False
    return not is_plain(p) or (isinstance(p.mask, Causal) and p.key_mask is not None)


def _grouped(q: Tensor, k: Tensor) -> bool:
    # A branch, because while compiling the comparison itself is symbolic, and SDPA wants a bool.
    return True if q.shape[1] != k.shape[1] else False  # noqa: SIM210


def sdpa(p: SoftmaxProblem) -> Tensor:
    """torch's scaled_dot_product_attention, whichever of its kernels it picks."""
    if p.k.shape[2] == 0 or p.q.numel() == 0:
        return reference(p)
    attn_mask = None
    if _needs_dense_mask(p):
        attn_mask = allowed_pairs(p)
        if p.attn_bias is not None and p.attn_bias.dtype == torch.bool:
            attn_mask = attn_mask & p.attn_bias
        elif p.attn_bias is not None:
            # On CPU a bias may be finer than q; other devices take one dtype.
            dtype = accumulation_dtype(p.q.dtype) if p.q.device.type == "cpu" else p.q.dtype
            attn_mask = p.attn_bias.to(dtype).masked_fill(~attn_mask, -torch.inf)
    elif p.key_mask is not None:
        attn_mask = p.key_mask[:, None, None, :]
    out = F.scaled_dot_product_attention(
        p.q,
        p.k,
        p.v,
        attn_mask=attn_mask,
        dropout_p=p.dropout_p,
        is_causal=isinstance(p.mask, Causal) and attn_mask is None and not _last_query_alone(p),
        scale=p.scale,
        enable_gqa=_grouped(p.q, p.k),
    )
    return out.to(p.q.dtype)  # autocast computes fp32 inputs in its own dtype


def attend_where(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """Softmax attention where `allowed` (B or 1, 1, L, S): for the few keys of a decoding step."""
    if k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    grouped = _grouped(q, k)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, dropout_p=dropout_p, scale=scale, enable_gqa=grouped
    )
    return out.to(q.dtype)


def _sdpa_only(kernel: SDPBackend) -> Callable[[SoftmaxProblem], Tensor]:
    def run(p: SoftmaxProblem) -> Tensor:
        if p.q.device.type == "cpu":
            # The one fused kernel there takes all that was not refused; the context below is global to the process.
            return sdpa(p)
        with sdpa_kernel(kernel):
            return sdpa(p)

    return run


def _refuse_dense_mask(p: SoftmaxProblem) -> list[str]:
    if p.k.shape[2] == 0 or p.q.numel() == 0:
        return ["there are no queries or no keys"]
    return ["these masks together would need a dense (L, S) mask"] if _needs_dense_mask(p) else []


def _refuse_sdpa(name: str, devices: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> Callable:
    """Why the SDPA kernel `name` cannot run: our own conditions, then, on CUDA, torch's words."""

    def refuse(p: SoftmaxProblem) -> list[str]:
        reasons = _refuse_dense_mask(p)
        device = p.q.device.type
        if device not in devices:
            reasons.append(f"runs on {' and '.join(devices)}, not {device}")
        if p.q.dtype not in dtypes and device == "cuda":
            reasons.append(f"does not take {p.q.dtype}")
        if p.q.shape[3] != p.v.shape[3]:
            reasons.append(f"head sizes of k and v differ ({p.q.shape[3]} and {p.v.shape[3]})")
        if device == "cpu" and p.dropout_p > 0:
            reasons.append("no dropout on CPU")
        if any(x.stride(-1) != 1 for x in (p.q, p.k, p.v)):
            reasons.append("the last dimension of q, k and v must be contiguous")
        if device == "cuda" and name != "efficient" and p.key_mask is not None:
            reasons.append("takes no key_mask on CUDA")
        if reasons or device != "cuda" or torch.compiler.is_compiling():
            return reasons
        return _torch_reasons(name, p)

    return refuse


def _torch_reasons(name: str, p: SoftmaxProblem) -> list[str]:
    """What torch itself says against a CUDA kernel, collected from its debug warnings."""
    cuda = torch.backends.cuda
    gqa = _grouped(p.q, p.k)
    mask = None if p.key_mask is None else p.key_mask[:, None, None, :]
    is_causal = isinstance(p.mask, Causal) and not _last_query_alone(p)
    params = cuda.SDPAParams(p.q, p.k, p.v, mask, p.dropout_p, is_causal, gqa)
    can_use = {
        "flash": cuda.can_use_flash_attention,
        "efficient": cuda.can_use_efficient_attention,
        "cudnn": cuda.can_use_cudnn_attention,
    }[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if can_use(params, True):
            return []
    return [str(w.message).split(" (Triggered")[0] for w in caught] or ["torch refuses, without saying why"]


def _refuse_package(package: str) -> Callable[[SoftmaxProblem], list[str]]:
    def refuse(p: SoftmaxProblem) -> list[str]:
        reasons = _refuse_dense_mask(p)
        if importlib.util.find_spec(package) is None:
            reasons.append(f"{package} is not installed")
        if p.q.device.type != "cuda":
            reasons.append(f"runs on cuda, not {p.q.device.type}")
        if p.q.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"takes float16 and bfloat16, not {p.q.dtype}")
        if p.key_mask is not None:
            reasons.append("key_mask is not passed to it")
        if p.q.shape[3] != p.v.shape[3]:
            reasons.append(f"head sizes of k and v differ ({p.q.shape[3]} and {p.v.shape[3]})")
        return reasons

    return refuse


def _xformers(p: SoftmaxProblem) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention  # type: ignore[import-not-found]

    groups = p.q.shape[1] // p.k.shape[1]
    q = p.q.unflatten(1, (-1, groups)).permute(0, 3, 1, 2, 4)  # (B, L, Hkv, G, E)
    k, v = (x.transpose(1, 2).unsqueeze(3).expand(-1, -1, -1, groups, -1) for x in (p.k, p.v))
    bias = LowerTriangularMask() if isinstance(p.mask, Causal) and not _last_query_alone(p) else None
    out = memory_efficient_attention(q, k, v, attn_bias=bias, p=p.dropout_p, scale=p.scale)
    return out.permute(0, 2, 3, 1, 4).flatten(1, 2)


def _flash_attn(p: SoftmaxProblem) -> Tensor:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
    causal = isinstance(p.mask, Causal) and not _last_query_alone(p)
    return flash_attn_func(q, k, v, dropout_p=p.dropout_p, softmax_scale=p.scale, causal=causal).transpose(
        1, 2
    )


def _never(p: SoftmaxProblem) -> list[str]:
    return []


def _refuse_bias(p: SoftmaxProblem) -> list[str]:
    return [] if p.attn_bias is None else ["attn_bias is not supported"]


_HALF = (torch.float16, torch.bfloat16)

REFERENCE = Backend("reference", reference, _never, by_name_only=True)
BLOCKED = Backend("blocked", blocked, _refuse_bias)

FULL_BACKENDS = (Backend("sdpa", sdpa, _never), REFERENCE)
PATTERN_BACKENDS = (TRITON, BLOCKED, REFERENCE)
FLASH_BACKENDS = (
    Backend(
        "sdpa_cudnn",
        _sdpa_only(SDPBackend.CUDNN_ATTENTION),
        _refuse_sdpa("cudnn", ("cuda",), _HALF),
        portable=False,
    ),
    Backend(
        "sdpa_flash",
        _sdpa_only(SDPBackend.FLASH_ATTENTION),
        _refuse_sdpa("flash", ("cuda", "cpu"), _HALF),
        portable=False,
    ),
    Backend(
        "sdpa_efficient",
        _sdpa_only(SDPBackend.EFFICIENT_ATTENTION),
        _refuse_sdpa("efficient", ("cuda",), (*_HALF, torch.float32)),
        portable=False,
    ),
    Backend("xformers", _xformers, _refuse_package("xformers"), portable=False),
    Backend("flash_attn", _flash_attn, _refuse_package("flash_attn"), portable=False),
    TRITON,
    BLOCKED,
    REFERENCE,
)
