"""Scores of forecasts: pure functions of numpy arrays, each with its formula and where it comes from.

``truth`` may hold NaN where nothing was measured: such values are left out of every mean, never filled. A forecast of
NaN is not left out: its score is NaN. Functions that end in ``_error``, ``_loss`` or ``_score`` give one number per
value (NaN where the truth is missing), so that a caller may average as it likes; the short names (``mse``, ``mase``,
...) average over all values, and are NaN where there is none. Everything is computed in float64.

Sources: [HK06] Hyndman and Koehler 2006, "Another look at measures of forecast accuracy"; [M4] and [M5] Makridakis,
Spiliotis and Assimakopoulos 2020 and 2022; [GR07] Gneiting and Raftery 2007, "Strictly proper scoring rules"; [CGH09]
Czado, Gneiting and Held 2009, "Predictive model assessment for count data".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from numpy.typing import ArrayLike, NDArray

_Array = np.ndarray


def _float64(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def mean(values: ArrayLike, truth: ArrayLike) -> float:
    """Mean of the values whose truth is not NaN; NaN where there is none."""
    known = _float64(values)[~np.isnan(_float64(truth))]
    return float(known.mean()) if known.size else float("nan")


def mse(truth: ArrayLike, point: ArrayLike) -> float:
    """Mean squared error."""
    return mean((_float64(point) - _float64(truth)) ** 2, truth)


def mae(truth: ArrayLike, point: ArrayLike) -> float:
    """Mean absolute error."""
    return mean(np.abs(_float64(point) - _float64(truth)), truth)


def rmse(truth: ArrayLike, point: ArrayLike) -> float:
    """Root of the mean squared error: the root is taken once, of the mean over all values."""
    return math.sqrt(mse(truth, point))


def smape_error(truth: Float[_Array, "*shape"], point: Float[_Array, "*shape"]) -> Float[_Array, "*shape"]:
    """``2 |point - truth| / (|truth| + |point|)``, between 0 and 2 [M4, there in per cent]; 0 where both are 0."""
    truth, point = _float64(truth), _float64(point)
    size = np.abs(truth) + np.abs(point)
    return 2 * np.abs(point - truth) / np.where(size == 0, 1.0, size)


def smape(truth: ArrayLike, point: ArrayLike) -> float:
    """Mean of ``smape_error``: a fraction between 0 and 2."""
    return mean(smape_error(_float64(truth), _float64(point)), truth)


def seasonal_error(
    history: Float[_Array, "time ..."], season_length: int, *, squared: bool = False
) -> NDArray[np.float64]:
    """Mean of ``|y[t] - y[t-m]|`` (or of its square) over the rows of a history: what MASE and RMSSE divide by.

    One number per series ``[...]``. Only rows count where both values were measured. NaN, that is no scale, where
    there is no such row or where the mean is 0: a series that repeats itself exactly, a constant one above all, has
    no scaled error, and a caller leaves it out rather than divide by a number made up.
    """
    history = _float64(history)
    difference = np.abs(history[season_length:] - history[:-season_length] if len(history) > season_length else [])
    if difference.size == 0:
        return np.full(history.shape[1:], np.nan)
    known = ~np.isnan(difference)
    difference = np.where(known, difference**2 if squared else difference, 0.0)
    count = known.sum(axis=0)
    average = difference.sum(axis=0) / np.maximum(count, 1)
    # The bound tells a repetition from rounding: 0.1 + 0.2 - 0.3 is not 0 in floating point.
    size = np.max(np.abs(np.where(np.isnan(history), 0.0, history)), axis=0)
    smallest = (1e-12 * size) ** (2 if squared else 1)
    return cast("NDArray[np.float64]", np.where((count > 0) & (average > smallest), average, np.nan))


def mase(truth: ArrayLike, point: ArrayLike, history: ArrayLike, season_length: int) -> float:
    """Mean absolute scaled error [HK06] of one series: ``mae / mean |y[t] - y[t-m]|`` over its history.

    Args:
        truth: ``[horizon]``, the values that came.
        point: ``[horizon]``, the forecast.
        history: ``[time]``, rows known before the forecast; those a model was fitted on, by convention.
        season_length: m; 1 scales by the naive forecast's error.
    """
    return mae(truth, point) / float(seasonal_error(_float64(history), season_length))


def rmsse(truth: ArrayLike, point: ArrayLike, history: ArrayLike, season_length: int) -> float:
    """Root mean squared scaled error [M5, there with m = 1]: ``sqrt(mse / mean (y[t] - y[t-m])**2)``; as ``mase``."""
    return float((mse(truth, point) / seasonal_error(_float64(history), season_length, squared=True)) ** 0.5)


def pinball_loss(
    truth: Float[_Array, "*shape"], quantiles: Float[_Array, "*shape quantile"], levels: Sequence[float]
) -> Float[_Array, "*shape quantile"]:
    """``2 max(q e, (q - 1) e)`` with ``e = truth - quantile``, for each level q: doubled, so that 0.5 gives ``|e|``."""
    level = _float64(levels)
    error = _float64(truth)[..., None] - _float64(quantiles)
    return cast("NDArray[np.float64]", 2 * np.maximum(level * error, (level - 1) * error))


def quantile_loss(truth: ArrayLike, quantiles: ArrayLike, levels: Sequence[float]) -> float:
    """Mean of ``pinball_loss`` over values and levels."""
    return mean(pinball_loss(_float64(truth), _float64(quantiles), levels).mean(axis=-1), truth)


def weighted_quantile_loss(truth: ArrayLike, quantiles: ArrayLike, levels: Sequence[float]) -> float:
    """Sum of ``pinball_loss``, averaged over the levels, by the sum of ``|truth|``; NaN where the latter is 0.

    What GluonTS calls ``mean_weighted_sum_quantile_loss``. It depends on where zero lies.
    """
    truth = _float64(truth)
    known = ~np.isnan(truth)
    size = float(np.abs(truth[known]).sum())
    loss = float(pinball_loss(truth, _float64(quantiles), levels).mean(axis=-1)[known].sum())
    return loss / size if size > 0 else float("nan")


def level_weights(levels: Sequence[float]) -> Float[_Array, " quantile"]:
    """How much of (0, 1) lies nearer to each level than to any other: ``0.3, 0.4, 0.3`` for ``0.1, 0.5, 0.9``."""
    level = _float64(levels)
    edges = np.concatenate(([0.0], (level[1:] + level[:-1]) / 2, [1.0]))
    return np.diff(edges)


def crps_from_quantiles(
    truth: Float[_Array, "*shape"], quantiles: Float[_Array, "*shape quantile"], levels: Sequence[float]
) -> Float[_Array, "*shape"]:
    """Continuous ranked probability score from quantiles: the integral of ``pinball_loss`` over the levels.

    ``CRPS = integral over q in (0, 1) of 2 max(q e, (q - 1) e)`` [GR07, with the quantile decomposition], by the rule
    that each level stands for those nearest to it (``level_weights``). An approximation: few levels do not see the
    tails, and scores are comparable between forecasts with the same levels only.
    """
    return cast("NDArray[np.float64]", pinball_loss(truth, quantiles, levels) @ level_weights(levels))


def crps_from_samples(
    truth: Float[_Array, "*shape"], samples: Float[_Array, "*shape sample"], *, fair: bool = False
) -> Float[_Array, "*shape"]:
    """Continuous ranked probability score of a sample: ``E|X - y| - E|X - X'| / 2`` [GR07].

    Exact for the empirical distribution of the n samples. With ``fair`` the second mean is over pairs of different
    samples (``n (n - 1)`` of them), which estimates without bias the score of the distribution they were drawn from.
    Cost is that of sorting.
    """
    truth, ordered = _float64(truth), np.sort(_float64(samples), axis=-1)
    count = ordered.shape[-1]
    if fair and count < 2:
        raise ValueError("the fair CRPS needs two samples at least")
    # Sum over all pairs of |x_i - x_j| is twice the sum of (2 i - n + 1) x_(i) over the sorted sample, i from 0.
    pairs = 2 * (ordered * (2 * np.arange(count) - count + 1)).sum(axis=-1)
    spread = pairs / (count * (count - 1) if fair else count**2)
    return cast("NDArray[np.float64]", np.abs(ordered - truth[..., None]).mean(axis=-1) - spread / 2)


def interval_score(
    truth: Float[_Array, "*shape"],
    lower: Float[_Array, "*shape"],
    upper: Float[_Array, "*shape"],
    levels: tuple[float, float],
) -> Float[_Array, "*shape"]:
    """Winkler's score of the interval between two quantiles [GR07]: its width, and a fine for a truth outside.

    ``(u - l) + (l - y)+ / p + (y - u)+ / (1 - r)`` for the levels p and r of its ends; for a central interval of
    coverage ``1 - a`` (``p = a / 2``) that is the usual ``(u - l) + 2/a (l - y)+ + 2/a (y - u)+``.
    """
    truth, lower, upper = _float64(truth), _float64(lower), _float64(upper)
    below, above = np.maximum(lower - truth, 0.0), np.maximum(truth - upper, 0.0)
    return (upper - lower) + below / levels[0] + above / (1 - levels[1])


def is_covered(
    truth: Float[_Array, "*shape"], lower: Float[_Array, "*shape"], upper: Float[_Array, "*shape"]
) -> Float[_Array, "*shape"]:
    """1 where the truth lies in ``[lower, upper]``, ends included, else 0."""
    inside = (lower <= truth) & (truth <= upper)
    return np.where(np.isnan(truth) | np.isnan(lower) | np.isnan(upper), np.nan, inside.astype(np.float64))


def coverage(truth: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> float:
    """Share of the values that lie in ``[lower, upper]``, ends included."""
    return mean(is_covered(_float64(truth), _float64(lower), _float64(upper)), truth)


def pit_histogram(
    truth: Float[_Array, "*shape"], quantiles: Float[_Array, "*shape quantile"], levels: Sequence[float]
) -> Float[_Array, " bin"]:
    """Counts of truths below the lowest quantile, between each two, and above the highest: ``[len(levels) + 1]``.

    The histogram of the probability integral transform with the levels as its edges, so that nothing has to be
    interpolated. Calibrated forecasts fill the bins in proportion to ``pit_widths``. A truth that equals a quantile,
    or several (of a forecast without spread), is divided among the bins it touches in proportion to their widths
    [CGH09, the histogram that is not randomised].
    """
    truth = _float64(truth).reshape(-1)
    quantiles = _float64(quantiles).reshape(len(truth), -1)
    known = ~np.isnan(truth)
    truth, quantiles = truth[known, None], quantiles[known]
    first, last = (quantiles < truth).sum(axis=-1), (quantiles <= truth).sum(axis=-1)
    bins = np.arange(len(levels) + 1)
    touched = (first[:, None] <= bins) & (bins <= last[:, None])
    weight = np.where(np.isnan(quantiles).any(axis=-1, keepdims=True), np.nan, touched * pit_widths(levels))
    return cast("NDArray[np.float64]", (weight / weight.sum(axis=-1, keepdims=True)).sum(axis=0))


def pit_widths(levels: Sequence[float]) -> Float[_Array, " bin"]:
    """Share of each bin of ``pit_histogram`` under calibration: ``0.1, 0.4, 0.4, 0.1`` for ``0.1, 0.5, 0.9``."""
    return np.diff(np.concatenate(([0.0], _float64(levels), [1.0])))
