"""Every test window, once, for every horizon."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trellis_ts.benchmark.cell import run_cell
from trellis_ts.benchmark.plan import Cell
from trellis_ts.benchmark.scoring import score_prefixes
from trellis_ts.datasets.splits import Splits
from trellis_ts.errors import DataError
from trellis_ts.evaluation import evaluate
from trellis_ts.forecaster import Forecaster

TINY = {
    "width": 8,
    "num_heads": 2,
    "num_slots": 3,
    "num_layers": 1,
    "feedforward_width": 8,
    "patch_length": 6,
    "loss": "mae",
    "max_epochs": 1,
    "windows_per_epoch": 8,
    "validation_windows": 4,
    "batch_size": 4,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def made(make_panel, make_checkpoint):
    panel = make_panel((80,), channels=3, missing=0.1)
    forecaster = Forecaster(make_checkpoint(panel, known=50))
    splits = Splits.chronological(panel, validation_size=14, test_size=30, prediction_length=5)
    return forecaster, splits


def test_the_trained_horizon_has_the_score_of_evaluate(made):
    forecaster, splits = made
    expected = evaluate(forecaster, splits.panel)
    score = score_prefixes(forecaster, splits, [5])[5]
    assert score.num_windows == expected.num_windows == 30 - 5 + 1
    assert score.mse == pytest.approx(expected.model.mse, rel=1e-5)
    assert score.mae == pytest.approx(expected.model.mae, rel=1e-5)


def test_prefixes_are_scored_on_all_their_windows(made, monkeypatch):
    """Against windows one by one, those at the end included, whose longer futures leave the test rows."""
    monkeypatch.setattr("trellis_ts.benchmark.scoring._WINDOWS_PER_BATCH", 7)
    forecaster, splits = made
    scores = score_prefixes(forecaster, splits, [1, 3, 5])
    start, stop = splits.borders[0].test
    values = (splits.panel.series[0].values - forecaster.scaler().loc) / forecaster.scaler().scale
    for horizon in (1, 3, 5):
        errors = []
        for origin in range(start, stop - horizon + 1):
            series = splits.panel.series[0]
            cut = replace(series, time=series.time[:origin], values=series.values[:origin])
            point = forecaster.forecast(replace(splits.panel, series=(cut,))).point[0].numpy()
            scaled = (point - forecaster.scaler().loc) / forecaster.scaler().scale
            errors.append(scaled[:horizon] - values[origin : origin + horizon])
        assert scores[horizon].num_windows == len(errors) == 30 - horizon + 1
        assert scores[horizon].mse == pytest.approx(np.nanmean(np.square(errors)), rel=1e-4)
        assert scores[horizon].mae == pytest.approx(np.nanmean(np.abs(errors)), rel=1e-4)


def test_rows_after_the_test_split_are_never_read(made):
    forecaster, splits = made
    border = splits.borders[0]
    shorter = replace(splits, borders=(replace(border, test=(border.test[0], border.test[1] - 8)),))
    before = score_prefixes(forecaster, shorter, [2, 5])
    series = splits.panel.series[0]
    values = series.values.copy()
    values[-8:] = 1e6
    poisoned = replace(shorter, panel=replace(splits.panel, series=(replace(series, values=values),)))
    assert score_prefixes(forecaster, poisoned, [2, 5]) == before
    assert before[2].num_windows == 30 - 8 - 2 + 1


def test_what_cannot_be_scored(made, make_panel):
    forecaster, splits = made
    with pytest.raises(DataError, match="30 test rows, fewer than the horizon of 31"):
        score_prefixes(forecaster, splits, [31])
    several = Splits.chronological(
        make_panel((40, 40), channels=3), validation_size=10, test_size=10, prediction_length=5
    )
    with pytest.raises(DataError, match="holds 2 series; a benchmark takes one wide table"):
        score_prefixes(forecaster, several, [5])


@pytest.mark.parametrize(("channels", "season"), [(321, 168), (137, 144)])
def test_a_cell_of_the_shape_of_the_wide_data_sets(tmp_path, channels, season):
    """As many channels as Electricity and Solar have, mixed, on few rows."""
    rows = 260
    rng = np.random.default_rng(0)
    values = np.sin(2 * np.pi * (np.arange(rows)[:, None] / 24 + rng.random(channels))) + rng.normal(
        0, 0.1, (rows, channels)
    )
    path = tmp_path / "wide.csv"
    stamps = np.datetime_as_string(np.datetime64("2024-01-01T00", "h") + np.arange(rows), unit="s")
    lines = [",".join(["date", *(f"c{each}" for each in range(channels))])]
    lines += [",".join([stamp, *(f"{each:.4f}" for each in row)]) for stamp, row in zip(stamps, values, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    settings = TINY | {"channel_mixing": "trellis", "season_length": season, "test_size": 0.2}
    cell = Cell(str(path), "trellis", "", 24, 12, (6, 12), 0, settings)
    result = run_cell(cell)
    assert {horizon: score["num_windows"] for horizon, score in result["scores"].items()} == {"6": 47, "12": 41}
    assert all(np.isfinite(score["mse"]) for score in result["scores"].values())
    assert result["settings"] == settings
    assert result["peak_memory_bytes"] > 1e8
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert {"cpu", "cores", "load"} <= set(result["machine"])
    assert {"python", "torch", "trellis-ts"} <= set(result["versions"])
