"""Scores: those of explicit windows, none of them known to the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import trellis_ts.evaluation as module
from trellis_ts.errors import DataError
from trellis_ts.evaluation import evaluate, unseen_ranges
from trellis_ts.forecaster import Forecaster
from trellis_ts.types import Series

HORIZON, CONTEXT = 5, 12


@pytest.fixture(scope="module")
def panel(make_panel):
    return make_panel((40, 33), channels=2, missing=0.2)


@pytest.fixture(scope="module")
def forecaster(make_checkpoint, panel):
    return Forecaster(make_checkpoint(panel, known=24, prediction_length=HORIZON, context_length=CONTEXT))


def direct(forecaster, panel, first_origins):
    """The scores of the model on windows cut one by one with numpy; forecasts through ``Forecaster.forecast``."""
    record = {each.name: each for each in forecaster.checkpoint.data.series}
    errors, pinballs, covered, scales = [], [], [], []
    naive_errors, windows = [], 0
    for series, first in zip(panel.series, first_origins, strict=True):
        if series.name in record:
            loc, scale = np.array(record[series.name].loc), np.array(record[series.name].scale)
        else:
            loc, scale = np.nanmean(series.values, axis=0), np.nanstd(series.values, axis=0)
        for origin in range(first, len(series) - HORIZON + 1):
            past = Series(series.name, series.time[:origin], series.values[:origin])
            known = series.name in record  # a stranger's scale comes from its whole history: hand it over by hand
            truth = (series.values[origin : origin + HORIZON] - loc) / scale
            if known:
                quantiles = forecaster.forecast(replace(panel, series=(past,))).quantiles[0].numpy()
                quantiles = (quantiles - loc[:, None]) / scale[:, None]
            else:
                pretender = replace(past, name="s0", values=(past.values - loc) / scale)
                anchor = record["s0"]
                pretender.values[:] = pretender.values * np.array(anchor.scale) + np.array(anchor.loc)
                quantiles = forecaster.forecast(replace(panel, series=(pretender,))).quantiles[0].numpy()
                quantiles = (quantiles - np.array(anchor.loc)[:, None]) / np.array(anchor.scale)[:, None]
            seen = ~np.isnan(truth)
            windows += 1
            errors.append((quantiles[..., 1] - truth)[seen])
            scales.append(np.broadcast_to(scale, truth.shape)[seen])
            levels = np.array([0.1, 0.5, 0.9])
            miss = truth[..., None] - quantiles
            pinballs.append(2 * np.maximum(levels * miss, (levels - 1) * miss).mean(axis=-1)[seen])
            covered.append(((quantiles[..., 0] <= truth) & (truth <= quantiles[..., 2]))[seen])
            naive = np.zeros_like(truth)
            for channel in range(truth.shape[1]):
                history = (series.values[max(0, origin - 14) : origin, channel] - loc[channel]) / scale[channel]
                known_values = history[~np.isnan(history)]
                for step in range(HORIZON):
                    back = history[::-1][6 - step % 7 :: 7]
                    back = back[~np.isnan(back)]
                    naive[step, channel] = back[0] if len(back) else known_values[-1] if len(known_values) else 0.0
            naive_errors.append((naive - truth)[seen])
    error, scale = np.concatenate(errors), np.concatenate(scales)
    naive_error = np.concatenate(naive_errors)
    return {
        "windows": windows,
        "values": len(error),
        "mse": (error**2).mean(),
        "mae": np.abs(error).mean(),
        "rmse_original": ((error * scale) ** 2).mean() ** 0.5,
        "mae_original": np.abs(error * scale).mean(),
        "quantile_loss": np.concatenate(pinballs).mean(),
        "coverage": np.concatenate(covered).mean(),
        "naive_mse": (naive_error**2).mean(),
        "naive_mae": np.abs(naive_error).mean(),
    }


def check(result, expected):
    assert (result.num_windows, result.num_values) == (expected["windows"], expected["values"])
    for name in ("mse", "mae", "rmse_original", "mae_original", "quantile_loss", "coverage"):
        assert getattr(result.model, name) == pytest.approx(expected[name], rel=1e-4), name
    assert result.seasonal_naive.mse == pytest.approx(expected["naive_mse"], rel=1e-4)
    assert result.seasonal_naive.mae == pytest.approx(expected["naive_mae"], rel=1e-4)
    assert result.seasonal_naive.quantile_loss is None


def test_scores_are_those_of_explicit_windows(forecaster, panel):
    result = evaluate(forecaster, panel)
    check(result, direct(forecaster, panel, (24, 24)))
    assert (result.num_series, result.prediction_length, result.season_length) == (2, HORIZON, 7)
    assert result.band == pytest.approx(0.8)


def test_the_size_of_batches_is_irrelevant(forecaster, panel, monkeypatch):
    expected = evaluate(forecaster, panel)
    monkeypatch.setattr(module, "_WINDOWS_PER_BATCH", 3)
    done = []
    actual = evaluate(forecaster, panel, progress=lambda *state: done.append(state))
    assert actual.model.mse == pytest.approx(expected.model.mse, rel=1e-6)
    assert actual.model.coverage == expected.model.coverage
    assert done[0] == (3, actual.num_windows)
    assert done[-1] == (actual.num_windows, actual.num_windows)


def test_a_new_series_is_scored_as_a_whole(forecaster, panel, make_panel):
    stranger = replace(make_panel((30,), channels=2, seed=5).series[0], name="stranger")
    grown = replace(panel, series=(*panel.series, stranger))
    assert unseen_ranges(grown, forecaster.checkpoint.data) == [(24, 40), (24, 33), (0, 30)]
    check(evaluate(forecaster, grown), direct(forecaster, grown, (24, 24, CONTEXT)))


def test_rows_the_model_knew_are_never_scored(forecaster, panel):
    """Their values move the contexts, never a truth: with contexts ending before them, nothing moves."""
    expected = evaluate(forecaster, panel).num_values
    assert expected == sum(
        int((~np.isnan(series.values[origin : origin + HORIZON])).sum())
        for series in panel.series
        for origin in range(24, len(series) - HORIZON + 1)
    )
    early = replace(panel, series=tuple(replace(s, time=s.time[:24], values=s.values[:24]) for s in panel.series))
    with pytest.raises(DataError, match="no window of 5 steps lies after the rows the model was trained on"):
        evaluate(forecaster, early)


def test_a_table_without_its_first_rows_is_scored_on_the_same_windows(forecaster, panel):
    """What was known is told by the stamp, not by the number of the row."""
    later = replace(panel, series=tuple(replace(s, time=s.time[7:], values=s.values[7:]) for s in panel.series))
    assert unseen_ranges(later, forecaster.checkpoint.data) == [(17, 33), (17, 26)]
    full, cut = evaluate(forecaster, panel), evaluate(forecaster, later)
    assert cut.model.mse == pytest.approx(full.model.mse, rel=1e-6)


def test_forecasts_do_not_see_what_they_are_scored_on(forecaster, panel):
    """With every later value poisoned but for the last five, the window before those sees no poison in its context."""

    def poisoned(value):
        first = panel.series[0]
        values = first.values.copy()
        values[24:] = np.nan
        values[35:] = value
        return replace(panel, series=(Series("s0", first.time, values),))

    plain, shifted = evaluate(forecaster, poisoned(0.0)), evaluate(forecaster, poisoned(1000.0))
    assert plain.num_values == shifted.num_values
    # The context of every window that holds a truth ends at row 35 or before, so forecasts are equal and the squared
    # errors differ exactly as the truths do.
    mean_error = (shifted.model.rmse_original**2 - plain.model.rmse_original**2 - 1000.0**2) / -2000.0
    assert plain.num_values == 2 * (5 + 4 + 3 + 2 + 1)
    assert abs(mean_error) <= plain.model.mae_original + 1e-3


def test_missing_truths_only_are_refused(forecaster, panel):
    empty = replace(
        panel,
        series=tuple(
            replace(s, values=np.where(np.arange(len(s))[:, None] < 24, s.values, np.nan)) for s in panel.series
        ),
    )
    with pytest.raises(DataError, match="every value after the rows"):
        evaluate(forecaster, empty)


def test_a_model_of_points_has_no_quantile_scores(make_checkpoint, panel):
    result = evaluate(Forecaster(make_checkpoint(panel, known=24, loss="mse")), panel)
    assert (result.band, result.model.quantile_loss, result.model.coverage) == (None, None, None)
    assert result.model.mse > 0


def test_evaluating_changes_nothing(forecaster, panel):
    before = [series.values.copy() for series in panel.series]
    weights = {name: value.clone() for name, value in forecaster.checkpoint.model.state_dict().items()}
    evaluate(forecaster, panel)
    for series, values in zip(panel.series, before, strict=True):
        np.testing.assert_array_equal(series.values, values)
    assert all(torch.equal(value, weights[name]) for name, value in forecaster.checkpoint.model.state_dict().items())
