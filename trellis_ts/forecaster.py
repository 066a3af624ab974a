"""A trained model as an object: fit, load, predict, save. Only fit needs Lightning."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from trellis_ts import conformal
from trellis_ts.causal import CausalModel
from trellis_ts.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from trellis_ts.config import ExperimentConfig
from trellis_ts.copula import sample_scores
from trellis_ts.datasets.covariates import (
    check_covariates,
    check_future,
    covariate_options,
    unseen_categories,
)
from trellis_ts.datasets.readers import add_future, panel_from_frame
from trellis_ts.datasets.splits import Scaler
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.errors import ConfigError, DataError
from trellis_ts.evaluation import backtest
from trellis_ts.frames import as_library_of, forecast_frame, sample_frame
from trellis_ts.passes import HistoryPass, roll_out
from trellis_ts.types import Batch, Features, Forecast, Panel
from trellis_ts.warm_start import continue_settings

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from jaxtyping import Float
    from numpy.typing import NDArray

    from trellis_ts.config import Preset
    from trellis_ts.explanations import Explanation
    from trellis_ts.scores import Evaluation
    from trellis_ts.training import TrainingObserver
    from trellis_ts.types import Borders

_Frame = TypeVar("_Frame")
_LOGGER = logging.getLogger(__name__)
# Series forecast at once. It bounds memory; no forecast depends on it.
_ROWS_PER_BATCH = 1024
# Numbers of sample paths held at once at most.
_MOST_SAMPLED_VALUES = 1 << 28


class Forecaster:
    """A trained model with the columns, calendar and scaler of its data.

    Example:
        >>> sales = pandas.read_csv("sales.csv")                            # doctest: +SKIP
        >>> forecaster = Forecaster.fit(sales, target="units", id="shop")   # doctest: +SKIP
        >>> forecaster.predict(sales)                                       # doctest: +SKIP
        >>> forecaster.save("models/sales")                                 # doctest: +SKIP

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
    def fit(
        cls,
        frame: Any,
        *,
        preset: Preset = "balanced",
        start: Forecaster | None = None,
        observer: TrainingObserver | None = None,
        **settings: Any,
    ) -> Forecaster:
        """Trains a model on a frame, as ``trellis train`` does on a file.

        Args:
            frame: a table of pandas, polars, pyarrow or another library that narwhals knows, wide or long; it is not
                changed. Its last rows are held out for validation, and for tests unless ``test_size=0``.
            preset: how much effort: ``fast`` takes well under a minute on two CPU cores, ``balanced`` minutes,
                ``accurate`` up to an hour. It chooses what ``settings`` leave open.
            start: training begins with the weights of this forecaster, whose network, lengths, loss and columns it
                keeps, at 0.3 of its learning rate; the network is not drawn anew. Series it knows keep their scale,
                new ones get that of their training rows.
            observer: hears how training goes.
            settings: any setting of ``trellis train`` by its name: ``target``, ``prediction_length``, ``max_time``,
                ``known_covariates``, ``loss``, ``device``, ...; what is not given is chosen from the data.

        Returns:
            The model of the best epoch, on the CPU; ``save`` writes it.

        Raises:
            ConfigError: a setting does not exist, is out of its range, or is not that of ``start``.
            DataError: the frame cannot be read or is too short, or can be understood in more than one way.
            TrellisError: training diverged.
        """
        config = ExperimentConfig.of(preset=preset, **settings)
        data = (config if start is None else continue_settings(config, start.checkpoint)).data
        panel = panel_from_frame(
            frame,
            time=data.time,
            target=data.target,
            id=data.id,
            freq=data.freq,
            day_first=data.day_first,
            past_covariates=data.past_covariates,
            known_covariates=data.known_covariates,
            static=data.static,
            categorical=data.categorical,
            regularize=data.regularize,
        )
        for note in panel.notes:
            _LOGGER.info("%s: %s", panel.source, note)
        return cls.fit_panel(panel, preset=preset, start=start, observer=observer, **settings)

    @classmethod
    def fit_panel(
        cls,
        panel: Panel,
        *,
        preset: Preset = "balanced",
        start: Forecaster | None = None,
        observer: TrainingObserver | None = None,
        borders: Sequence[Borders] | None = None,
        **settings: Any,
    ) -> Forecaster:
        """The same for series that were read before.

        Args:
            panel: the series.
            preset: as for ``fit``.
            start: as for ``fit``.
            observer: as for ``fit``.
            borders: rows of each series to train on and to validate on; as ``validation_size`` and ``test_size`` say
                unless given.
            settings: as for ``fit``; those that name columns have no effect.

        Raises:
            ConfigError: as ``fit``.
            DataError: the series are too short.
            TrellisError: training diverged.
        """
        from trellis_ts.pacing import fit_to_time
        from trellis_ts.preparation import prepare
        from trellis_ts.training import fit  # only here: a trained model needs no Lightning

        config = ExperimentConfig.of(preset=preset, **settings)
        if start is not None:
            config = continue_settings(config, start.checkpoint)
        with TemporaryDirectory(prefix="trellis-") as directory:
            if start is not None:
                panel = start.check(panel)
            first = None if start is None else start.checkpoint
            preparation = fit_to_time(prepare(panel, config, borders=borders, start=first))
            for reason in preparation.reasons:
                _LOGGER.info("%s: %s", panel.source, reason)
            checkpoint, _ = fit(preparation, Path(directory), observer=observer, start=first)
        return cls(checkpoint)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, device: str = "cpu", calibrated: bool = True) -> Forecaster:
        """Reads a model directory.

        Raises:
            CheckpointError: it is missing, incomplete, damaged, or of a newer version.
        """
        return cls(load_checkpoint(directory), device=device, calibrated=calibrated)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        device: str = "cpu",
        calibrated: bool = True,
    ) -> Forecaster:
        """A model from a directory or, with the extra ``hub``, from a repository of the Hugging Face Hub.

        Only the files of a model are fetched; they are checked as ``load`` does, and nothing in them is executed.

        Args:
            repo_or_path: a directory, or a repository such as ``"someone/sales"``.
            revision: branch, tag or commit of the repository.
            token: for repositories that are not public.
            device: where it runs.
            calibrated: as for the class.

        Raises:
            CheckpointError: it cannot be fetched, or as for ``load``.
            ConfigError: the extra ``hub`` is not installed.
        """
        from trellis_ts.hub import fetch_checkpoint

        return cls(fetch_checkpoint(repo_or_path, revision=revision, token=token), device=device, calibrated=calibrated)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a Trellis model",
        token: str | None = None,
    ) -> str:
        """Uploads the model directory to a repository of the Hub, which is made if need be.

        ``data.json`` goes along: it names the columns and every series of the training data, with their scales.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: the Hub refuses, or cannot be reached.
            ConfigError: the extra ``hub`` is not installed.
        """
        from trellis_ts.hub import upload_checkpoint

        return upload_checkpoint(
            self.save, repo, private=private, revision=revision, commit_message=commit_message, token=token
        )

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Writes the model as a file that runs without this package: ``.onnx`` (extra ``onnx``) or ``.pt2``.

        ``docs/export.md`` says what goes in and what comes out.

        Raises:
            ConfigError: the ending is unknown, the file cannot be written, the model cannot be exported, or the extra
                is not installed.
        """
        from trellis_ts.export import export_model

        export_model(self.checkpoint, Path(path), calibrated=self.calibrated)
        return Path(path)

    def explain(self, frame: Any, future: Any = None) -> Explanation:
        """What moves the forecast after the frame's last rows: past patches, covariates; and what the memory holds.

        Args:
            frame: as for ``predict``.
            future: as for ``predict``.

        Raises:
            ConfigError: a streaming model.
            DataError: as for ``predict``.
        """
        from trellis_ts.explanations import explain_panel

        return explain_panel(self, self._read_with_future(frame, future, None))

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes a model directory whole, or leaves what was there.

        Raises:
            CheckpointError: the place cannot be written, or the disk is full.
        """
        return save_checkpoint(directory, self.checkpoint, package_version=version("trellis-ts"))

    def predict(
        self,
        frame: _Frame,
        future: Any = None,
        *,
        prediction_length: int | None = None,
        quantile_levels: Sequence[float] | None = None,
    ) -> _Frame:
        """Forecasts what follows the frame's last rows.

        Args:
            frame: history in the columns the model was trained on, wide or long, of pandas, polars, pyarrow or another
                library that narwhals knows; it is not changed.
            future: frame with the known covariates over the horizon, of a model that reads some; without it, rows of
                ``frame`` after the last value are taken.
            prediction_length: steps to forecast; the trained horizon unless given. Beyond it, forecasts are fed back.
            quantile_levels: any levels between 0 and 1; those of the training unless given.

        Returns:
            A frame of the same library: one row per series (per channel of a wide frame) and future stamp; see
            ``forecast_frame``.

        Raises:
            ConfigError: a level the model cannot give.
            DataError: a frame cannot be read, has other columns, or lacks known covariates.
        """
        panel = self._read_with_future(frame, future, prediction_length)
        forecast = self.forecast(panel, prediction_length=prediction_length, quantile_levels=quantile_levels)
        result: _Frame = as_library_of(frame, forecast_frame(panel, forecast))
        return result

    def sample(
        self,
        frame: _Frame,
        future: Any = None,
        *,
        num_samples: int = 100,
        seed: int = 0,
        prediction_length: int | None = None,
    ) -> _Frame:
        """Possible futures after the frame's last rows, each a path through the whole horizon.

        At every step the paths spread as the forecast's quantiles say; from step to step they hang together as errors
        did on the validation windows. Paths of different series and channels are drawn independently.

        Args:
            frame: history in the columns the model was trained on, as for ``predict``.
            future: as for ``predict``.
            num_samples: paths per series (per channel of a wide frame).
            seed: the same seed gives the same paths.
            prediction_length: steps to forecast; the trained horizon unless given.

        Returns:
            A frame of the same library: one row per series, ``sample`` (from 0) and future stamp, with its ``value``.

        Raises:
            ConfigError: the model gives no distribution to draw from, or holds no calibration.
            DataError: a frame cannot be read, has other columns, or lacks known covariates.
        """
        panel = self._read_with_future(frame, future, prediction_length)
        paths = self.sample_paths(panel, num_samples=num_samples, seed=seed, prediction_length=prediction_length)
        result: _Frame = as_library_of(frame, sample_frame(panel, paths))
        return result

    def backtest(
        self,
        frame: Any,
        *,
        step: int = 1,
        max_origins: int | None = None,
        baselines: Sequence[str] = ("seasonal_naive",),
        refit: Callable[[Panel], Forecaster] | None = None,
        adaptive: bool = False,
        seed: int = 0,
    ) -> Evaluation:
        """Scores the frame's windows whose future the model has not seen, beside baselines on the same windows.

        Args:
            frame: history in the columns the model was trained on, wide or long; it is not changed.
            step: rows from one origin to the next.
            max_origins: most origins per series, the newest ones; all unless given.
            baselines: of ``trellis_ts.evaluation.BASELINES``.
            refit: from the rows before an origin (a ``Panel``) to the forecaster to use there.
            adaptive: whether bands follow what came true before each origin (``trellis_ts.adaptive``).
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
            adaptive=adaptive,
            seed=seed,
        )

    def _read(self, frame: Any) -> Panel:
        data, settings = self.checkpoint.data, self.checkpoint.experiment.data
        return panel_from_frame(
            frame,
            time=data.time_column,
            target=data.channels,
            id=data.id_column,
            freq=data.freq,
            day_first=settings.day_first,
            **covariate_options(data.covariates),
            regularize=settings.regularize,
        )

    def _read_with_future(self, frame: Any, future: Any, prediction_length: int | None) -> Panel:
        """The history, with the known covariates of the second frame where there is one."""
        panel = self._read(frame)
        if future is not None:
            steps = self.prediction_length if prediction_length is None else prediction_length
            panel = add_future(panel, future, steps, day_first=self.checkpoint.experiment.data.day_first)
        for line in unseen_categories(panel, self.checkpoint.data.covariates):
            _LOGGER.warning("%s: %s", panel.source, line)
        return panel

    def check(self, panel: Panel) -> Panel:
        """The panel with its channels in the model's order.

        Raises:
            DataError: channels, covariates or calendar are not those the model was trained on.
        """
        data = self.checkpoint.data
        check_covariates(panel, data.covariates)
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
        return replace(
            panel,
            series=tuple(replace(each, values=np.take(each.values, order, axis=1)) for each in panel.series),
            columns=replace(panel.columns, channels=data.channels),
        )

    def scaler(self) -> Scaler:
        """The training rows' statistics."""
        return self._scaler

    @cached_property
    def _scaler(self) -> Scaler:
        return self.checkpoint.scaler()

    def forecast(
        self, panel: Panel, *, prediction_length: int | None = None, quantile_levels: Sequence[float] | None = None
    ) -> Forecast:
        """Forecasts each series from its end, in the units of the data: ``[series, horizon, channel]``.

        Raises:
            ConfigError: ``prediction_length`` is below 1, or a level cannot be given.
            DataError: the panel does not fit the model, or its known covariates do not reach over the horizon.
        """
        horizon = self.prediction_length if prediction_length is None else prediction_length
        if horizon < 1:
            raise ConfigError(f"prediction_length={horizon} must be at least 1")
        panel = self.check(panel)
        if any(each.role == "known" for each in self.checkpoint.data.covariates):
            check_future(panel, horizon)
        scaler = self.scaler().of(panel)
        if isinstance(self._model, CausalModel):
            pieces = [self._finished(roll_out(self._model, panel, scaler, horizon, self.device))]
            return self._in_data_units(pieces, scaler, quantile_levels)
        if self._model.shape.covariates.cycles:
            panel = _recent(panel, self._model.shape.context_length)
        scaled = ScaledPanel(panel, scaler, self._model.shape.season_length, future_length=horizon)
        ends = np.array([len(series) for series in panel.series], dtype=np.int64)
        pieces = []
        for start in range(0, len(ends), _ROWS_PER_BATCH):
            index = np.arange(start, min(start + _ROWS_PER_BATCH, len(ends)))
            batch = scaled.gather(index, ends[index], self._model.shape.context_length, 0, horizon)
            pieces.append(self.roll_out(batch, horizon))
        return self._in_data_units(pieces, scaler, quantile_levels)

    def _in_data_units(
        self, pieces: Sequence[Forecast], scaler: Scaler, quantile_levels: Sequence[float] | None
    ) -> Forecast:
        is_count = self._model.family == "negative_binomial"
        forecast = _unscale(pieces, scaler.loc, scaler.scale, is_count=is_count)
        return forecast if quantile_levels is None else forecast.at_levels(quantile_levels)

    def forecast_windows(self, panel: Panel, series: NDArray[np.int64], origins: NDArray[np.int64]) -> Forecast:
        """Forecasts from any rows, each from those before it: ``[window, horizon, channel]`` in the units of the data.

        The horizon is the trained one. Known covariates that do not reach over it count as missing.

        Args:
            panel: the series, as ``check`` returns them.
            series: ``[window]``, which series.
            origins: ``[window]``, first row to forecast, counted from the series' own start.
        """
        scaler = self.scaler().of(panel)
        lengths = np.array([len(each) for each in panel.series], dtype=np.int64)
        beyond = max(0, int((origins + self.prediction_length - lengths[series]).max()))
        scaled = ScaledPanel(panel, scaler, self._model.shape.season_length, future_length=beyond)
        predict, pieces = self.predictor(scaled), []
        for start in range(0, len(series), _ROWS_PER_BATCH):
            chosen = slice(start, start + _ROWS_PER_BATCH)
            windows = series[chosen], origins[chosen]
            pieces.append(predict(scaled.gather(*windows, self._model.shape.context_length, 0, self.prediction_length)))
        is_count = self._model.family == "negative_binomial"
        return _unscale(pieces, scaler.loc[series], scaler.scale[series], is_count=is_count)

    def sample_paths(
        self, panel: Panel, *, num_samples: int = 100, seed: int = 0, prediction_length: int | None = None
    ) -> Float[torch.Tensor, "sample series horizon channel"]:
        """The paths of ``sample`` as a tensor, in the units of the data.

        Raises:
            ConfigError: the model gives no distribution to draw from, or holds no calibration; too many paths.
            DataError: the panel does not fit the model, or its known covariates do not reach over the horizon.
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

    def predictor(self, scaled: ScaledPanel) -> Callable[[Batch], Forecast]:
        """What forecasts windows of these series over the trained horizon, on the windows' scale.

        A streaming model looks not at the windows but at all rows of the series before their origins.
        """
        if isinstance(self._model, CausalModel):
            history = HistoryPass(self._model, scaled, self.device)
            return lambda batch: self._finished(history(batch))
        return lambda batch: self.roll_out(batch, self.prediction_length)

    @torch.inference_mode()
    def roll_out(self, batch: Batch, prediction_length: int) -> Forecast:
        """Forecasts a batch on its own scale; past the trained horizon, point forecasts are read as if observed.

        There, past covariates are missing; known ones have to be in the batch up to the end.

        Raises:
            ValueError: the batch's known covariates do not reach that far, or the model is a streaming one, which has
                no windows.
        """
        if isinstance(self._model, CausalModel):
            raise ValueError("a streaming model has no windows; use predictor")
        batch = batch.to(self.device)
        context_length, season_length = self._model.shape.context_length, self._model.shape.season_length
        if batch.known is not None:
            reach = batch.known.values.shape[1] - context_length
            if reach < prediction_length:
                raise ValueError(f"known covariates reach over {reach} steps, the forecast over {prediction_length}")
            # Whole horizons: steps beyond what is asked for are missing, and are cut off below.
            blocks = -(-prediction_length // self.prediction_length)
            batch = batch._replace(known=_shifted(batch.known, 0, context_length + blocks * self.prediction_length))
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
                past=None if batch.past is None else _shifted(batch.past, self.prediction_length, context_length),
                known=None if batch.known is None else _shifted(batch.known, self.prediction_length),
            )
            forecasts.append(self._model(batch))
            done += self.prediction_length
        return self._finished(Forecast.joined(forecasts, dim=1).map(lambda each: each[:, :prediction_length].cpu()))

    def _finished(self, forecast: Forecast) -> Forecast:
        """With the model's levels where it gives a distribution, and calibrated."""
        if self._model.family is not None:
            forecast = forecast.at_levels(self._model.quantile_levels)
        if self.calibrated and self.checkpoint.calibration is not None:
            forecast = conformal.apply(self.checkpoint.calibration, forecast)
        return forecast


