"""Which seasons the data have: the autocorrelation at the lengths a calendar suggests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trellis_ts.datasets import calendar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trellis_ts.types import Panel

# Autocorrelation from which a season counts. White noise of 60 points stays below it 19 times in 20.
_LEAST_STRENGTH = 0.25
# What a longer season must add to the autocorrelation of the shorter one it is a multiple of.
_LEAST_GAIN = 0.05
# Cycles that the rows must hold for a season to be estimated at all.
_LEAST_CYCLES = 3
# Bounds on what is looked at; a season is as plain in a sample of series and in their last rows.
_MOST_SERIES, _MOST_ROWS = 200, 20_000


def seasonal_autocorrelation(values: NDArray[np.float64], length: int) -> float:
    """Correlation of a series with itself one season earlier, once its level, a running mean, is taken off.

    Args:
        values: ``[time]``, NaN where nothing was measured.
        length: steps in the season.

    Returns:
        Between -1 and 1; NaN where the series is too short for ``3`` seasons or does not vary.
    """
    window = length + 1 - length % 2
    if len(values) < _LEAST_CYCLES * length:
        return np.nan
    deviation = _without_level(values, window)
    earlier, later = deviation[:-length], deviation[length:]
    both = ~(np.isnan(earlier) | np.isnan(later))
    if both.sum() < max(8, length):
        return np.nan
    earlier, later = earlier[both] - earlier[both].mean(), later[both] - later[both].mean()
    size = np.sqrt((earlier**2).sum() * (later**2).sum())
    # Relative to the values, so that a constant does not correlate by its rounding.
    if size <= 1e-18 * max(1e-300, float(np.nanmax(np.abs(values))) ** 2) * len(values):
        return np.nan
    return float((earlier * later).sum() / size)


def _without_level(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The values less the mean of those observed in the window around each; the ends see a shorter window."""
    observed = ~np.isnan(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(observed, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(observed)))
    index = np.arange(len(values))
    start, stop = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    mean: NDArray[np.float64] = (sums[stop] - sums[start]) / np.maximum(counts[stop] - counts[start], 1)
    return values - mean


def season_strengths(panel: Panel, rows: Sequence[tuple[int, int]], lengths: Sequence[int]) -> dict[int, float]:
    """The median autocorrelation of the given rows of the series' channels at each length, where it can be estimated.

    Args:
        panel: the series.
        rows: half-open rows per series.
        lengths: candidate seasons in steps.
    """
    pieces = [
        series.values[max(start, stop - _MOST_ROWS) : stop, channel]
        for series, (start, stop) in zip(panel.series, rows, strict=True)
        for channel in range(panel.num_channels)
    ]
    chosen = np.linspace(0, len(pieces) - 1, min(len(pieces), _MOST_SERIES)).round().astype(int)
    found = {}
    for length in lengths:
        each = np.array([seasonal_autocorrelation(pieces[index], length) for index in chosen])
        if not np.isnan(each).all():
            found[length] = float(np.nanmedian(each))
    return found


def find_seasons(panel: Panel, rows: Sequence[tuple[int, int]]) -> dict[int, float]:
    """The seasons that stand out in the given rows, shortest first, with their autocorrelation.

    Candidates are the calendar's: a day and a week of sub-daily data, a week and a year of daily data, a year of
    coarser data. A multiple of a shorter season counts if it adds something: Monday has to be more like last
    Monday than like Sunday.
    """
    candidates = calendar.season_candidates(panel.freq)
    lags = sorted({*candidates, *(long - short for long in candidates for short in candidates if long > short)})
    strengths = season_strengths(panel, rows, lags)
    found: dict[int, float] = {}
    for length in candidates:
        strength = strengths.get(length, 0.0)
        between = max((strengths.get(length - shorter, 0.0) for shorter in found), default=-1.0)
        if strength >= _LEAST_STRENGTH and strength >= between + _LEAST_GAIN:
            found[length] = strength
    return found
