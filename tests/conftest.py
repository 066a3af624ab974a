"""Small panels and untrained models, made the same way for every test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from trellis_ts.checkpoints import Checkpoint, DataRecord, SeriesRecord, build_model
from trellis_ts.config import ExperimentConfig, ModelConfig, TrainingConfig, WindowShape
from trellis_ts.datasets import calendar
from trellis_ts.datasets.covariates import CovariateScaler
from trellis_ts.sizing import covariate_shape
from trellis_ts.types import Columns, Covariate, Panel, Series


@pytest.fixture(scope="session")
def make_panel() -> Callable[..., Panel]:
    """Series of sines with noise; channel c of series s has its own level, size and phase."""

    def make(
        lengths: tuple[int, ...] = (60,),
        *,
        channels: int = 1,
        freq: str = "D",
        start: str = "2024-01-01",
        timezone: str | None = None,
        missing: float = 0.0,
        noise: float = 0.1,
        season_length: int = 7,
        seed: int = 0,
        is_wide: bool | None = None,
    ) -> Panel:
        rng = np.random.default_rng(seed)
        is_wide = len(lengths) == 1 if is_wide is None else is_wide
        series = []
        for index, length in enumerate(lengths):
            first = calendar.to_utc(np.array([start], dtype="datetime64[ns]"), timezone)[0]
            time = np.concatenate(([first], calendar.future_times(first, freq, length - 1, timezone)))
            angle = 2 * np.pi * np.arange(length)[:, None] / season_length + np.arange(channels)
            size = 1 + index + np.arange(channels)
            values = 10.0 * (index + 1) + size * (np.sin(angle) + noise * rng.normal(size=(length, channels)))
            values[rng.random(values.shape) < missing] = np.nan
            series.append(Series("" if is_wide else f"s{index}", time, values))
        names = tuple(f"c{index}" for index in range(channels))
        return Panel(tuple(series), Columns("date", None if is_wide else "id", names), freq, timezone)

    return make


@pytest.fixture(scope="session")
def make_covariates() -> Callable[..., Panel]:
    """Gives a panel past (a number, a category), known (the same) and static covariates (the same), partly missing.

    The known ones reach ``future`` steps beyond the last row.
    """

    def make(panel: Panel, *, future: int = 5, missing: float = 0.1, seed: int = 1) -> Panel:
        rng = np.random.default_rng(seed)
        names = {"past": ("wind", "state"), "known": ("price", "event"), "static": ("size", "kind")}
        categories = ("red", "green", "blue")
        covariates = tuple(
            Covariate(name, role, categories if index else None)
            for role, both in names.items()
            for index, name in enumerate(both)
        )

        def draw(rows: int) -> np.ndarray:
            values = np.column_stack((rng.normal(50, 5, rows), rng.integers(0, len(categories), rows)))
            values[rng.random(values.shape) < missing] = np.nan
            return values

        series = tuple(
            replace(each, past=draw(len(each)), known=draw(len(each) + future), static=draw(1)[0])
            for each in panel.series
        )
        return replace(panel, series=series, columns=replace(panel.columns, covariates=covariates))

    return make


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Checkpoint]:
    """A model with random weights everywhere and a record of the panel, as if its first ``known`` rows had been seen.

    The scaler's numbers are round ones, so that a test can undo them by hand.
    """

    def make(
        panel: Panel,
        *,
        context_length: int = 12,
        prediction_length: int = 5,
        patch_length: int = 4,
        patch_stride: int = 3,
        season_length: int = 7,
        known: int | None = None,
        seed: int = 0,
        loss: Any = "quantile",
        quantile_levels: tuple[float, ...] = (0.1, 0.5, 0.9),
        cycles: tuple[Any, ...] = (),
        **settings: Any,
    ) -> Checkpoint:
        small: dict[str, Any] = {"width": 8, "num_heads": 2, "num_slots": 3, "num_layers": 1, "feedforward_width": 6}
        experiment = ExperimentConfig(
            model=ModelConfig(**(small | settings)),
            training=TrainingConfig(loss=loss, quantile_levels=quantile_levels),
        )
        covariates = CovariateScaler.fit(panel, [(0, len(each)) for each in panel.series])
        covariates = replace(covariates, cycles=cycles)
        shape = WindowShape(
            context_length,
            prediction_length,
            patch_length,
            patch_stride,
            season_length,
            panel.num_channels,
            covariate_shape(covariates),
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build_model(experiment, shape)
            for parameter in model.parameters():  # so that nothing is left at an initial 0 or 1
                parameter.data += 0.1 * torch.randn_like(parameter)
        series = tuple(
            SeriesRecord(
                name=each.name,
                loc=tuple(float(10 * (index + 1) + channel) for channel in range(panel.num_channels)),
                scale=tuple(0.5 * (channel + 1) for channel in range(panel.num_channels)),
                known_until=None if known is None else int(each.time[min(known, len(each)) - 1].astype("int64")),
            )
            for index, each in enumerate(panel.series)
        )
        columns = panel.columns
        record = DataRecord(
            columns.time,
            columns.id,
            panel.channels,
            panel.freq,
            panel.timezone,
            panel.dataset,
            series,
            covariates.covariates,
        )
        return Checkpoint(model.eval(), experiment, record)

    return make
