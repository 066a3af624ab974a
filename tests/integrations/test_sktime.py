"""The sktime adapter: the suite of checks that sktime has for its own, panels, and rows seen later."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("sktime", reason="needs the extra sktime")

from sktime.utils.estimator_checks import check_estimator

from trellis_ts.integrations.sktime import TrellisForecaster

# sktime warns that predict_proba needs its optional package skpro, in whose place it says what is missing.
pytestmark = pytest.mark.filterwarnings("ignore:Forecasters' predict_proba requires skpro:UserWarning")
NUMBER_OF_CHECKS = 890


@pytest.mark.slow
def test_all_of_sktimes_checks():
    results = check_estimator(TrellisForecaster, raise_exceptions=True, verbose=False)
    assert len(results) >= NUMBER_OF_CHECKS
    assert set(results.values()) == {"PASSED"}


def test_sktimes_checks_of_what_a_forecaster_is_and_gives():
    results = check_estimator(
        TrellisForecaster,
        raise_exceptions=True,
        verbose=False,
        tests_to_run=[
            "test_random_tags",
            "test_constructor",
            "test_clone",
            "test_valid_estimator_class_tags",
            "test_hierarchical_with_exogenous",
            "test__y_remember_data",
            "test_y_multivariate_raises_error",
            "test_predict_quantiles",
            "test_update_predict_single",
            "test_persistence_via_pickle",
        ],
    )
    assert len(results) > 50


@pytest.fixture
def forecaster(tiny):
    settings = {key: value for key, value in tiny.items() if key != "max_epochs"}
    return TrellisForecaster(prediction_length=4, max_epochs=1, settings=settings)


def test_update_moves_the_start_and_keeps_the_weights(forecaster, series):
    forecaster.fit(series[:50], fh=[1, 2, 3])
    weights = [each.clone() for each in forecaster.forecaster_.checkpoint.model.parameters()]
    forecaster.update(series[50:])
    assert list(forecaster.predict().index) == list(pd.date_range("2024-03-01", periods=3))
    assert all(
        (a == b).all() for a, b in zip(weights, forecaster.forecaster_.checkpoint.model.parameters(), strict=True)
    )
    frame = series.rename_axis("time").rename("y").reset_index()
    direct = forecaster.forecaster_.predict(frame)["forecast"][:3]
    np.testing.assert_allclose(forecaster.predict(), direct, rtol=1e-6)


def test_rows_that_were_seen_are_forecast_from_those_before(forecaster, series):
    forecaster.fit(series)
    inside = forecaster.predict(fh=[-2, 0, 1])
    assert list(inside.index) == [*series.index[[57, 59]], series.index[-1] + pd.Timedelta(days=1)]
    for place, stop in ((0, 57), (1, 59)):
        frame = series[:stop].rename_axis("time").rename("y").reset_index()
        assert inside.iloc[place] == pytest.approx(forecaster.forecaster_.predict(frame)["forecast"].iloc[0], rel=1e-6)


def test_one_model_for_a_panel_of_different_lengths(forecaster, series, covariate):
    y = pd.concat({"a": series, "b": 2 * series[:55]}, names=["shop", "date"]).to_frame("sales")
    X = pd.concat({"a": covariate, "b": covariate}, names=["shop", "date"])
    forecaster.fit(y, X=X.loc[y.index], fh=[1, 3])
    assert len(forecaster.forecaster_.checkpoint.data.series) == 2
    forecast = forecaster.predict(X=X[X.index.get_level_values("date") > series.index[-1]])
    assert list(forecast.index) == [
        (shop, stamp) for shop in ("a", "b") for stamp in pd.to_datetime(["2024-03-01", "2024-03-03"])
    ]
    bands = forecaster.predict_interval(X=X[X.index.get_level_values("date") > series.index[-1]], coverage=[0.5, 0.9])
    assert bands.shape == (4, 4)
    assert (bands["sales", 0.9, "lower"] <= bands["sales", 0.5, "lower"]).all()


@pytest.mark.parametrize("index", [pd.RangeIndex(60), pd.period_range("2010-01", periods=60, freq="M")])
def test_other_indices(forecaster, series, index):
    forecaster.fit(series.set_axis(index), fh=[1, 2])
    step = forecaster.predict().index
    assert step[0] == index[-1] + 1
