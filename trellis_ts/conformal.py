"""Bands that cover what they say: split conformal calibration on validation windows, and its adaptive form.

**Split conformal** (conformalised quantile regression, Romano et al. 2019). For a band of nominal coverage ``b`` with
the edges ``lower`` and ``upper``, the score of an observed value is ``max(lower - y, y - upper)``: how far outside it
lies, negative inside. The band is widened (or narrowed) by the ``ceil((n + 1) b)``-th smallest of ``n`` scores. Scores
are taken on the scale of the training rows, so that series of different units pool, and per step of the horizon; where
a step has few of them, those of the neighbouring steps join in. A band is widened in full, but narrowed only by the
share ``n / (n + 20)`` of ``n`` windows that do not overlap: few windows prove little, and a band too wide is the
smaller harm. Around a forecast of points this is split conformal
prediction with absolute errors.

The guarantee, coverage of at least ``b`` on average, holds for windows that could be swapped with those to come.
Validation windows are not quite such: they overlap and depend on each other, so there are fewer independent scores than
counted; the best epoch was chosen on them, which makes the scores a little too small; and time moves on. Measure the
coverage on rows held out (``trellis evaluate``), and follow it in operation with ``AdaptiveConformal``, whose long-run
coverage needs no such assumption (Gibbs and Candès 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from trellis_ts.config import Closed
from trellis_ts.copula import LARGEST_LAG, lag_correlations
from trellis_ts.distributions import PredictiveDistribution
from trellis_ts.errors import ConfigError
from trellis_ts.quantiles import QuantileCurve, normal_score, rising

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

    from trellis_ts.datasets.windows import WindowDataset
    from trellis_ts.types import Batch, Forecast

BANDS = (0.5, 0.8, 0.9, 0.95)
"""Nominal coverages that are calibrated; the offsets of others are interpolated."""
# Fewer scores than this at a step, and those of the steps beside it join in.
_ENOUGH_SCORES = 100
# Windows imagined beside those seen that would not have a band narrowed.
_PRIOR_WINDOWS = 20
_WINDOWS_PER_BATCH = 256
# Scores kept in memory at most; of more windows an even choice is taken.
_MOST_VALUES = 5_000_000
# Levels at which a distribution is tabulated before its offsets are added.
_TABULATED = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.175, 0.25, 0.375)
# Widens bands of counts by less than any count, so that rounding leaves no edge short of the count it stands on.
_COUNT_SLACK = 1e-5


@dataclass(frozen=True)
class Calibration(Closed):
    """What the validation windows taught about bands and paths.

    ``offsets`` (``[band][step]``, on the scale of the training rows) is what each edge moves outwards; ``correlations``
    (``[step][lag - 1]``) is the copula of ``trellis_ts.copula``.
    """

    bands: tuple[float, ...]
    offsets: tuple[tuple[float, ...], ...]
    correlations: tuple[tuple[float, ...], ...]
    num_windows: int
    """Validation windows the scores come from."""
    num_independent: int
    """How many of them, times channels, do not overlap."""
    pooled_steps: int
    """Most steps whose scores were joined for one step's offset; 1 where each has its own."""

    def __post_init__(self) -> None:
        bands = list(self.bands)
        if bands != sorted(set(bands)) or not all(0 < band < 1 for band in bands):
            raise ConfigError("calibrated bands must rise and lie between 0 and 1")
        horizon = len(self.correlations)
        if len(self.offsets) != len(bands) or any(len(row) != horizon for row in self.offsets):
            raise ConfigError("a calibration needs one offset per band and step")
        if not all(math.isfinite(each) for row in self.offsets for each in row):
            raise ConfigError("a calibrated offset is no number")
        lags = min(LARGEST_LAG, horizon - 1)
        if any(len(row) != lags or not all(abs(each) <= 1 for each in row) for row in self.correlations):
            raise ConfigError(f"a calibration needs {lags} correlations from -1 to 1 per step")

    @property
    def prediction_length(self) -> int:
        """Steps it was made for."""
        return len(self.correlations)


