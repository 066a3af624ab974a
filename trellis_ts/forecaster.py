"""A trained model as an object: load, predict, save. No Lightning here."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from trellis_ts import conformal
from trellis_ts.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from trellis_ts.copula import sample_scores
from trellis_ts.datasets import calendar
from trellis_ts.datasets.readers import panel_from_frame
from trellis_ts.datasets.splits import Scaler
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.errors import ConfigError, DataError
from trellis_ts.evaluation import backtest
from trellis_ts.quantiles import QuantileCurve
from trellis_ts.types import Batch, Columns, Forecast, Panel, Series

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from jaxtyping import Float
    from numpy.typing import NDArray

    from trellis_ts.scores import Evaluation

# Series forecast at once. It bounds memory; no forecast depends on it.
_ROWS_PER_BATCH = 1024
# Numbers of sample paths held at once at most.
_MOST_SAMPLED_VALUES = 1 << 28


class Forecaster:
    """A trained model with the columns, calendar and scaler of its data.

    Example:
        >>> forecaster = Forecaster.load("models/sales")          # doctest: +SKIP
        >>> forecaster.predict(pandas.read_csv("sales.csv"))      # doctest: +SKIP

    Args:
        checkpoint: the model.
        device: where it runs.
        calibrated: whether bands are calibrated where the model holds a calibration (``trellis_ts.conformal``).
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str = "cpu", calibrated: bool = True) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.calibrated = calibrated and checkpoint.calibration is not None
        self._model = checkpoint.model.to(self.device).eval()

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, device: str = "cpu", calibrated: bool = True) -> Forecaster:
        """Reads a model directory.

        Raises:
            CheckpointError: it is missing, incomplete, damaged, or of a newer version.
        """
        return cls(load_checkpoint(directory), device=device, calibrated=calibrated)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes a model directory whole, or leaves what was there.

        Raises:
            CheckpointError: the place cannot be written, or the disk is full.
        """
        return save_checkpoint(directory, self.checkpoint, package_version=version("trellis-ts"))

    def predict(
        self,
        frame: pd.DataFrame,
        *,
        prediction_length: int | None = None,
        quantile_levels: Sequence[float] | None = None,
    ) -> pd.DataFrame:
        """Forecasts what follows the frame's last rows.

        Args:
            frame: history in the columns the model was trained on, wide or long; it is not changed.
            prediction_length: steps to forecast; the trained horizon unless given. Beyond it, forecasts are fed back.
            quantile_levels: any levels between 0 and 1; those of the training unless given.

        Returns:
            One row per series (per channel of a wide frame) and future stamp; see ``forecast_frame``.

        Raises:
            ConfigError: a level the model cannot give.
            DataError: the frame cannot be read, or has other columns.
        """
        panel = self._read(frame)
        return forecast_frame(
            panel, self.forecast(panel, prediction_length=prediction_length, quantile_levels=quantile_levels)
        )

    def sample(
        self, frame: pd.DataFrame, *, num_samples: int = 100, seed: int = 0, prediction_length: int | None = None
    ) -> pd.DataFrame:
        """Possible futures after the frame's last rows, each a path through the whole horizon.

        At every step the paths spread as the forecast's quantiles say; from step to step they hang together as errors
        did on the validation windows. Paths of different series and channels are drawn independently.

        Args:
            frame: history in the columns the model was trained on.
            num_samples: paths per series (per channel of a wide frame).
            seed: the same seed gives the same paths.
            prediction_length: steps to forecast; the trained horizon unless given.

        Returns:
            One row per series, ``sample`` (from 0) and future stamp, with its ``value``.

        Raises:
            ConfigError: the model gives no distribution to draw from, or holds no calibration.
            DataError: the frame cannot be read, or has other columns.
        """
        panel = self._read(frame)
        paths = self.sample_paths(panel, num_samples=num_samples, seed=seed, prediction_length=prediction_length)
        return sample_frame(panel, paths)

    def backtest(
        self,
        frame: pd.DataFrame,
        *,
        step: int = 1,
        max_origins: int | None = None,
        baselines: Sequence[str] = ("seasonal_naive",),
        refit: Callable[[Panel], Forecaster] | None = None,
        seed: int = 0,
    ) -> Evaluation:
        """Scores the frame's windows whose future the model has not seen, beside baselines on the same windows.

        Args:
            frame: history in the columns the model was trained on, wide or long; it is not changed.
            step: rows from one origin to the next.
            max_origins: most origins per series, the newest ones; all unless given.
            baselines: of ``trellis_ts.evaluation.BASELINES``.
            refit: from the rows before an origin (a ``Panel``) to the forecaster to use there.
            seed: of the bootstrap.

        Returns:
            The scores; ``.frame()`` has them as a tidy frame.

        Raises:
            ConfigError: an argument cannot be used, or a baseline is not installed.
            DataError: the frame cannot be read, has other columns, or nothing in it is new to the model.
        """
        return backtest(
            self,
            self._read(frame),
            step=step,
            max_origins=max_origins,
            baselines=baselines,
            refit=refit,
            seed=seed,
        )

    def _read(self, frame: pd.DataFrame) -> Panel:
        data = self.checkpoint.data
        return panel_from_frame(
            frame,
            time=data.time_column,
            target=data.channels,
            id=data.id_column,
            freq=data.freq,
            day_first=self.checkpoint.experiment.data.day_first,
        )

    def check(self, panel: Panel) -> Panel:
        """The panel with its channels in the model's order.

        Raises:
            DataError: channels or calendar are not those the model was trained on.
        """
        data = self.checkpoint.data
        missing = [name for name in data.channels if name not in panel.channels]
        if missing or len(panel.channels) != len(data.channels):
            raise DataError(
                f"{panel.source}: the model was trained on column(s) {', '.join(data.channels)}, the data has "
                f"{', '.join(panel.channels)}; train on it, or name the columns with --target"
            )
        if panel.freq != data.freq:
            raise DataError(
                f"{panel.source}: the model was trained on steps of {data.freq}, the data has steps of {panel.freq}; "
                "bring data of the same frequency, or train on it"
            )
        if panel.channels == data.channels:
            return panel
        order = [panel.channels.index(name) for name in data.channels]
        return Panel(
            series=tuple(Series(each.name, each.time, each.values[:, order]) for each in panel.series),
            columns=Columns(panel.columns.time, panel.columns.id, data.channels),
            freq=panel.freq,
            timezone=panel.timezone,
            notes=panel.notes,
            source=panel.source,
            dataset=panel.dataset,
        )

    def scaler(self) -> Scaler:
        """The training rows' statistics."""
        series = self.checkpoint.data.series
        return Scaler(
            tuple(each.name for each in series),
            np.array([each.loc for each in series]),
            np.array([each.scale for each in series]),
        )

    def forecast(
        self, panel: Panel, *, prediction_length: int | None = None, quantile_levels: Sequence[float] | None = None
    ) -> Forecast:
        """Forecasts each series from its end, in the units of the data: ``[series, horizon, channel]``.

        Raises:
            ConfigError: ``prediction_length`` is below 1, or a level cannot be given.
            DataError: the panel does not fit the model.
        """
        horizon = self.prediction_length if prediction_length is None else prediction_length
        if horizon < 1:
            raise ConfigError(f"prediction_length={horizon} must be at least 1")
        panel = self.check(panel)
        scaler = self.scaler().of(panel)
        scaled = ScaledPanel(panel, scaler, self._model.shape.season_length)
        ends = np.array([len(series) for series in panel.series], dtype=np.int64)
        pieces = []
        for start in range(0, len(ends), _ROWS_PER_BATCH):
            index = np.arange(start, min(start + _ROWS_PER_BATCH, len(ends)))
            batch = scaled.gather(index, ends[index], self._model.shape.context_length, 0)
            pieces.append(self.roll_out(batch, horizon))
        forecast = _unscale(pieces, scaler, is_count=self._model.family == "negative_binomial")
        return forecast if quantile_levels is None else forecast.at_levels(quantile_levels)

    def sample_paths(
        self, panel: Panel, *, num_samples: int = 100, seed: int = 0, prediction_length: int | None = None
    ) -> Float[torch.Tensor, "sample series horizon channel"]:
        """The paths of ``sample`` as a tensor, in the units of the data.

        Raises:
            ConfigError: the model gives no distribution to draw from, or holds no calibration; too many paths.
            DataError: the panel does not fit the model.
        """
        if num_samples < 1:
            raise ConfigError(f"num_samples={num_samples} must be at least 1")
        if not 0 <= seed < 1 << 63:
            raise ConfigError(f"seed={seed} must lie between 0 and {(1 << 63) - 1}")
        if self.checkpoint.calibration is None:
            raise ConfigError(
                "this model holds no calibration, from which paths learn how their steps hang together; train it anew"
            )
        forecast = self.forecast(panel, prediction_length=prediction_length)
        if num_samples * forecast.point.numel() > _MOST_SAMPLED_VALUES:
            raise ConfigError(
                f"num_samples={num_samples} paths of {forecast.point.numel():,} values exceed the "
                f"{_MOST_SAMPLED_VALUES:,} held at once; draw fewer, or of fewer series at a time"
            )
        generator = torch.Generator().manual_seed(seed)
        shape = forecast.point.shape
        marginal = forecast.marginal()
        scores = sample_scores(
            self.checkpoint.calibration.correlations, (shape[0], shape[1], shape[2]), num_samples, generator
        )
        return marginal.quantile(torch.special.ndtr(scores))

    @property
    def prediction_length(self) -> int:
        """The trained horizon in steps."""
        return self._model.shape.prediction_length

    @torch.inference_mode()
    def roll_out(self, batch: Batch, prediction_length: int) -> Forecast:
        """Forecasts a batch on its own scale; past the trained horizon, point forecasts are read as if observed."""
        batch = batch.to(self.device)
        context_length, season_length = self._model.shape.context_length, self._model.shape.season_length
        forecasts = [self._model(batch)]
        done = self.prediction_length
        while done < prediction_length:
            point = forecasts[-1].point
            batch = batch._replace(
                context=torch.cat((batch.context, point), dim=1)[:, -context_length:],
                observed=torch.cat((batch.observed, torch.ones_like(point, dtype=torch.bool)), dim=1)[
                    :, -context_length:
                ],
                phase=(batch.phase + self.prediction_length) % season_length,
            )
            forecasts.append(self._model(batch))
            done += self.prediction_length
        forecast = Forecast.joined(forecasts, dim=1).map(lambda each: each[:, :prediction_length].cpu())
        if self._model.family is not None:
            forecast = forecast.at_levels(self._model.quantile_levels)
        if self.calibrated and self.checkpoint.calibration is not None:
            forecast = conformal.apply(self.checkpoint.calibration, forecast)
        return forecast