def _recent(panel: Panel, rows: int) -> Panel:
    """The panel with the last rows of each series only, so that the calendar of no other is looked up."""
    series = []
    for each in panel.series:
        start = max(0, len(each) - rows)
        past, known = (None if part is None else part[start:] for part in (each.past, each.known))
        series.append(replace(each, time=each.time[start:], values=each.values[start:], past=past, known=known))
    return replace(panel, series=tuple(series))


def _shifted(features: Features, steps: int, length: int | None = None) -> Features:
    """The features from a later step on, cut or continued as missing to a number of steps."""
    missing = 0 if length is None else max(0, length - (features.values.shape[1] - steps))
    stop = None if length is None else steps + length
    return Features(*(F.pad(each[:, steps:stop], (0, 0, 0, missing)) for each in features))


def _unscale(
    pieces: Sequence[Forecast], loc: NDArray[np.float64], scale: NDArray[np.float64], *, is_count: bool
) -> Forecast:
    """From the standardised scale to the units of the data, in float64; counts become whole numbers.

    Location and scale are ``[window, channel]``.
    """
    forecast = Forecast.joined(pieces, dim=0).map(torch.Tensor.double)
    forecast = forecast.affine(torch.from_numpy(loc)[:, None], torch.from_numpy(scale)[:, None])
    return forecast.as_counts() if is_count else forecast