def calibrate(
    model: Callable[[Batch], Forecast], windows: WindowDataset, *, device: torch.device
) -> Calibration | None:
    """Scores the model's bands on the windows, which should be those of the validation rows.

    Returns:
        None where there is nothing to learn from: no observed value, or a model of one quantile that is not the median.
    """
    chosen = _even_choice(len(windows), windows.prediction_length * windows.panel.num_channels)
    scores, ranks, slack = [], [], 0.0
    with torch.inference_mode():
        for batch in _batches(windows, chosen):
            forecast = model(batch.to(device)).map(torch.Tensor.cpu)
            if batch.future is None or batch.future_observed is None:
                raise ValueError("a window to calibrate on needs a future")
            if _tells_nothing(forecast):
                return None
            future, missing = batch.future.double(), ~batch.future_observed
            if isinstance(forecast.distribution, PredictiveDistribution):
                slack = _COUNT_SLACK if forecast.distribution.family == "negative_binomial" else 0.0
            scores.append(_scores(forecast, future).masked_fill(missing[..., None], math.nan).numpy())
            ranks.append(_place(forecast, future).masked_fill(missing, math.nan).numpy())
    if not scores or np.isnan(together := np.concatenate(scores)).all():
        return None
    count = _num_independent(windows, chosen)
    offsets, pooled = _offsets(together, count)
    return Calibration(
        bands=BANDS[: len(offsets)],
        offsets=tuple(tuple(float(f"{each + slack:.9g}") for each in row) for row in offsets),
        correlations=lag_correlations(np.concatenate(ranks).astype(np.float64), num_independent=count),
        num_windows=len(chosen),
        num_independent=count,
        pooled_steps=pooled,
    )


@dataclass(frozen=True, eq=False)
class Shifts:
    """What a calibration adds to the forecasts of one kind: ``offsets`` (``[step, 1, level]``) to ``levels``."""

    levels: tuple[float, ...]
    offsets: Tensor

    @classmethod
    def of(cls, calibration: Calibration, forecast: Forecast) -> Shifts:
        """Those for forecasts with the levels and the horizon of this one."""
        levels = _levels_of(calibration, forecast)
        return cls(levels, _signed_offsets(calibration, levels, forecast.point.shape[1]))

    def apply(self, forecast: Forecast) -> Forecast:
        """The forecast with its bands calibrated."""
        values = _quantiles(forecast, self.levels).double()
        values = rising(values + self.offsets.to(values), self.levels.index(0.5))
        curve = QuantileCurve(self.levels, values.to(forecast.point.dtype))
        own = [self.levels.index(level) for level in forecast.quantile_levels]
        return replace(forecast, distribution=curve, quantiles=curve.values[..., own] if own else None)


def apply(calibration: Calibration, forecast: Forecast) -> Forecast:
    """A forecast on the scale of the training rows with its bands calibrated; the points stay what they are.

    Quantiles do not cross: where offsets would make them, the outer one is moved out to the inner. Steps beyond the
    calibrated horizon take the last step's offsets.
    """
    if _is_bare(forecast) and not calibration.bands:
        return forecast
    return Shifts.of(calibration, forecast).apply(forecast)


def _levels_of(calibration: Calibration, forecast: Forecast) -> tuple[float, ...]:
    """The calibrated edges, the median, the forecast's own levels and those that show a distribution's shape."""
    levels = {0.5, *forecast.quantile_levels}
    half = [(1 - band) / 2 for band in (calibration.bands or BANDS)]
    if forecast.distribution is not None:
        half += _TABULATED
    levels |= {round(each, 9) for each in half} | {round(1 - each, 9) for each in half}
    return tuple(sorted(levels))


@lru_cache(maxsize=16)  # a model forecasts again and again with one calibration
def _signed_offsets(
    calibration: Calibration, levels: tuple[float, ...], horizon: int
) -> Float[Tensor, "horizon 1 quantile"]:
    """What is added to each level: linear in the normal score from 0 at the median, the widest band's beyond it."""
    score = normal_score(torch.tensor(levels, dtype=torch.float64)).numpy()
    edges = normal_score((1 + torch.tensor([0.0, *calibration.bands], dtype=torch.float64)) / 2).numpy()
    steps = np.minimum(np.arange(horizon), calibration.prediction_length - 1)
    table = np.array([[0.0] * calibration.prediction_length, *calibration.offsets])[:, steps]  # [band, horizon]
    offsets = np.stack([np.interp(np.abs(score), edges, table[:, step]) for step in range(horizon)])
    return torch.from_numpy(np.sign(score) * offsets)[:, None]


