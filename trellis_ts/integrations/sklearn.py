"""scikit-learn: ``TrellisRegressor``, for pipelines, ``GridSearchCV`` and ``TimeSeriesSplit``.

Rows are steps of one series, in the order of time. The columns of ``X`` are covariates known in advance, such as prices
or holidays, and ``y`` is the series (or several, one per column). ``fit(X, y)`` trains on all rows; ``predict(X)``
forecasts the rows *that follow the training rows*, as many as ``X`` has: the split of ``TimeSeriesSplit``. A series
without covariates has a column that says nothing, such as ``np.zeros((n, 1))``.

A frame whose index holds times or periods brings its calendar along: hours and weekdays are then read as well, and a
gap between training and ``X`` (``TimeSeriesSplit(gap=...)``) is seen and bridged. Other rows are only counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_consistent_length, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from trellis_ts.datasets import calendar
from trellis_ts.errors import DataError
from trellis_ts.forecaster import Forecaster
from trellis_ts.integrations.indices import stamps_of
from trellis_ts.types import Columns, Covariate, Panel, Series

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trellis_ts.config import Loss, Preset
    from trellis_ts.integrations.indices import Stamps

    Values = NDArray[np.float64]

# One to read, one to learn to predict, one to choose the epoch by.
_FEWEST_ROWS = 3
# Arguments that are settings of ``trellis train`` by the same name.
_SETTINGS = (
    *("prediction_length", "context_length", "season_length", "loss", "width", "num_layers"),
    *("learning_rate", "max_epochs", "max_time"),
)


class TrellisRegressor(RegressorMixin, BaseEstimator):
    """Forecasts the rows that follow the training rows.

    Missing values are allowed in ``X`` and in ``y``.

    Args:
        preset: how much effort: ``fast`` takes well under a minute on two CPU cores, ``balanced`` minutes, ``accurate``
            up to an hour. It chooses what the others leave open.
        prediction_length: steps the model learns to predict; longer forecasts are fed back.
        context_length: past steps the model reads.
        season_length: steps in a season; none where rows are only counted, unless given.
        freq: pandas offset alias of the index of ``X``, where that does not tell.
        loss: what is minimised: ``quantile`` (the default), ``mae``, ``mse``, ``huber``, ``normal``, ``student_t``, or
            ``negative_binomial`` for counts.
        width: features per token.
        num_layers: blocks.
        learning_rate: peak learning rate.
        max_epochs: passes over the training windows at most.
        max_time: wall-clock limit such as ``"2m"``.
        random_state: seed of the initial weights and of the order of windows.
        settings: any other setting of ``trellis train`` by its name.

    Attributes:
        forecaster_: the trained ``Forecaster``; ``forecaster_.save(...)`` writes a model directory.
        n_features_in_: columns of ``X``.
    """

    def __init__(
        self,
        *,
        preset: Preset = "balanced",
        prediction_length: int | None = None,
        context_length: int | None = None,
        season_length: int | None = None,
        freq: str | None = None,
        loss: Loss | None = None,
        width: int | None = None,
        num_layers: int | None = None,
        learning_rate: float | None = None,
        max_epochs: int | None = None,
        max_time: str | None = None,
        random_state: int | np.random.RandomState | None = 0,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.preset = preset
        self.prediction_length = prediction_length
        self.context_length = context_length
        self.season_length = season_length
        self.freq = freq
        self.loss = loss
        self.width = width
        self.num_layers = num_layers
        self.learning_rate = learning_rate
        self.max_epochs = max_epochs
        self.max_time = max_time
        self.random_state = random_state
        self.settings = settings

    def fit(self, X: Any, y: Any) -> TrellisRegressor:
        """Trains on a series.

        Args:
            X: ``[rows, covariates]`` in the order of time.
            y: ``[rows]`` or ``[rows, series]``.

        Raises:
            ValueError: the arrays do not fit, or hold no numbers.
            ConfigError: a setting is out of its range.
            DataError: too few rows, or an index that is not regular.
        """
        index = _index_of(X)
        X, y = validate_data(
            self,
            X,
            y,
            validate_separately=(
                {"dtype": np.float64, "ensure_all_finite": "allow-nan", "ensure_min_samples": _FEWEST_ROWS},
                {"dtype": np.float64, "ensure_all_finite": "allow-nan", "ensure_2d": False},
            ),
        )
        check_consistent_length(X, y)
        if np.isnan(y).all():
            raise ValueError("y holds not a single number; Input y contains NaN only")
        stamps = stamps_of(pd.RangeIndex(len(X)) if index is None else index, self.freq)
        self._is_flat = y.ndim == 1
        # One layout in memory, by which sums are rounded.
        self._panel = _panel(stamps, X, np.array(y.reshape(len(y), -1), order="C"))
        self._last = None if index is None else stamps.time[-1]
        given = {name: getattr(self, name) for name in _SETTINGS if getattr(self, name) is not None}
        settings = {"test_size": 0, "seed": self._seed(), **stamps.settings, **given, **(self.settings or {})}
        self.forecaster_ = Forecaster.fit_panel(self._panel, preset=self.preset, **settings)
        return self

    def predict(self, X: Any, quantile_levels: Sequence[float] | None = None) -> Values:
        """Forecasts the rows that follow the training rows.

        Args:
            X: their covariates, ``[rows, covariates]``.
            quantile_levels: levels between 0 and 1 to forecast instead of points.

        Returns:
            ``[rows]``, or ``[rows, series]`` after a ``y`` of several; with levels these are a last axis.

        Raises:
            ValueError: ``X`` does not fit.
            DataError: the index of ``X`` does not follow that of the training rows.
            ConfigError: a level the model cannot give.
        """
        check_is_fitted(self)
        index = _index_of(X)
        X = validate_data(self, X, reset=False, dtype=np.float64, ensure_all_finite="allow-nan")
        gap = 0 if index is None or self._last is None else self._gap(index)
        (series,) = self._panel.series
        assert series.known is not None
        known: Values = np.concatenate((series.known, np.full((gap, X.shape[1]), np.nan), X))
        future = Series(series.name, series.time, series.values, known=known)
        panel = Panel((future,), self._panel.columns, self._panel.freq, self._panel.timezone, source="X")
        forecast = self.forecaster_.forecast(
            panel, prediction_length=gap + len(X), quantile_levels=None if quantile_levels is None else quantile_levels
        )
        values = forecast.point if quantile_levels is None else forecast.quantiles
        assert values is not None
        rows: Values = values[0, gap:].double().numpy()  # [row, series] or [row, series, level]
        return rows[:, 0] if self._is_flat else rows

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.target_tags.multi_output = True
        # Rows to predict lie after those of the training, not among them.
        tags.regressor_tags.poor_score = True
        return tags

    def _seed(self) -> int:
        if isinstance(self.random_state, (int, np.integer)):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(1 << 31))

    def _gap(self, index: pd.Index) -> int:
        """Steps between the last training row and the first of ``X``, which has to be later."""
        freq, timezone = self._panel.freq, self._panel.timezone
        stamps = stamps_of(index, freq)
        both = np.array([self._last, stamps.time[0]], dtype="datetime64[ns]")
        first, second = calendar.step_numbers(both, freq, timezone)
        if stamps.freq != freq or second <= first:
            last, start = calendar.format_times(both, freq, timezone)
            raise DataError(
                f"X begins at {start}, but forecasts begin after the last training row, {last}; predict takes the rows "
                "that follow those of fit"
            )
        return int(second - first) - 1


def _index_of(X: Any) -> pd.Index | None:
    """The index of a frame, where it tells times."""
    index = getattr(X, "index", None)
    return index if isinstance(index, (pd.DatetimeIndex, pd.PeriodIndex)) else None


def _panel(stamps: Stamps, X: Values, y: Values) -> Panel:
    covariates = tuple(Covariate(f"x{column}", "known") for column in range(X.shape[1]))
    channels = ("y",) if y.shape[1] == 1 else tuple(f"y{column}" for column in range(y.shape[1]))
    series = Series("y", stamps.time, y, known=X)
    return Panel((series,), Columns("time", None, channels, covariates=covariates), stamps.freq, stamps.timezone)
