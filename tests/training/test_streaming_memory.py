"""What a streaming model's memory is for: rhythms longer than its context, whose shape is each series' own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trellis_ts.config import ExperimentConfig
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.forecaster import Forecaster
from trellis_ts.layers.causal import CausalMixer
from trellis_ts.passes import HistoryPass
from trellis_ts.preparation import prepare
from trellis_ts.training import fit
from trellis_ts.types import Columns, Panel, Series

pytestmark = pytest.mark.usefixtures("quiet_lightning")

SEASON, CONTEXT, HORIZON = 96, 16, 8


def make_panel(num_series, num_seasons, seed):
    """Series that repeat a random shape of their own, six contexts long, with a little noise."""
    rng = np.random.default_rng(seed)
    series = []
    for index in range(num_series):
        waves = np.fft.rfft(rng.normal(size=SEASON)) * np.exp(-np.arange(SEASON // 2 + 1) / 8)
        shape = np.fft.irfft(waves, n=SEASON)
        values = np.tile(shape / shape.std(), num_seasons) + 0.1 * rng.normal(size=SEASON * num_seasons)
        time = np.datetime64("2021-03-01", "ns") + np.arange(len(values)) * np.timedelta64(1, "h")
        series.append(Series(f"{seed}-{index}", time, values[:, None]))
    return Panel(tuple(series), Columns("ds", "id", ("y",)), "h")


def error_after(forecaster, panel, seen):
    """Mean absolute error of forecasts over a season, the first after so many seasons."""
    model = forecaster.checkpoint.model
    data = ScaledPanel(panel, forecaster.scaler().of(panel), SEASON)
    passed, errors = HistoryPass(model, data, torch.device("cpu")), []
    every = np.arange(len(panel.series))
    for origin in range(seen * SEASON + 20, (seen + 1) * SEASON + 20, 7):
        where = np.full(len(every), origin)
        future = data.gather(every, where, 1, HORIZON).future
        errors.append((passed.forecast(every, where).point - future).abs().mean())
    return float(torch.stack(errors).mean())


def test_series_never_trained_on_are_learned_by_the_memory_alone(tmp_path, monkeypatch):
    config = ExperimentConfig.of(
        mode="streaming",
        context_length=CONTEXT,
        prediction_length=HORIZON,
        patch_length=4,
        season_length=SEASON,
        calendar_features=False,
        width=32,
        num_heads=2,
        num_slots=32,
        feedforward_width=64,
        loss="mae",
        learning_rate=5e-3,
        batch_size=256,
        windows_per_epoch=16_384,
        max_epochs=6,
        patience=100,
    )
    checkpoint, _ = fit(prepare(make_panel(64, 14, seed=0), config), tmp_path)
    forecaster, fresh = Forecaster(replace(checkpoint, calibration=None)), make_panel(16, 10, seed=1)
    first, second, late = (error_after(forecaster, fresh, seen) for seen in (0, 1, 8))
    assert late < 0.95 * second < 0.9 * first  # the more was seen, the better
    run = CausalMixer.run

    def answer_nothing(mixer, *arguments, **options):
        output, memory = run(mixer, *arguments, **options)
        return torch.zeros_like(output), memory

    monkeypatch.setattr(CausalMixer, "run", answer_nothing)
    assert late < 0.8 * error_after(forecaster, fresh, 8)