def _is_bare(forecast: Forecast) -> bool:
    """Whether it says nothing but points."""
    return forecast.distribution is None and len(forecast.quantile_levels) < 2


def _tells_nothing(forecast: Forecast) -> bool:
    """One quantile that is not the median: neither a band nor the middle of one."""
    return _is_bare(forecast) and forecast.quantile_levels not in ((), (0.5,))


def _quantiles(forecast: Forecast, levels: Sequence[float]) -> Float[Tensor, "batch horizon channel quantile"]:
    """Quantiles at any levels; a forecast of points is a band without width."""
    if _is_bare(forecast):
        return forecast.point[..., None].expand(*forecast.point.shape, len(levels))
    if forecast.quantiles is not None and tuple(levels) == forecast.quantile_levels:
        return forecast.quantiles
    return torch.stack([forecast.quantile(level) for level in levels], dim=-1)


def _scores(forecast: Forecast, future: Tensor) -> Float[Tensor, "batch horizon channel band"]:
    half = [(1 - band) / 2 for band in BANDS]
    lower = _quantiles(forecast, [round(each, 9) for each in half])
    upper = _quantiles(forecast, [round(1 - each, 9) for each in half])
    return torch.maximum(lower - future[..., None], future[..., None] - upper).float()


def _place(forecast: Forecast, future: Tensor) -> Float[Tensor, "batch horizon channel"]:
    """Where each value lies in its forecast distribution; how far from a point."""
    if _is_bare(forecast):
        return future - forecast.point
    return forecast.marginal().cdf(future)


def _offsets(scores: NDArray[np.float32], num_independent: int) -> tuple[list[list[float]], int]:
    """Offsets ``[band][step]`` and the most steps joined for one; wide bands that the scores are too few for are left
    out."""
    observed = (~np.isnan(scores[..., 0])).sum(axis=(0, 2))  # per step
    horizon = len(observed)
    total = np.concatenate(([0], np.cumsum(observed)))
    ranges = []
    for step in range(horizon):
        reach = 0
        while True:
            start, stop = max(0, step - reach), min(horizon, step + reach + 1)
            if total[stop] - total[start] >= _ENOUGH_SCORES or stop - start == horizon:
                break
            reach += 1
        ranges.append((start, stop))
    result = []
    fewest = min(int(total[stop] - total[start]) for start, stop in ranges)
    for index, band in enumerate(BANDS):
        if math.ceil((fewest + 1) * band) > fewest:
            break
        found = [_conformal_quantile(scores[:, start:stop, :, index], band) for start, stop in ranges]
        narrowing = num_independent / (num_independent + _PRIOR_WINDOWS)
        result.append([offset if offset > 0 else offset * narrowing for offset in found])
    return result, max(stop - start for start, stop in ranges)


def _conformal_quantile(scores: NDArray[np.float32], band: float) -> float:
    """The ``ceil((n + 1) band)``-th smallest of the ``n`` scores that are not NaN."""
    found = scores[~np.isnan(scores)]
    rank = math.ceil((len(found) + 1) * band)
    return float(np.partition(found, rank - 1)[rank - 1])


