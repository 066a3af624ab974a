"""Backtests: how good a model is on rows it has not seen, beside forecasts anyone can make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from trellis_ts import metrics
from trellis_ts.adaptive import AdaptiveForecasts
from trellis_ts.baselines import NAIVE_BASELINES, naive_forecast
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.errors import ConfigError, DataError
from trellis_ts.origins import RollingOrigins
from trellis_ts.scored import Scored
from trellis_ts.scores import MODEL, ScoredWindows, ScoreSums
from trellis_ts.statistical import STATISTICAL_BASELINES, load_model, statistical_forecast
from trellis_ts.types import Forecast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from trellis_ts.config import WindowShape
    from trellis_ts.datasets.splits import Scaler
    from trellis_ts.forecaster import Forecaster
    from trellis_ts.scores import Evaluation
    from trellis_ts.types import Panel

BASELINES = (*NAIVE_BASELINES, *STATISTICAL_BASELINES)
_WINDOWS_PER_BATCH = 256
# Forecast values scored at once, so that many channels and a long horizon take no more memory than few and a short one.
_VALUES_PER_BATCH = 1 << 21
# A fit takes up to seconds: smaller batches let the progress move, and Ctrl-C through.
_FITTED_WINDOWS_PER_BATCH = 4
# Seasons the baselines read where the model's context is shorter.
_SEASONS_READ = 10


class Contender(Protocol):
    """Forecasts windows on the standardised scale, from rows before their origins only."""

    def __call__(self, series: NDArray[np.int64], origins: NDArray[np.int64]) -> Forecast: ...


@dataclass(frozen=True, eq=False)
class _Field:
    """What every contender shares."""

    panel: Panel
    scaled: ScaledPanel
    scaler: Scaler
    shape: WindowShape
    levels: tuple[float, ...]

    @property
    def read_length(self) -> int:
        """Rows before an origin that baselines read."""
        return max(self.shape.context_length, _SEASONS_READ * self.shape.season_length)

    def model(self, forecaster: Forecaster) -> Contender:
        predict = forecaster.predictor(self.scaled)

        def forecast(series: NDArray[np.int64], origins: NDArray[np.int64]) -> Forecast:
            horizon = self.shape.prediction_length  # of known covariates; the values of the future stay out
            batch = self.scaled.gather(series, origins, self.shape.context_length, 0, horizon)
            return predict(batch)

        return forecast

    def refitted(self, refit: Callable[[Panel], Forecaster]) -> Contender:
        """Called with windows of one origin stamp at a time."""

        def forecast(series: NDArray[np.int64], origins: NDArray[np.int64]) -> Forecast:
            stamp = self.panel.series[series[0]].time[origins[0]]
            fitted = refit(_before(self.panel, range(len(self.panel.series)), stamp))
            found = fitted.forecast(_before(self.panel, series, stamp), prediction_length=self.shape.prediction_length)
            if found.quantile_levels != self.levels:
                raise ConfigError(
                    f"the refitted forecaster has quantile levels {list(found.quantile_levels)}, the model "
                    f"{list(self.levels)}; train both with the same quantile_levels"
                )
            loc, scale = (torch.from_numpy(each[series][:, None]) for each in (self.scaler.loc, self.scaler.scale))
            quantiles = found.quantiles
            return Forecast(
                (found.point - loc) / scale,
                None if quantiles is None else (quantiles - loc[..., None]) / scale[..., None],
                found.quantile_levels,
            )

        return forecast

    def naive(self, name: str) -> Contender:
        def forecast(series: NDArray[np.int64], origins: NDArray[np.int64]) -> Forecast:
            batch = self.scaled.gather(series, origins, self.read_length, 0)
            return naive_forecast(
                name,
                batch.context,
                batch.observed,
                season_length=self.shape.season_length,
                prediction_length=self.shape.prediction_length,
                quantile_levels=self.levels,
            )

        return forecast

    def statistical(self, name: str, fallbacks: dict[str, int]) -> Contender:
        """Fits in the units of the data, where a multiplicative season or a count is one."""
        fitted, stand_in = load_model(name, self.shape.season_length), self.naive("seasonal_naive")
        fallbacks[name] = 0

        def forecast(series: NDArray[np.int64], origins: NDArray[np.int64]) -> Forecast:
            result = stand_in(series, origins)
            point, quantiles = result.point.double(), result.quantiles
            quantiles = None if quantiles is None else quantiles.double()
            for row, (index, origin) in enumerate(zip(series, origins, strict=True)):
                history = self.panel.series[index].values[max(0, origin - self.read_length) : origin]
                for channel in range(point.shape[2]):
                    found = statistical_forecast(fitted, history[:, channel], self.shape.prediction_length, self.levels)
                    if found is None:
                        fallbacks[name] += 1
                        continue
                    loc, scale = self.scaler.loc[index, channel], self.scaler.scale[index, channel]
                    columns = torch.from_numpy((found - loc) / scale)
                    point[row, :, channel] = columns[:, 0]
                    if quantiles is not None:
                        quantiles[row, :, channel] = columns[:, 1:]
            return Forecast(point, quantiles, result.quantile_levels)

        return forecast


def _before(panel: Panel, chosen: Sequence[int] | NDArray[np.int64], stamp: np.datetime64) -> Panel:
    """The chosen series with their rows before a stamp; those without any are left out. Known covariates stay."""
    series = []
    for each in (panel.series[index] for index in chosen):
        if rows := int(np.searchsorted(each.time, stamp)):
            past = None if each.past is None else each.past[:rows]
            series.append(replace(each, time=each.time[:rows], values=each.values[:rows], past=past))
    return replace(panel, series=tuple(series))


def evaluate(forecaster: Forecaster, panel: Panel, *, progress: Callable[[int, int], None] | None = None) -> Evaluation:
    """``backtest`` on every window the model has not seen, beside seasonal naive."""
    return backtest(forecaster, panel, progress=progress)


def backtest(
    forecaster: Forecaster,
    panel: Panel,
    *,
    step: int = 1,
    max_origins: int | None = None,
    baselines: Sequence[str] = ("seasonal_naive",),
    refit: Callable[[Panel], Forecaster] | None = None,
    adaptive: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores the model and baselines on the windows whose future the model has not seen, many windows at once.

    A series training never saw is scored from where a full context (else half of its rows) lies before the origin, and
    standardised by its rows before that first origin: nothing that is scored goes into a scale. Its channels without a
    value there have no scale and are not scored.

    Args:
        forecaster: the model.
        panel: data with the model's channels; it may have grown since training, and hold new series.
        step: rows from one origin to the next, counted back from the last.
        max_origins: most origins per series, the newest ones; all unless given.
        baselines: of ``BASELINES``. All of them read the model's context or ten seasons, whichever is longer.
        refit: called with the rows before each origin stamp, gives the forecaster for that origin; without it the model
            stays as it is. Which rows are scored, and on which scale, is the model's in either case.
        adaptive: whether the model's bands follow what came true before each origin (``trellis_ts.adaptive``).
        seed: of the bootstrap.
        progress: called with the windows done and the number of all.

    Raises:
        ConfigError: ``step`` or ``max_origins`` is below 1, a baseline is unknown or not installed, or the model gives
            no bands that could adapt.
        DataError: the panel does not fit the model, or holds no window the model has not seen.
    """
    panel = forecaster.check(panel)
    scored = score(
        forecaster,
        panel,
        step=step,
        max_origins=max_origins,
        baselines=baselines,
        refit=refit,
        adaptive=adaptive,
        progress=progress,
    )
    check_scored(scored, panel.source)
    return scored.evaluation(seed=seed)


