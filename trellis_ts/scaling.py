"""Instance normalisation: each context's own location and scale, removed before the network and put back after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

# Added to the variance, in units of the training rows' variance: a context flatter than 1 % of the training standard
# deviation is not blown up beyond that.
_VARIANCE_FLOOR = 1e-4


def instance_statistics(
    context: Float[Tensor, "batch context channel"], observed: Bool[Tensor, "batch context channel"]
) -> tuple[Float[Tensor, "batch 1 channel"], Float[Tensor, "batch 1 channel"]]:
    """Mean and standard deviation of what was observed; 0 and 1 where nothing was."""
    weight = observed.to(context.dtype)
    count = weight.sum(dim=1, keepdim=True)
    divisor = count.clamp(min=1.0)
    loc = (context * weight).sum(dim=1, keepdim=True) / divisor
    variance = ((context - loc).square() * weight).sum(dim=1, keepdim=True) / divisor
    scale = torch.where(count > 0, (variance + _VARIANCE_FLOOR).sqrt(), 1.0)
    return loc, scale