def _even_choice(num_windows: int, values_per_window: int) -> NDArray[np.int64]:
    most = max(1, min(num_windows, _MOST_VALUES // values_per_window))
    return np.linspace(0, num_windows - 1, most).round().astype(np.int64) if num_windows else np.zeros(0, np.int64)


def _batches(windows: WindowDataset, chosen: NDArray[np.int64]) -> Iterator[Batch]:
    for start in range(0, len(chosen), _WINDOWS_PER_BATCH):
        yield windows.__getitems__(chosen[start : start + _WINDOWS_PER_BATCH].tolist())


def _num_independent(windows: WindowDataset, chosen: NDArray[np.int64]) -> int:
    """Windows that do not overlap, over all series, times the channels."""
    series, origins = windows.locate(chosen)
    horizon, count = windows.prediction_length, 0
    for each in np.unique(series):
        own = origins[series == each]
        count += min(len(own), int(own.max() - own.min()) // horizon + 1)
    return count * windows.panel.num_channels


class AdaptiveConformal:
    """Bands that learn from what came true, for forecasts made again and again (adaptive conformal inference).

    Every series, step and channel has its own miss rate ``alpha`` per band, which starts at ``1 - band`` and moves by
    ``rate * (1 - band - missed)`` with each update: down, to wider bands, after a miss, and up by less otherwise. Over
    ``T`` updates the share of misses differs from ``1 - band`` by at most
    ``(max(band, 1 - band) + rate) / (rate * T)``, whatever the data do. For that the band is infinitely wide where
    ``alpha`` has fallen to 0 or below: no finite one would have kept the promise.

    Args:
        bands: nominal coverages.
        rate: how fast it moves; a larger one follows changes sooner, and its bands are more restless.

    Example:
        >>> adaptive = AdaptiveConformal([0.8, 0.95])                              # doctest: +SKIP
        >>> lower, upper = adaptive.band(forecast, 0.95)                           # doctest: +SKIP
        >>> adaptive.update(actual, forecast)  # once the actual values are known   # doctest: +SKIP
    """

    def __init__(self, bands: Sequence[float] = (0.8, 0.95), *, rate: float = 0.02) -> None:
        if not bands or not all(0 < band < 1 for band in bands):
            raise ConfigError(f"bands={list(bands)} must lie between 0 and 1, and there must be one")
        if not 0 < rate < 1:
            raise ConfigError(f"rate={rate} must lie between 0 and 1")
        self.bands, self.rate = tuple(bands), rate
        self._alpha: dict[float, Tensor] = {}

    def alpha(self, band: float) -> Tensor:
        """The present miss rates of a band, ``[batch, horizon, channel]`` once there was an update."""
        if band not in self.bands:
            raise ConfigError(f"band {band} is not among those that are adapted: {list(self.bands)}")
        return self._alpha.get(band, torch.tensor(1 - band, dtype=torch.float64))

    def set_alpha(self, alpha: Mapping[float, Tensor]) -> None:
        """Goes on from miss rates ``[batch, horizon, channel]`` kept elsewhere.

        Raises:
            ConfigError: a band that is not adapted.
        """
        for band, values in alpha.items():
            self.alpha(band)
            self._alpha[band] = values.double()

    def band(self, forecast: Forecast, band: float) -> tuple[Tensor, Tensor]:
        """Lower and upper edge ``[batch, horizon, channel]`` at the present level.

        Raises:
            ConfigError: a band that is not adapted, or a forecast of points.
        """
        alpha = self.alpha(band).expand(forecast.point.shape)
        curve, level = forecast.marginal(), alpha.clamp(0.0, 1.0) / 2
        lower, upper = curve.quantile(level).double(), curve.quantile(1 - level).double()
        return lower.masked_fill(alpha <= 0, -math.inf), upper.masked_fill(alpha <= 0, math.inf)

    def update(self, actual: Float[Tensor, "batch horizon channel"], forecast: Forecast) -> None:
        """Learns from values that came true; NaN where none did yet.

        Raises:
            ConfigError: the shapes differ from each other or from those before.
        """
        if actual.shape != forecast.point.shape:
            raise ConfigError(
                f"actual values {list(actual.shape)} do not fit the forecast {list(forecast.point.shape)}"
            )
        for band in self.bands:
            alpha = self.alpha(band)
            if alpha.ndim and alpha.shape != actual.shape:
                raise ConfigError(f"actual values {list(actual.shape)} do not fit those before, {list(alpha.shape)}")
            lower, upper = self.band(forecast, band)
            # At a rate of 1 the band is empty, and everything is outside.
            missed = (actual < lower) | (actual > upper) | (alpha >= 1)
            moved = alpha + self.rate * (1 - band - missed.double())
            self._alpha[band] = torch.where(actual.isnan(), alpha, moved)
