"""Errors on every test window, for the trained horizon and all its prefixes at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

    from trellis_ts.datasets.splits import Scaler, Splits
    from trellis_ts.forecaster import Forecaster

# Numbers forecast at once: bounds memory, changes no result but by rounding.
_VALUES_PER_BATCH = 1 << 21
_WINDOWS_PER_BATCH = 256


@dataclass(frozen=True)
class HorizonScore:
    """Means over all windows, steps and channels, on the scale of the standardised training rows."""

    num_windows: int
    mse: float
    mae: float


def score_prefixes(
    forecaster: Forecaster,
    splits: Splits,
    horizons: Sequence[int],
) -> dict[int, HorizonScore]:
    """The errors of a forecaster over the first ``h`` steps, for each ``h`` (``score_forecasts``)."""
    shape = forecaster.checkpoint.model.shape
    scaled = ScaledPanel(splits.panel, forecaster.scaler(), shape.season_length)
    predict = forecaster.predictor(scaled)

    def forecast(origins: NDArray[np.int64]) -> Tensor:
        series = np.zeros(len(origins), dtype=np.int64)
        batch = scaled.gather(series, origins, shape.context_length, 0, shape.prediction_length)
        with torch.inference_mode():
            return predict(batch).point.cpu()

    return score_forecasts(forecast, splits, forecaster.scaler(), horizons, longest=shape.prediction_length)


def score_forecasts(
    forecast: Callable[[NDArray[np.int64]], Float[Tensor, "origin longest channel"]],
    splits: Splits,
    scaler: Scaler,
    horizons: Sequence[int],
    *,
    longest: int,
) -> dict[int, HorizonScore]:
    """The errors over the first ``h`` steps, for each ``h``, on all windows where these lie in the test rows.

    Windows start at every row: a shorter horizon has more of them, and none is left out.

    Args:
        forecast: the standardised forecasts from some origins (rows of the first step), ``longest`` steps each.
        splits: with the test rows.
        scaler: what the forecasts are standardised by.
        horizons: steps to score over, none above ``longest``.
        longest: steps of a forecast.

    Raises:
        DataError: the panel holds more than one series, or the test rows are fewer than a horizon.
    """
    panel = splits.panel
    if len(splits.borders) != 1:
        raise DataError(f"{panel.source} holds {len(splits.borders)} series; a benchmark takes one wide table")
    start, stop = splits.borders[0].test
    if stop - start < max(horizons):
        raise DataError(f"{panel.source} has {stop - start} test rows, fewer than the horizon of {max(horizons)} steps")
    # What lies past the last test row is not to be known: it is missing.
    truth = torch.full((stop - start + longest, panel.num_channels), torch.nan, dtype=torch.float64)
    rows = panel.series[0].values[start:stop]
    truth[: stop - start] = torch.from_numpy((rows - scaler.loc[0]) / scaler.scale[0])
    futures = truth.unfold(0, longest, 1)  # [origin, C, longest], a view
    origins = np.arange(start, stop - min(horizons) + 1)
    size = max(1, min(_WINDOWS_PER_BATCH, _VALUES_PER_BATCH // (longest * panel.num_channels)))
    sums = {horizon: np.zeros(4) for horizon in horizons}  # windows, values, squared and absolute errors
    for first in range(0, len(origins), size):
        chosen = origins[first : first + size]
        error = forecast(chosen).double() - futures[first : first + len(chosen)].transpose(1, 2)
        by_step = torch.stack(
            [(~error.isnan()).double().sum(2), error.square().nansum(2), error.abs().nansum(2)]
        ).numpy()  # [3, B, longest]
        for horizon in horizons:
            inside = chosen + horizon <= stop
            sums[horizon] += (inside.sum(), *by_step[:, inside, :horizon].sum(axis=(1, 2)))
    return {
        horizon: HorizonScore(int(windows), float(squared / values), float(absolute / values))
        for horizon, (windows, values, squared, absolute) in sums.items()
    }