def _unscale(pieces: Sequence[Forecast], scaler: Scaler, *, is_count: bool) -> Forecast:
    """From the standardised scale to the units of the data, in float64; counts become whole numbers."""
    loc, scale = torch.from_numpy(scaler.loc)[:, None], torch.from_numpy(scaler.scale)[:, None]  # [S, 1, C]
    forecast = Forecast.joined(pieces, dim=0).map(torch.Tensor.double).affine(loc, scale)
    if not is_count:
        return forecast
    if isinstance(forecast.distribution, QuantileCurve):
        forecast = replace(forecast, distribution=replace(forecast.distribution, is_count=True))
    return replace(forecast, quantiles=None).at_levels(forecast.quantile_levels)


def forecast_frame(
    panel: Panel, forecast: Forecast, *, id_name: str | None = None, time_name: str | None = None
) -> pd.DataFrame:
    """Forecasts as a long frame: series, stamp, ``forecast`` and one column per quantile (``q0.1``, ...).

    For a wide table the channels are the series. A long table with several targets gets a column ``channel`` as well.
    Stamps are wall-clock times, or aware ones where the panel has a time zone.

    Args:
        panel: the history that was forecast.
        forecast: ``[series, horizon, channel]`` in the units of the data.
        id_name: name of the first column; the table's own, or ``unique_id`` for a wide one, unless given.
        time_name: name of the time column; the table's own unless given.
    """
    columns = _index_columns(panel, forecast.point.shape[1], id_name, time_name)
    columns["forecast"] = _flat(forecast.point)
    for index, level in enumerate(forecast.quantile_levels):
        if forecast.quantiles is not None:
            columns[f"q{level:g}"] = _flat(forecast.quantiles[..., index])
    return pd.DataFrame(columns)