def check_scored(scored: Scored, source: str) -> None:
    """Refuses scores of nothing.

    Raises:
        DataError: there was no window the model had not seen, or no value in them.
    """
    if scored.num_windows == 0:
        raise DataError(
            f"{source}: no window of {scored.prediction_length} steps lies after the rows the model was trained "
            "on; train with a larger --test-size, or bring newer rows"
        )
    if scored.num_values == 0:
        raise DataError(f"{source}: every value after the rows the model was trained on is missing")


def score(
    forecaster: Forecaster,
    panel: Panel,
    *,
    step: int = 1,
    max_origins: int | None = None,
    baselines: Sequence[str] = ("seasonal_naive",),
    refit: Callable[[Panel], Forecaster] | None = None,
    adaptive: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """The sums of ``backtest``, to which those of other series can be added; of no window they are 0.

    Raises:
        ConfigError: as for ``backtest``.
        DataError: the panel does not fit the model.
    """
    _check(step, max_origins, baselines)
    panel = forecaster.check(panel)
    shape, data = forecaster.checkpoint.model.shape, forecaster.checkpoint.data
    levels = tuple(forecaster.checkpoint.model.quantile_levels)
    origins = RollingOrigins(panel, shape, data, step=step, max_origins=max_origins)
    known = [(0, int(first)) for first in origins.first]
    scaler = forecaster.scaler().of(panel, known)
    field = _Field(panel, ScaledPanel(panel, scaler, shape.season_length), scaler, shape, levels)
    fallbacks: dict[str, int] = {}
    contenders = {MODEL: field.model(forecaster) if refit is None else field.refitted(refit)}
    if adaptive:
        contenders[MODEL] = AdaptiveForecasts(contenders[MODEL], panel, field.scaled, levels, step=step)
    for name in baselines:
        contenders[name] = field.naive(name) if name in NAIVE_BASELINES else field.statistical(name, fallbacks)
    truths = _Truths(field, origins, frozenset(each.name for each in data.series))
    batches = _batches(origins, field, by_stamp=adaptive or refit is not None, has_fits=bool(fallbacks))
    return Scored(
        sums=_scored(field, origins, contenders, truths, batches, progress),
        items=tuple((each.name, channel) for each in panel.series for channel in panel.channels),
        num_windows=len(origins),
        num_series=len(panel.series),
        starts=origins.stamps,
        ends=origins.ends,
        prediction_length=shape.prediction_length,
        season_length=shape.season_length,
        step=step,
        fallbacks=fallbacks,
    )


def _scored(
    field: _Field,
    origins: RollingOrigins,
    contenders: dict[str, Contender],
    truths: _Truths,
    batches: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]],
    progress: Callable[[int, int], None] | None,
) -> dict[str, ScoreSums]:
    """Every contender's losses, summed batch by batch."""
    shape = (len(field.panel.series), field.panel.num_channels, field.shape.prediction_length)
    sums = {name: ScoreSums(shape, len(origins.stamps), field.levels) for name in contenders}
    done = 0
    for series, rows in batches:
        windows = truths.gather(series, rows)
        for name, contender in contenders.items():
            sums[name].add(windows, contender(series, rows))
        done += len(series)
        if progress is not None:
            progress(done, len(origins))
    return sums


