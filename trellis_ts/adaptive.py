"""Bands that follow what came true, in a backtest as in operation: their widths are tracked over the origins.

The calibration of ``trellis_ts.conformal`` is made once, on validation windows, and time moves on. A forecaster that
is used again and again sees how its last bands did, and may widen or narrow the next. ``AdaptiveWidths`` does that with
one factor per band: online gradient descent on the pinball loss, as in the quantile tracking of Angelopoulos, Candès
and Tibshirani (2023, "Conformal PID control for time series prediction"), here on the logarithm of the width and pooled
over series, channels and steps, so that a handful of origins is enough to act on. (``conformal.AdaptiveConformal``
moves a level for every value by itself; it promises more and needs hundreds of origins.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from trellis_ts.errors import ConfigError
from trellis_ts.quantiles import QuantileCurve, central_bands, normal_score, rising

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from trellis_ts.datasets.windows import ScaledPanel
    from trellis_ts.types import Forecast, Panel

# A band without any width misses for ever, and no factor would help it.
_LARGEST_FACTOR = 100.0


class AdaptiveWidths:
    """A factor for the width of every band, which grows while the band covers too little and shrinks while too much.

    With a share ``missed`` of the values of one horizon outside a band of coverage ``b``, the logarithm of its factor
    moves by ``rate * (missed - (1 - b))``. So the share of misses over ``T`` horizons differs from ``1 - b`` by
    ``|log(factor)| / (rate * T)``, whatever the data do, while the factor stays between its limits of 1/100 and 100.

    Args:
        levels: quantile levels of the forecasts; two that lie symmetrically are a band.
        rate: how fast a factor moves; a larger one follows changes sooner, and its bands are more restless.

    Raises:
        ConfigError: no two levels are a band.
    """

    def __init__(self, levels: Sequence[float], *, rate: float = 0.5) -> None:
        if not 0 < rate < math.inf:
            raise ConfigError(f"rate={rate} must be positive and finite")
        self.levels, self.rate = tuple(levels), rate
        bands = central_bands(self.levels)
        if not bands:
            raise ConfigError(
                f"quantile levels {list(self.levels)} hold no band to adapt, that is no two such as 0.1 and 0.9; train "
                "with --loss quantile or a distribution, and with such levels"
            )
        self._edges = list(bands.values())
        self.bands = tuple(bands)
        """Nominal coverages, rising."""
        self._log_factors = np.zeros(len(self.bands))

    @property
    def factors(self) -> dict[float, float]:
        """The present factor of each band."""
        return dict(zip(self.bands, np.exp(self._log_factors).tolist(), strict=True))

    def apply(self, forecast: Forecast) -> Forecast:
        """The forecast with its quantiles moved from or to the median; the points stay.

        Levels between bands take a factor interpolated in the normal score, those beyond the widest band its factor.
        """
        levels = tuple(sorted({0.5, *self.levels}))
        values = torch.stack([forecast.quantile(level) for level in levels], dim=-1).double()
        middle = levels.index(0.5)
        median = values[..., middle : middle + 1]
        score = np.abs(normal_score(torch.tensor(levels, dtype=torch.float64)).numpy())
        edges = normal_score((1 + torch.tensor(self.bands, dtype=torch.float64)) / 2).numpy()
        factors = torch.from_numpy(np.exp(np.interp(score, edges, self._log_factors)))
        values = rising(median + (values - median) * factors, middle).to(forecast.point.dtype)
        own = [levels.index(level) for level in self.levels]
        return replace(forecast, distribution=QuantileCurve(levels, values), quantiles=values[..., own])

    def missed(self, forecast: Forecast, truth: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether a value lies outside each band of a forecast: ``[batch, step, channel, band]``."""
        if forecast.quantiles is None:
            raise AssertionError("a forecast with bands has quantiles")
        quantiles = forecast.quantiles.double().numpy()
        lower, upper = (quantiles[..., [edges[side] for edges in self._edges]] for side in (0, 1))
        return (truth[..., None] < lower) | (truth[..., None] > upper)

    def learn(self, missed: NDArray[np.float64], share: float = 1.0) -> None:
        """Moves the factors.

        Args:
            missed: per band, the share of the values outside.
            share: of a horizon these values are; 1 for a whole one.
        """
        moved = self._log_factors + self.rate * share * (missed - (1 - np.array(self.bands)))
        self._log_factors = np.clip(moved, -math.log(_LARGEST_FACTOR), math.log(_LARGEST_FACTOR))


@dataclass
class _Pending:
    """Forecasts of one origin stamp, of which the first ``num_known`` steps were learnt from."""

    forecast: Forecast
    series: NDArray[np.int64]
    origins: NDArray[np.int64]
    num_known: int = 0


class AdaptiveForecasts:
    """Forecasts whose bands adapt from origin to origin, by values from before each origin only.

    Called with the windows of one origin stamp at a time, stamps rising. At a step shorter than the horizon values are
    forecast several times, and each time counts for less.

    Args:
        forecast: from series and origins, as of ``trellis_ts.evaluation.Contender``.
        panel: the series.
        scaled: the same on the scale of the forecasts.
        levels: quantile levels of the forecasts.
        step: rows from one origin to the next.
    """

    def __init__(
        self,
        forecast: Callable[[NDArray[np.int64], NDArray[np.int64]], Forecast],
        panel: Panel,
        scaled: ScaledPanel,
        levels: Sequence[float],
        *,
        step: int,
    ) -> None:
        self._forecast, self._panel, self._scaled, self._step = forecast, panel, scaled, step
        self.widths = AdaptiveWidths(levels)
        self._pending: list[_Pending] = []

    def __call__(self, series: NDArray[np.int64], origins: NDArray[np.int64]) -> Forecast:
        now = self._panel.series[series[0]].time[origins[0]]
        for each in self._pending:
            self._learn(each, now)
        self._pending = [each for each in self._pending if each.num_known < each.forecast.point.shape[1]]
        forecast = self.widths.apply(self._forecast(series, origins))
        self._pending.append(_Pending(forecast, series, origins))
        return forecast

    def _learn(self, pending: _Pending, now: np.datetime64) -> None:
        """Learns from the steps that came true since the last time, and before ``now``."""
        horizon = pending.forecast.point.shape[1]
        first = pending.origins[0]
        times = self._panel.series[pending.series[0]].time[first : first + horizon]
        start, stop = pending.num_known, int(np.searchsorted(times, now))
        if stop <= start:
            return
        pending.num_known = stop
        batch = self._scaled.gather(pending.series, pending.origins, 0, horizon)
        if batch.future is None or batch.future_observed is None:
            raise AssertionError("a window that reaches ahead has a future")
        observed = batch.future_observed.numpy()
        missed = self.widths.missed(pending.forecast, batch.future.double().numpy())
        new = np.zeros_like(observed)
        new[:, start:stop] = observed[:, start:stop]
        if new.any():
            share = new.sum() / new.size * min(1.0, self._step / horizon)
            self.widths.learn(missed[new].mean(axis=0), share)
