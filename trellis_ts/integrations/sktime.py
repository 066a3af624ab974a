"""sktime: ``TrellisForecaster``, one model for a series, a panel or a hierarchy of them.

Needs ``pip install "trellis-ts[sktime]"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from sktime.forecasting.base import BaseForecaster, ForecastingHorizon

from trellis_ts.datasets import calendar
from trellis_ts.forecaster import Forecaster
from trellis_ts.integrations.indices import stamps_of
from trellis_ts.types import Columns, Covariate, Panel, Series

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trellis_ts.config import Preset
    from trellis_ts.integrations.indices import Stamps
    from trellis_ts.types import Forecast

    Values = NDArray[np.float64]

_MTYPES = ["pd.DataFrame", "pd-multiindex", "pd_multiindex_hier"]


class TrellisForecaster(BaseForecaster):
    """Trellis forecaster with the interface of sktime.

    Several series (a panel or a hierarchy) train one model together. ``X`` holds covariates known in advance; rows of
    it that are missing over the horizon count as missing values. ``update`` reads new rows, from which forecasts then
    go on; weights stay as trained, whatever ``update_params`` says. A forecast of rows that were seen (``fh`` of 0 and
    less) is made one step ahead, from the rows before.

    Parameters
    ----------
    preset : str
        How much effort: ``fast`` takes well under a minute on two CPU cores, ``balanced`` minutes, ``accurate`` up to
        an hour. It chooses what the others leave open.
    prediction_length : int or None
        Steps the model learns to predict; longer horizons are fed back. The furthest of ``fh`` if that is known in
        ``fit``, else chosen from the data.
    context_length : int or None
        Past steps the model reads; chosen from the data unless given.
    season_length : int or None
        Steps in a season; that of the frequency unless given, none for an index that only counts.
    max_epochs : int or None
        Passes over the training windows at most.
    max_time : str or None
        Wall-clock limit such as ``"2m"``.
    random_state : int
        Seed of the initial weights and of the order of windows.
    settings : dict or None
        Any other setting of ``trellis train`` by its name.

    Attributes
    ----------
    forecaster_ : trellis_ts.Forecaster
        The trained model.

    Examples
    --------
    >>> from trellis_ts.integrations.sktime import TrellisForecaster
    >>> forecaster = TrellisForecaster(max_time="2m")
    >>> forecaster.fit(y, fh=[1, 2, 3])  # doctest: +SKIP
    >>> forecaster.predict_interval(coverage=0.9)  # doctest: +SKIP
    """

    _tags: ClassVar[dict[str, Any]] = {
        "y_inner_mtype": _MTYPES,
        "X_inner_mtype": _MTYPES,
        "capability:multivariate": True,
        "capability:exogenous": True,
        "capability:insample": True,
        "capability:pred_int": True,
        "capability:pred_int:insample": True,
        "capability:missing_values": True,
        "capability:update": True,
        "capability:categorical_in_X": False,
        "capability:random_state": True,
        "property:randomness": "derandomized",
        "requires-fh-in-fit": False,
        "X-y-must-have-same-index": True,
    }
    # What was seen is kept here, once.
    _config: ClassVar[dict[str, Any]] = {"remember_data": False}

    def __init__(
        self,
        preset: Preset = "balanced",
        prediction_length: int | None = None,
        context_length: int | None = None,
        season_length: int | None = None,
        max_epochs: int | None = None,
        max_time: str | None = None,
        random_state: int = 0,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.preset = preset
        self.prediction_length = prediction_length
        self.context_length = context_length
        self.season_length = season_length
        self.max_epochs = max_epochs
        self.max_time = max_time
        self.random_state = random_state
        self.settings = settings
        super().__init__()
        self._y: Any = None
        self._X: Any = None

    def _fit(self, y: pd.DataFrame, X: pd.DataFrame | None, fh: Any) -> TrellisForecaster:
        self._y, self._X = y, X
        horizon = self.prediction_length
        if horizon is None and fh is not None:
            furthest = int(self._relative(fh).max())
            horizon = furthest if furthest > 0 else None
        panel, settings = self._panel(None, 0)
        named = ("context_length", "season_length", "max_epochs", "max_time")
        given = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        if horizon is not None:
            given["prediction_length"] = horizon
        settings = {"test_size": 0, "seed": int(self.random_state), **settings, **given, **(self.settings or {})}
        self.forecaster_ = Forecaster.fit_panel(panel, preset=self.preset, **settings)
        return self

    def _update(self, y: pd.DataFrame, X: pd.DataFrame | None = None, update_params: bool = True) -> TrellisForecaster:
        self._y = y.combine_first(self._y)[self._y.columns]
        if X is not None and self._X is not None:
            self._X = X.combine_first(self._X)[self._X.columns]
        return self

    def _predict(self, fh: Any, X: pd.DataFrame | None) -> pd.DataFrame:
        values = self._forecasts(fh, X, None)
        return pd.DataFrame(values, index=self._expected_index(fh), columns=self._y.columns)

    def _predict_quantiles(self, fh: Any, X: pd.DataFrame | None, alpha: Sequence[float]) -> pd.DataFrame:
        values = self._forecasts(fh, X, alpha)  # [row, channel, level]
        columns = pd.MultiIndex.from_product([self._get_varnames(), alpha])
        return pd.DataFrame(values.reshape(len(values), -1), index=self._expected_index(fh), columns=columns)

    def _forecasts(self, fh: Any, X: pd.DataFrame | None, levels: Sequence[float] | None) -> Values:
        """One row per series and step of the horizon, in the order of the expected index; ``[row, channel, ...]``."""
        steps = self._relative(fh)
        panel, _ = self._panel(X, max(0, int(steps.max())))
        num_series = len(panel.series)
        every = np.arange(num_series, dtype=np.int64)
        ends = np.array([len(each) for each in panel.series], dtype=np.int64)
        shape = (num_series, len(steps), panel.num_channels)
        values = np.full(shape if levels is None else (*shape, len(levels)), np.nan)
        if (ahead := steps > 0).any():
            forecast = self.forecaster_.forecast(panel, prediction_length=int(steps.max()))
            values[:, ahead] = _values(forecast, levels)[:, steps[ahead] - 1]
        series, places = np.meshgrid(every, np.flatnonzero(~ahead), indexing="ij")
        origins = ends[series] - 1 + steps[places]
        seen = origins >= 0  # steps before a series began stay missing
        if seen.any():
            forecast = self.forecaster_.forecast_windows(panel, series[seen], origins[seen])
            values[series[seen], places[seen]] = _values(forecast, levels)[:, 0]
        return values.reshape(num_series * len(steps), *values.shape[2:])

    def _relative(self, fh: Any) -> NDArray[np.int64]:
        """The horizon in steps after the cutoff."""
        steps: NDArray[np.int64] = fh.to_relative(self.cutoff).to_numpy().astype(np.int64)
        return steps

    def _expected_index(self, fh: Any) -> pd.Index:
        if fh.freq is None and isinstance(self.cutoff, pd.DatetimeIndex):  # series of different lengths
            freq = self.forecaster_.checkpoint.data.freq
            fh = ForecastingHorizon(fh.to_pandas(), is_relative=fh.is_relative, freq=freq)
        absolute: pd.Index = fh.to_absolute_index(self.cutoff)
        index = self._y.index
        if not isinstance(index, pd.MultiIndex):
            return absolute
        rows = [(*_as_tuple(key), stamp) for key in _instances(index) for stamp in absolute]
        return pd.MultiIndex.from_tuples(rows, names=index.names)

    def _panel(self, X: pd.DataFrame | None, horizon: int) -> tuple[Panel, dict[str, Any]]:
        """All rows seen so far, every series up to the cutoff, with the covariates given for later ones.

        Args:
            X: covariates of rows after those that were seen.
            horizon: steps after the cutoff for which there are to be covariates, if missing ones.

        Returns:
            The series, and what training has to know of an index that only counts.
        """
        y, keys = self._y, _instances(self._y.index)
        parts = [each for each in (self._X, X) if each is not None] if self._X is not None else []
        known = pd.concat(parts) if parts else None
        if known is not None:
            known = known[~known.index.duplicated(keep="last")].sort_index()
        series = []
        for key in keys:
            rows = y if key is None else y.loc[key]
            index = _to_cutoff(rows.index, self.cutoff)
            stamps = stamps_of(index, getattr(self.cutoff, "freqstr", None))
            covariates = None if known is None else _known(known if key is None else known.loc[key], stamps, horizon)
            name = "y" if key is None else "/".join(map(str, _as_tuple(key)))
            series.append(Series(name, stamps.time, rows.reindex(index).to_numpy(np.float64), known=covariates))
        columns = Columns(
            time="time",
            id=None if keys == [None] else "series",
            channels=("y",) if y.shape[1] == 1 else tuple(f"y{column}" for column in range(y.shape[1])),
            covariates=tuple(
                Covariate(f"x{column}", "known") for column in range(0 if known is None else known.shape[1])
            ),
        )
        return Panel(tuple(series), columns, stamps.freq, stamps.timezone, source="y"), stamps.settings

    @classmethod
    def get_test_params(cls, parameter_set: str = "default") -> list[dict[str, Any]]:
        """Settings small enough for sktime's own tests."""
        tiny: dict[str, Any] = {"num_heads": 2, "num_slots": 4, "num_layers": 1, "width": 8, "feedforward_width": 8}
        tiny |= {"windows_per_epoch": 8, "validation_windows": 4}
        return [
            {"max_epochs": 1, "settings": tiny},
            {"max_epochs": 1, "prediction_length": 2, "context_length": 4, "season_length": 2, "settings": tiny},
        ]


