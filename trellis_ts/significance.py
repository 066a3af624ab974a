"""Whether one forecaster's lead over another is more than chance: two paired tests, with their limits.

The Diebold-Mariano test asks about other *times*: it takes the series of mean loss differences per origin, whose
neighbours are dependent because their horizons overlap. The bootstrap asks about other *series*: it redraws them. A
small p-value says that the difference in mean loss is unlikely to be chance under the test's assumptions; it says
neither that the difference matters nor that it will last, and with many comparisons some come out small by chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_FEWEST_ORIGINS = 8
# Times the overlap: with fewer the variance comes from a handful of independent horizons, and p-values from luck.
_FEWEST_HORIZONS = 4
_FEWEST_ITEMS = 10
_DRAWS = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class DieboldMariano:
    """Outcome of the test on n origins. A negative statistic favours the first forecaster (lower loss)."""

    statistic: float
    p_value: float
    """Two-sided, from Student's t with n - 1 degrees of freedom."""
    num_origins: int
    overlap: int
    """Origins whose horizons share steps, the origin itself included: the test's h."""
    kernel: Literal["rectangular", "bartlett"]
    """Bartlett where the usual estimate of the variance came out negative."""


@dataclass(frozen=True)
class PairedBootstrap:
    """Relative difference of the mean loss, ``first / second - 1``, with a percentile interval from redrawn items."""

    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided: twice the share of draws on the other side of 0, at least ``2 / (draws + 1)``."""
    num_items: int
    num_draws: int
    seed: int


def diebold_mariano(difference: Float[np.ndarray, " origin"], overlap: int) -> DieboldMariano | None:
    """Diebold and Mariano (1995) with the small-sample correction of Harvey, Leybourne and Newbold (1997).

    ``DM = d / sqrt(V / n)`` with ``V = g[0] + 2 (g[1] + ... + g[h-1])`` from the autocovariances of the differences,
    times ``sqrt((n + 1 - 2 h + h (h - 1) / n) / n)``, against Student's t with n - 1 degrees of freedom.

    Args:
        difference: loss of the first forecaster less that of the second, in the order of time.
        overlap: h; the horizon where origins are one step apart.

    Returns:
        None where there are fewer origins than 8 or than 4 h, or where all differences are equal
        or one is no number.
    """
    from scipy.special import stdtr  # here, for it takes a while and forecasting needs none of it

    n, h = len(difference), overlap
    if n < max(_FEWEST_ORIGINS, _FEWEST_HORIZONS * h) or not np.isfinite(difference).all():
        return None
    centred = difference - difference.mean()
    covariance = np.array([float(centred[lag:] @ centred[: n - lag]) / n for lag in range(h)])
    if covariance[0] <= 1e-24 * float(np.square(difference).max()):  # rounding of a constant
        return None
    kernel: Literal["rectangular", "bartlett"] = "rectangular"
    variance = covariance[0] + 2 * covariance[1:].sum()
    if variance <= 0:
        kernel = "bartlett"
        variance = covariance[0] + 2 * ((1 - np.arange(1, h) / h) * covariance[1:]).sum()
    correction = math.sqrt((n + 1 - 2 * h + h * (h - 1) / n) / n)
    statistic = float(difference.mean() / math.sqrt(variance / n) * correction)
    p_value = float(2 * stdtr(n - 1, -abs(statistic)))
    return DieboldMariano(statistic, p_value, n, h, kernel)


def paired_bootstrap(
    first: Float[np.ndarray, " item"],
    second: Float[np.ndarray, " item"],
    *,
    seed: int = 0,
    num_draws: int = _DRAWS,
) -> PairedBootstrap | None:
    """Redraws items (series) with replacement, both forecasters' losses together.

    Args:
        first: summed loss of each item under the first forecaster.
        second: the same under the second, on the same values.
        seed: of the draws.
        num_draws: how many.

    Returns:
        None where there are fewer items than 10, the second loses nothing, or a loss is no number.
    """
    num_items = len(first)
    if num_items < _FEWEST_ITEMS or not second.sum() > 0 or not np.isfinite(first + second).all():
        return None
    rng = np.random.default_rng(seed)
    drawn = np.empty(num_draws)
    for index in range(num_draws):
        chosen: Int[np.ndarray, " item"] = rng.integers(num_items, size=num_items)
        below = second[chosen].sum()
        drawn[index] = first[chosen].sum() / below - 1 if below > 0 else 0.0
    low, high = np.quantile(drawn, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return PairedBootstrap(
        difference=float(first.sum() / second.sum() - 1),
        low=float(low),
        high=float(high),
        p_value=min(1.0, 2 * (tail + 1) / (num_draws + 1)),
        num_items=num_items,
        num_draws=num_draws,
        seed=seed,
    )