def _check(step: int, max_origins: int | None, baselines: Sequence[str]) -> None:
    if step < 1:
        raise ConfigError(f"step={step} must be at least 1")
    if max_origins is not None and max_origins < 1:
        raise ConfigError(f"max_origins={max_origins} must be at least 1")
    for name in baselines:
        if name not in BASELINES:
            raise ConfigError(f"unknown baseline '{name}'; choose from {', '.join(BASELINES)}")
    if len(set(baselines)) < len(baselines):
        raise ConfigError(f"a baseline is named twice in {', '.join(baselines)}")


def _batches(
    origins: RollingOrigins, field: _Field, *, by_stamp: bool, has_fits: bool
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Series and origins of windows to be forecast together: those of one stamp, or as many as memory holds."""
    if not len(origins):
        return
    if by_stamp:
        series, rows = origins.locate(np.arange(len(origins)))
        stamps = origins.stamp_index(series, rows)
        order = np.argsort(stamps, kind="stable")
        for chosen in np.split(order, np.flatnonzero(np.diff(stamps[order])) + 1):
            yield series[chosen], rows[chosen]
        return
    size = _VALUES_PER_BATCH // (field.shape.prediction_length * field.shape.num_channels)
    size = max(1, min(_FITTED_WINDOWS_PER_BATCH if has_fits else _WINDOWS_PER_BATCH, size))
    for start in range(0, len(origins), size):
        yield origins.locate(np.arange(start, min(start + size, len(origins))))


class _Truths:
    """The futures, and what their errors are scaled by: all from rows before each series' first origin."""

    def __init__(self, field: _Field, origins: RollingOrigins, trained: frozenset[str]) -> None:
        self._field, self._origins = field, origins
        scale, season = field.scaler.scale, field.shape.season_length
        self._seasonal, self._squared = np.full_like(scale, np.nan), np.full_like(scale, np.nan)
        self._has_scale = np.ones(scale.shape, dtype=bool)
        for index, (series, first) in enumerate(zip(field.panel.series, origins.first, strict=True)):
            before = series.values[:first]
            self._seasonal[index] = metrics.seasonal_error(before, season) / scale[index]
            self._squared[index] = metrics.seasonal_error(before, season, squared=True) / scale[index] ** 2
            if series.name not in trained:
                self._has_scale[index] = ~np.isnan(before).all(axis=0)

    def gather(self, series: NDArray[np.int64], rows: NDArray[np.int64]) -> ScoredWindows:
        batch = self._field.scaled.gather(series, rows, 0, self._field.shape.prediction_length)
        if batch.future is None or batch.future_observed is None:
            raise AssertionError("a window that reaches ahead has a future")
        is_scored = batch.future_observed.numpy() & self._has_scale[series][:, None]
        return ScoredWindows(
            series=series,
            origin=self._origins.stamp_index(series, rows),
            truth=np.where(is_scored, batch.future.double().numpy(), np.nan),
            loc=self._field.scaler.loc[series][:, None],
            scale=self._field.scaler.scale[series][:, None],
            seasonal=self._seasonal[series][:, None],
            seasonal_squared=self._squared[series][:, None],
        )