def _instances(index: pd.Index) -> list[Any]:
    """What names each series of a panel or hierarchy, in order; a single None for one series."""
    return list(index.droplevel(-1).unique()) if isinstance(index, pd.MultiIndex) else [None]


def _as_tuple(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def _to_cutoff(index: pd.Index, cutoff: pd.Index) -> pd.Index:
    """The index of one series, with the steps up to the last row of the longest."""
    last = cutoff[0]
    if index[-1] == last:
        return index
    if isinstance(index, pd.PeriodIndex):
        return index.append(pd.period_range(index[-1], last, freq=index.freq)[1:])
    if isinstance(index, pd.DatetimeIndex):
        freq = index.freqstr or getattr(cutoff, "freqstr", None) or stamps_of(index).freq
        return index.append(pd.date_range(index[-1], last, freq=freq)[1:])
    return index.append(pd.RangeIndex(index[-1] + 1, last + 1))


def _known(X: pd.DataFrame, stamps: Stamps, horizon: int) -> Values:
    """The covariates from a series' first row on, ``[T + F, K]``; steps without a row are missing."""
    where = stamps_of(X.index, stamps.freq, is_regular=False)
    numbers = calendar.step_numbers(np.concatenate((stamps.time[:1], where.time)), stamps.freq, stamps.timezone)
    steps = numbers[1:] - numbers[0]
    known = np.full((max(len(stamps.time) + horizon, int(steps.max()) + 1), X.shape[1]), np.nan)
    inside = steps >= 0
    known[steps[inside]] = X.to_numpy(np.float64)[inside]
    return known


def _values(forecast: Forecast, levels: Sequence[float] | None) -> Values:
    """``[window, horizon, channel]``, with levels as a last axis in the order they were asked for."""
    if levels is None:
        return forecast.point.double().numpy()
    return np.stack([forecast.quantile(level).double().numpy() for level in levels], axis=-1)
