"""Instance normalisation: each context's own location and scale, removed before the network and put back after it.

The window model has one context, the streaming model one that moves with every token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

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


# In transformed units: 1,490 standard deviations of a context. No forecast lies farther out, and none overflows.
_FARTHEST = 8.0


def squash(values: Tensor) -> Tensor:
    """Normalised values as a network with ``transform=asinh`` reads them: as they are near 0, like a logarithm far out.

    A variance-stabilising transform of electricity prices (Uniejewski, Weron and Ziel 2018); Chronos-2 (Ansari et al.
    2025) reads contexts of all kinds through it. Quantiles pass through it and back, means do not.
    """
    return torch.asinh(values)


def unsquash(values: Tensor) -> Tensor:
    """The inverse of ``squash``."""
    return torch.sinh(values.clamp(-_FARTHEST, _FARTHEST))


# A running scale is taken from this many observed steps at least.
LEAST_OBSERVED = 8
# A stretch much flatter than the series has lately been is not blown up: the scale stays above this share of the
# largest one seen, which itself is forgotten by half over so many contexts.
SCALE_FLOOR, FLOOR_CONTEXTS = 0.01, 32
# Deviations below this multiple of the dtype's resolution at the series' level are rounding: the series is constant.
ROUNDING = 8.0
# What follows a nearly flat stretch may lie any number of its standard deviations away; beyond this it is all the same.
FARTHEST = 1e4


class ScaleState(NamedTuple):
    """The location and scale last found, carried over stretches with too few values; NaN before the first."""

    loc: Float[Tensor, " row"]
    scale: Float[Tensor, " row"]
    largest: Float[Tensor, " row"]
    """The largest scale so far, slowly forgotten; 0 before the first."""

    @classmethod
    def start(cls, num_rows: int, like: Tensor) -> ScaleState:
        """Before the first step."""
        nan = like.new_full((num_rows,), torch.nan)
        return cls(nan, nan, like.new_zeros(num_rows))


def window_statistics(
    windows: Float[Tensor, "row token context"], observed: Bool[Tensor, "row token context"]
) -> tuple[Float[Tensor, "row token"], Float[Tensor, "row token"], Bool[Tensor, "row token"]]:
    """Mean and standard deviation of each window's observed steps, and whether there are enough of them."""
    weight = observed.to(windows.dtype)
    count = weight.sum(dim=-1)
    divisor = count.clamp(min=1.0)
    loc = (windows * weight).sum(dim=-1) / divisor
    scale = (((windows - loc[..., None]) * weight).square().sum(dim=-1) / divisor).sqrt()
    rounding = ROUNDING * torch.finfo(windows.dtype).eps * loc.abs()
    return loc, torch.where(scale > rounding, scale, 0.0), count >= min(LEAST_OBSERVED, windows.shape[-1])


def running_statistics(
    windows: Float[Tensor, "row token context"],
    observed: Bool[Tensor, "row token context"],
    state: ScaleState,
    patch_length: int,
) -> tuple[Float[Tensor, "row token"], Float[Tensor, "row token"], Float[Tensor, "row token"], ScaleState]:
    """Location, scale and the scale's floor at every token, from the steps up to its end, and the state after the last.

    Both are exact over the last context of steps, hence free of accumulated rounding, and a shift of level is forgotten
    entirely once it lies a context back. Where a window has too few values the last location and scale go on.
    """
    loc, scale, found = window_statistics(windows, observed)
    num_tokens = loc.shape[1]
    place = torch.arange(num_tokens, device=loc.device)
    last = torch.where(found, place, -1).cummax(dim=1).values
    is_carried = last < 0
    loc = torch.where(is_carried, state.loc[:, None], loc.gather(1, last.clamp(min=0)))
    scale = torch.where(is_carried, state.scale[:, None], scale.gather(1, last.clamp(min=0)))
    # Decaying by a constant factor, the largest so far is a running maximum of logarithms along a slope.
    slope = math.log(2) * patch_length / (FLOOR_CONTEXTS * windows.shape[-1]) * (place + 1).to(loc.dtype)
    steps = torch.where(found, scale, 0.0).log() + slope
    largest = (torch.cat((state.largest.log()[:, None], steps), dim=1).cummax(dim=1).values[:, 1:] - slope).exp()
    return loc, scale, SCALE_FLOOR * largest, ScaleState(loc[:, -1], scale[:, -1], largest[:, -1])
