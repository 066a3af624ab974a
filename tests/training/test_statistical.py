"""statsforecast's models as baselines: what they are given, what comes back, and what happens where they fail."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from trellis_ts.errors import ConfigError
from trellis_ts.evaluation import backtest
from trellis_ts.forecaster import Forecaster
from trellis_ts.statistical import STATISTICAL_BASELINES, load_model, statistical_forecast

LEVELS = (0.025, 0.1, 0.5, 0.9)


def history(rows=60, seed=0):
    rng = np.random.default_rng(seed)
    return 100 + 10 * np.sin(2 * np.pi * np.arange(rows) / 7) + rng.normal(size=rows)


@pytest.mark.parametrize("name", STATISTICAL_BASELINES)
def test_a_season_is_found_and_quantiles_rise(name):
    pytest.importorskip("statsforecast")
    found = statistical_forecast(load_model(name, 7), history(), 10, LEVELS)
    assert found.shape == (10, 5)
    truth = 100 + 10 * np.sin(2 * np.pi * np.arange(60, 70) / 7)
    assert np.abs(found[:, 0] - truth).mean() < 2.5
    np.testing.assert_array_equal(found[:, 0], found[:, 3])  # the mean stands for the median
    assert (np.diff(found[:, 1:], axis=1) > 0).all()


def test_it_is_the_library_s_own_forecast():
    models = pytest.importorskip("statsforecast.models")
    theirs = models.AutoTheta(season_length=7).forecast(y=history(), h=5, level=[80, 95])
    found = statistical_forecast(load_model("auto_theta", 7), history(), 5, LEVELS)
    for column, name in enumerate(("mean", "lo-95", "lo-80", "mean", "hi-80")):
        np.testing.assert_allclose(found[:, column], theirs[name])


def test_gaps_of_the_history_are_bridged_along_a_line():
    pytest.importorskip("statsforecast")
    values = np.arange(40.0) * 2
    gappy = values.copy()
    gappy[[10, 11, 25]] = np.nan
    padded = np.concatenate(([np.nan] * 5, gappy))
    model = load_model("auto_ets", 1)
    expected = statistical_forecast(model, values, 4, ())
    np.testing.assert_allclose(statistical_forecast(model, padded, 4, ()), expected)
    assert np.isnan(gappy).sum() == 3


@pytest.mark.parametrize("values", [[], [1.0, 2.0, 3.0], [np.nan] * 30])
def test_too_little_history_is_no_forecast(values):
    pytest.importorskip("statsforecast")
    assert statistical_forecast(load_model("auto_theta", 7), np.array(values, dtype=float), 3, LEVELS) is None


class Failing:
    def __init__(self, values=None):
        self.values = values

    def forecast(self, y, h, *, level=None):
        if self.values is None:
            raise RuntimeError("no convergence")
        return {"mean": np.full(h, self.values)}


@pytest.mark.parametrize("model", [Failing(), Failing(np.nan), Failing(np.inf)])
def test_a_failed_fit_is_no_forecast(model):
    assert statistical_forecast(model, history(), 3) is None


@pytest.mark.parametrize("name", STATISTICAL_BASELINES)
def test_without_the_library_it_is_said_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "statsforecast", None)
    with pytest.raises(ConfigError, match=rf"{name} needs statsforecast.* pip install 'trellis-ts\[baselines\]'"):
        load_model(name, 7)


@pytest.fixture(scope="module")
def panel(make_panel):
    return make_panel((60, 48), channels=2, missing=0.1)


@pytest.fixture(scope="module")
def forecaster(make_checkpoint, panel):
    return Forecaster(make_checkpoint(panel, known=38, prediction_length=5, context_length=12))


def test_a_backtest_fits_in_the_units_of_the_data_before_each_origin(forecaster, panel):
    pytest.importorskip("statsforecast")
    found = backtest(forecaster, panel, step=5, baselines=("auto_theta",))
    errors = []
    for series in panel.series:
        for origin in range(len(series) - 5, 37, -5):
            for channel in range(2):
                fit = statistical_forecast(load_model("auto_theta", 7), series.values[:origin, channel], 5, ())
                errors.append(np.abs(fit[:, 0] - series.values[origin : origin + 5, channel]))
    assert found.scores["auto_theta"].mae_original == pytest.approx(np.nanmean(errors), rel=1e-5)
    assert found.fallbacks == {"auto_theta": 0}
    assert found.scores["auto_theta"].mae < found.model.mae  # which is untrained


def test_where_a_fit_fails_seasonal_naive_stands_in_and_is_counted(forecaster, panel, monkeypatch):
    monkeypatch.setattr("trellis_ts.evaluation.load_model", lambda name, season_length: Failing())
    found = backtest(forecaster, panel, step=5, baselines=("mstl", "seasonal_naive"))
    assert found.fallbacks == {"mstl": 2 * found.num_windows}
    assert found.scores["mstl"].mae == pytest.approx(found.seasonal_naive.mae)
    assert found.scores["mstl"].crps == pytest.approx(found.seasonal_naive.crps)


@pytest.mark.parametrize("value", [np.nan, 1e9])
def test_a_fit_does_not_see_what_comes_after_its_origin(forecaster, panel, monkeypatch, value):
    pytest.importorskip("statsforecast")
    read = []
    monkeypatch.setattr(
        "trellis_ts.evaluation.statistical_forecast", lambda model, history, *rest: read.append(history.copy())
    )
    first = panel.series[0]
    changed = np.where(np.arange(len(first))[:, None] < 55, first.values, value)
    for values in (first.values, changed):
        series = (replace(first, values=values), panel.series[1])
        backtest(forecaster, replace(panel, series=series), max_origins=1, baselines=("auto_theta",))
    # One origin per series: row 55 of the first, row 43 of the second; two channels each.
    assert [len(each) for each in read] == 2 * [55, 55, 43, 43]
    for clean, poisoned in zip(read[:4], read[4:], strict=True):
        np.testing.assert_array_equal(clean, poisoned)