def sample_frame(
    panel: Panel,
    paths: Float[torch.Tensor, "sample series horizon channel"],
    *,
    id_name: str | None = None,
    time_name: str | None = None,
) -> pd.DataFrame:
    """Sample paths as a long frame: series, stamp, ``sample`` and ``value``, one path after the other.

    Args:
        panel: the history that was forecast.
        paths: in the units of the data.
        id_name: as for ``forecast_frame``.
        time_name: as for ``forecast_frame``.
    """
    num_samples, _, horizon, _ = paths.shape
    columns = {}
    for name, values in _index_columns(panel, horizon, id_name, time_name).items():
        rows = np.arange(len(values)).reshape(-1, 1, horizon).repeat(num_samples, axis=1).ravel()
        columns[name] = values[rows]
    columns["sample"] = np.tile(np.repeat(np.arange(num_samples), horizon), len(rows) // (num_samples * horizon))
    columns["value"] = paths.permute(1, 3, 0, 2).reshape(-1).double().numpy()
    return pd.DataFrame(columns)


def _index_columns(panel: Panel, horizon: int, id_name: str | None, time_name: str | None) -> dict[str, Any]:
    """What the rows of a forecast are about: series, channel where there is a choice, and stamp."""
    channels = panel.num_channels
    stamps = np.stack(
        [calendar.future_times(each.time[-1], panel.freq, horizon, panel.timezone) for each in panel.series]
    )
    names = np.array([series.name for series in panel.series], dtype=object)
    of_channels = np.tile(np.repeat(np.array(panel.channels, dtype=object), horizon), len(names))
    columns: dict[str, Any] = {}
    columns[id_name or panel.columns.id or "unique_id"] = (
        of_channels if panel.is_wide else np.repeat(names, channels * horizon)
    )
    if not panel.is_wide and channels > 1:
        columns["channel"] = of_channels
    columns[time_name or panel.columns.time] = _as_index(np.repeat(stamps[:, None], channels, axis=1).ravel(), panel)
    return columns


def _flat(values: torch.Tensor) -> NDArray[np.float64]:
    """``[series, horizon, channel]`` in the order of the frame's rows."""
    return values.transpose(1, 2).reshape(-1).double().numpy()


def _as_index(stamps: NDArray[np.datetime64], panel: Panel) -> pd.DatetimeIndex:
    index = pd.DatetimeIndex(stamps)
    return index if panel.timezone is None else index.tz_localize("UTC").tz_convert(panel.timezone)
