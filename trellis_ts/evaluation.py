"""How good a model is on rows it has not seen, beside forecasts anyone can make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from trellis_ts.baselines import seasonal_naive
from trellis_ts.datasets.long_horizon import borders, find_benchmark
from trellis_ts.datasets.windows import ScaledPanel, WindowDataset
from trellis_ts.errors import DataError
from trellis_ts.losses import quantile_loss
from trellis_ts.types import Batch, Forecast

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    from trellis_ts.checkpoints import DataRecord
    from trellis_ts.forecaster import Forecaster
    from trellis_ts.types import Panel

_WINDOWS_PER_BATCH = 256


@dataclass(frozen=True)
class Scores:
    """Means over every observed value of every window, channel and step.

    ``mse`` and ``mae`` are on the standardised scale of the training rows (the habit of benchmarks), ``*_original`` in
    the units of the data. ``quantile_loss`` (standardised, doubled and averaged over the levels) and ``coverage`` (of
    the band between the outermost levels) are None for forecasts without quantiles.
    """

    mse: float
    mae: float
    rmse_original: float
    mae_original: float
    quantile_loss: float | None = None
    coverage: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model and of seasonal naive on the same windows, none left out."""

    num_windows: int
    num_series: int
    num_values: int
    prediction_length: int
    season_length: int
    band: float | None
    """Nominal coverage of the band between the outermost quantile levels."""
    model: Scores
    seasonal_naive: Scores


class _Sums:
    """Running sums of errors."""

    def __init__(self) -> None:
        self.squared = self.absolute = self.squared_original = self.absolute_original = 0.0
        self.pinball = self.covered = 0.0
        self.count = 0
        self.has_quantiles = False

    def add(self, forecast: Forecast, batch: Batch, scale: Float[Tensor, "batch 1 channel"]) -> None:
        if batch.future is None or batch.future_observed is None:
            raise ValueError("a window to be scored needs a future")
        mask = batch.future_observed
        error = torch.where(mask, forecast.point - batch.future, 0.0).double()
        original = error * scale
        self.squared += float(error.square().sum())
        self.absolute += float(error.abs().sum())
        self.squared_original += float(original.square().sum())
        self.absolute_original += float(original.abs().sum())
        self.count += int(mask.sum())
        if forecast.quantiles is not None:
            self.has_quantiles = True
            pinball = quantile_loss(forecast.quantiles, batch.future, forecast.quantile_levels)
            self.pinball += float(torch.where(mask, pinball, 0.0).double().sum())
            inside = (forecast.quantiles[..., 0] <= batch.future) & (batch.future <= forecast.quantiles[..., -1])
            self.covered += int((inside & mask).sum())

    def scores(self) -> Scores:
        return Scores(
            mse=self.squared / self.count,
            mae=self.absolute / self.count,
            rmse_original=(self.squared_original / self.count) ** 0.5,
            mae_original=self.absolute_original / self.count,
            quantile_loss=self.pinball / self.count if self.has_quantiles else None,
            coverage=self.covered / self.count if self.has_quantiles else None,
        )


def unseen_ranges(panel: Panel, data: DataRecord) -> list[tuple[int, int]]:
    """Rows of each series the model has not seen: a benchmark's test split, else all after what training knew.

    A series training never saw is evaluated as a whole.
    """
    if panel.dataset is not None and (spec := find_benchmark(panel.dataset)) is not None:
        return [borders(spec, len(panel.series[0])).test]
    known_until = {each.name: each.known_until for each in data.series}
    ranges = []
    for series in panel.series:
        known = known_until.get(series.name)
        start = 0 if known is None else int(np.searchsorted(series.time, np.datetime64(known, "ns"), side="right"))
        ranges.append((start, len(series)))
    return ranges


def evaluate(forecaster: Forecaster, panel: Panel, *, progress: Callable[[int, int], None] | None = None) -> Evaluation:
    """Scores every window, at stride 1, whose future the model has not seen.

    Args:
        forecaster: the model.
        panel: data with the model's channels; it may have grown since training, and hold new series.
        progress: called with the windows done and the number of all.

    Raises:
        DataError: the panel does not fit the model, or holds no window the model has not seen.
    """
    panel = forecaster.check(panel)
    shape = forecaster.checkpoint.model.shape
    scaler = forecaster.scaler().of(panel)
    scaled = ScaledPanel(panel, scaler, shape.season_length)
    # Seasonal naive may need more than the model reads: two seasons, so that a gap in the last one can be bridged.
    read_length = max(shape.context_length, 2 * shape.season_length)
    windows = WindowDataset(
        scaled,
        unseen_ranges(panel, forecaster.checkpoint.data),
        context_length=shape.context_length,
        prediction_length=shape.prediction_length,
        min_context=shape.patch_length,
    )
    if len(windows) == 0:
        raise DataError(
            f"{panel.source}: no window of {shape.prediction_length} steps lies after the rows the model was trained "
            "on; train with a larger --test-size, or bring newer rows"
        )
    model_sums, naive_sums = _Sums(), _Sums()
    scales = torch.from_numpy(scaler.scale)
    for start in range(0, len(windows), _WINDOWS_PER_BATCH):
        series, origins = windows.locate(np.arange(start, min(start + _WINDOWS_PER_BATCH, len(windows))))
        long = scaled.gather(series, origins, read_length, shape.prediction_length)
        batch = scaled.gather(series, origins, shape.context_length, shape.prediction_length)
        scale = scales[series][:, None]
        model_sums.add(forecaster.roll_out(batch, shape.prediction_length), batch, scale)
        naive = seasonal_naive(long.context, long.observed, shape.season_length, shape.prediction_length)
        naive_sums.add(Forecast(naive), batch, scale)
        if progress is not None:
            progress(start + len(series), len(windows))
    if model_sums.count == 0:
        raise DataError(f"{panel.source}: every value after the rows the model was trained on is missing")
    levels = forecaster.checkpoint.model.quantile_levels
    return Evaluation(
        num_windows=len(windows),
        num_series=len(panel.series),
        num_values=model_sums.count,
        prediction_length=shape.prediction_length,
        season_length=shape.season_length,
        band=levels[-1] - levels[0] if len(levels) > 1 else None,
        model=model_sums.scores(),
        seasonal_naive=naive_sums.scores(),
    )
