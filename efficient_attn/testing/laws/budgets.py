"""How much error is allowed: that of plain torch in the same dtype, both measured against fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from .law import LawViolation


def within_budget(
    actual: Tensor, plain: Tensor, exact: Tensor, what: str, *, factor: float = 2.0, mean: bool = True
) -> None:
    """Raise LawViolation unless `actual` is about as near to `exact` as `plain` is.

    The largest error may be `factor` times that of `plain` and two units in the last place; the mean error
    1.1 times (2 times in fp32). The pair of rules catches what either alone lets through: a single wrong row
    hides in a mean, a small bias of every entry hides under a maximum.

    Args:
        actual: the result under test, in its own dtype.
        plain: the same mathematics by plain torch operations in that dtype.
        exact: the same mathematics in fp64.
    """
    error, budget = (actual.double() - exact).abs(), (plain.double() - exact).abs()
    if not torch.isfinite(actual).all():
        raise LawViolation(f"{what}: not finite")
    if actual.numel() == 0:
        return
    rounded = exact.to(actual.dtype)
    ulp = ((rounded + 0.3 - 0.3).double() - rounded.double()).abs().max()
    floor = 2 * ulp
    if not mean:
        # A gradient may be zero by cancellation: plain torch may hit that exactly, fp32 sums need not.
        floor = floor + 8 * torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())
    if error.max() > factor * budget.max() + floor:
        raise LawViolation(
            f"{what}: largest error {error.max():.3g}, plain torch has {budget.max():.3g} and may be exceeded "
            f"{factor:g} times plus {floor:.1g}"
        )
    share = 2.0 if actual.dtype == torch.float32 else 1.1
    floor = torch.finfo(actual.dtype).eps * exact.abs().mean() / 4
    if mean and error.mean() > share * budget.mean() + floor:
        raise LawViolation(
            f"{what}: mean error {error.mean():.3g}, plain torch has {budget.mean():.3g} (x {share:g})"
        )
