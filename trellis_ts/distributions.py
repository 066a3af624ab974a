"""Distributions as forecasts: Normal, Student-t and, for counts, the negative binomial.

Parameters are tensors of one shape, ``[batch, horizon, channel]`` or any other, on the scale of the batch:

    normal              loc, scale
    student_t           loc, scale, degrees of freedom (above 2, so that the variance is finite)
    negative_binomial   loc, scale, mean and dispersion: the count, in data units, has this mean and the variance
                        mean + dispersion * mean**2; the value on the batch's scale is (count - loc) / scale
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import distributions
from torch.nn import functional as F

from trellis_ts.quantiles import normal_score

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

Family = Literal["normal", "student_t", "negative_binomial"]
FAMILIES: tuple[Family, ...] = get_args(Family)
NUM_PARAMETERS: dict[Family, int] = {"normal": 2, "student_t": 3, "negative_binomial": 2}
"""Numbers the network gives per step: the location and those that shape the spread."""

_SCALE_FLOOR = 1e-3  # of the context's standard deviation
_LEAST_DEGREES, _MOST_DEGREES = 2.01, 200.0  # beyond the latter it is a normal distribution for all purposes
_START_DEGREES = 3.0  # added before the softplus: training starts at about 5 degrees of freedom
_DISPERSION_FLOOR = 1e-4
_MEAN_FLOOR = 1e-6
_COUNT_SPREAD_FLOOR = 0.1  # of the training rows' standard deviation: contexts of nothing but 0 can still rise
# Levels closer to 0 or 1 than this are not told apart: they would be infinitely far out.
_LEVEL_FLOOR = 1e-12


@dataclass(frozen=True, eq=False)
class PredictiveDistribution:
    """A distribution for each element; see the module's text for the parameters of each family."""

    family: Family
    parameters: tuple[Tensor, ...]

    @property
    def mean(self) -> Float[Tensor, "*shape"]:
        """The mean on the batch's scale."""
        if self.family != "negative_binomial":
            return self.parameters[0]
        loc, scale, mean, _ = self.parameters
        return (mean - loc) / scale

    def log_prob(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Logarithm of the density; for counts of the probability of the nearest count."""
        if self.family == "negative_binomial":
            value = self._count_of(value)
        log_prob: Tensor = self._torch().log_prob(value)
        return log_prob

    def quantile(self, level: Tensor) -> Tensor:
        """The quantile at a level for each element; ``level`` is broadcast against the parameters' shape, extra axes
        in front. In double precision, but for counts on a scale of single precision; without gradients.

        The Student-t quantile, which torch lacks, is ``scipy.special.stdtrit``; that of a count the smallest one whose
        cumulative probability reaches the level.
        """
        level = level.to(self.parameters[0].device).double()
        loc, scale, *shape = (each.detach().double() for each in self.parameters)
        if self.family == "normal":
            return loc + scale * normal_score(level)
        inner = _array(level.clamp(_LEVEL_FLOOR, 1 - _LEVEL_FLOOR))
        if self.family == "student_t":
            from scipy import special

            return loc + scale * torch.from_numpy(special.stdtrit(_array(shape[0]), inner)).to(loc)
        count = _count_quantile(inner, *map(_array, shape))
        # Through the arithmetic by which data come onto this scale, so that equal counts are equal numbers.
        return ((torch.from_numpy(count).to(loc) - loc) / scale).to(self.parameters[2].dtype)

    def cdf(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Probability of the value or less; for counts half of the value's own probability is left out, so that the
        result is evenly spread about a half where the distribution is right."""
        value = value.double()
        loc, scale, *shape = (each.detach().double() for each in self.parameters)
        if self.family == "normal":
            level: Tensor = torch.special.ndtr((value - loc) / scale)
            return level
        if self.family == "student_t":
            from scipy import special

            return torch.from_numpy(special.stdtr(_array(shape[0]), _array((value - loc) / scale))).to(loc)
        count, mean, dispersion = _array(self._count_of(value)), _array(shape[0]), _array(shape[1])
        upto, below = _count_cdf(count, mean, dispersion), _count_cdf(count - 1, mean, dispersion)
        return torch.from_numpy((upto + below) / 2).to(loc)

    def affine(self, loc: Tensor, scale: Tensor) -> PredictiveDistribution:
        """Of ``loc + scale`` times the quantity; ``scale`` is positive."""
        own_loc, own_scale, *shape = self.parameters
        if self.family == "negative_binomial":
            new_scale = own_scale / scale
            return replace(self, parameters=(own_loc - loc * new_scale, new_scale, *shape))
        return replace(self, parameters=(own_loc * scale + loc, own_scale * scale, *shape))

    def map(self, function: Callable[[Tensor], Tensor]) -> PredictiveDistribution:
        """The same with a function applied to each parameter."""
        return replace(self, parameters=tuple(map(function, self.parameters)))

    def joined(self, others: Sequence[PredictiveDistribution], dim: int) -> PredictiveDistribution:
        """This one and others of its family, one after the other along an axis."""
        parts = zip(self.parameters, *(each.parameters for each in others), strict=True)
        return replace(self, parameters=tuple(torch.cat(each, dim=dim) for each in parts))

    def _count_of(self, value: Tensor) -> Tensor:
        loc, scale = self.parameters[:2]
        return (value * scale + loc).round().clamp(min=0.0)

    def _torch(self) -> distributions.Distribution:
        """torch's distribution of the value, or of the count."""
        if self.family == "normal":
            loc, scale = self.parameters
            return distributions.Normal(loc, scale, validate_args=False)
        if self.family == "student_t":
            loc, scale, degrees = self.parameters
            return distributions.StudentT(degrees, loc, scale, validate_args=False)
        # In double precision where the device has it: the log-gamma of a large count loses digits.
        is_double = self.parameters[0].device.type != "mps"
        mean, dispersion = (each.double() if is_double else each for each in self.parameters[2:])
        logits = (mean * dispersion).log()
        return distributions.NegativeBinomial(1 / dispersion, logits=logits, validate_args=False)


def shape_distribution(
    family: Family,
    location: Float[Tensor, "batch horizon channel"],
    raw: Float[Tensor, "batch horizon channel shape"],
    spread: Float[Tensor, "batch 1 channel"],
    units: tuple[Tensor, Tensor] | None,
) -> PredictiveDistribution:
    """The network's free numbers as a distribution, numerically safe whatever they are.

    Args:
        family: which distribution.
        location: where it lies, on the batch's scale.
        raw: the numbers that shape it.
        spread: the context's standard deviation, the unit in which the distribution's scale is learned.
        units: ``loc`` and ``scale`` that take the batch's scale to data units; needed for counts alone.

    A count's mean is a softplus of its location in data units, as sharp as half the context's standard deviation: far
    from 0 it is the location, near 0 it stays positive. The dispersion is relative and has no unit.
    """
    raw = raw.float()
    if family == "negative_binomial":
        if units is None:
            raise ValueError("counts need the batch's loc and scale")
        loc, scale = units
        width = (0.5 * scale * spread.clamp(min=_COUNT_SPREAD_FLOOR)).to(location.dtype)
        mean = width * F.softplus((location * scale + loc).to(location.dtype) / width) + _MEAN_FLOOR
        ones = torch.ones_like(location)
        return PredictiveDistribution(
            family, (loc * ones, scale * ones, mean, F.softplus(raw[..., 0]) + _DISPERSION_FLOOR)
        )
    width = spread * (F.softplus(raw[..., 0]) + _SCALE_FLOOR)
    if family == "normal":
        return PredictiveDistribution(family, (location, width))
    degrees = (_LEAST_DEGREES + F.softplus(raw[..., 1] + _START_DEGREES)).clamp(max=_MOST_DEGREES)
    return PredictiveDistribution(family, (location, width, degrees))


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().cpu().numpy()


def _count_cdf(
    count: NDArray[np.float64], mean: NDArray[np.float64], dispersion: NDArray[np.float64]
) -> NDArray[np.float64]:
    from scipy import special

    size = 1 / dispersion
    inside = special.betainc(size, np.maximum(count, 0) + 1, 1 / (1 + mean * dispersion))
    result: NDArray[np.float64] = np.where(count < 0, 0.0, inside)
    return result


def _count_quantile(
    level: NDArray[np.float64], mean: NDArray[np.float64], dispersion: NDArray[np.float64]
) -> NDArray[np.float64]:
    """scipy's continuous inverse, moved to the whole number at which the distribution function steps over the level."""
    from scipy import special

    level, mean, dispersion = np.broadcast_arrays(level, mean, dispersion)
    inverse = special.nbdtrik(level, 1 / dispersion, 1 / (1 + mean * dispersion))
    count = np.ceil(np.nan_to_num(np.maximum(inverse, 0.0)))
    count = np.where(_count_cdf(count - 1, mean, dispersion) >= level, count - 1, count)
    found: NDArray[np.float64] = np.where(_count_cdf(count, mean, dispersion) < level, count + 1, count)
    return np.maximum(found, 0.0)
