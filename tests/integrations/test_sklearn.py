"""The scikit-learn adapter: its estimator checks, and pipelines, searches and splits by time."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import TransformedTargetRegressor
from sklearn.model_selection import GridSearchCV, TimeSeriesSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from trellis_ts.errors import ConfigError, DataError
from trellis_ts.integrations.sklearn import TrellisRegressor

TINY = {"num_heads": 2, "num_slots": 4, "feedforward_width": 8, "windows_per_epoch": 8, "validation_windows": 4}
SMALL = {"max_epochs": 1, "width": 8, "num_layers": 1, "settings": TINY}

# The first row of X is the first step after the training, the second the second: what a row means is its place.
EXPECTED_FAILURES = {
    "check_methods_subset_invariance": "a row's place in X is its place in time, which a subset changes",
    "check_methods_sample_order_invariance": "rows are steps in the order of time",
}


@parametrize_with_checks([TrellisRegressor(**SMALL)], expected_failed_checks=lambda estimator: EXPECTED_FAILURES)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_predict_forecasts_the_rows_that_follow(series, covariate):
    model = TrellisRegressor(**SMALL, prediction_length=4).fit(covariate[:60], series)
    forecast = model.predict(covariate[60:])
    assert forecast.shape == (10,)
    np.testing.assert_allclose(model.predict(covariate[60:64]), forecast[:4])
    frame = pd.DataFrame({"date": series.index, "y": series.to_numpy(), "x0": covariate["price"][:60].to_numpy()})
    future = pd.DataFrame({"date": covariate.index[60:64], "x0": covariate["price"][60:64].to_numpy()})
    saved = model.forecaster_
    direct = saved.predict(frame.rename(columns={"date": "time"}), future.rename(columns={"date": "time"}))
    np.testing.assert_allclose(direct["forecast"], forecast[:4], rtol=1e-6)


def test_a_gap_is_seen_on_a_calendar(series, covariate):
    model = TrellisRegressor(**SMALL, prediction_length=8).fit(covariate[:60], series)
    blind = covariate[60:68].copy()
    blind.iloc[:3] = np.nan
    np.testing.assert_allclose(model.predict(covariate[63:68]), model.predict(blind)[3:])
    with pytest.raises(DataError, match=r"X begins at 2024-02-29, but forecasts begin after .* 2024-02-29"):
        model.predict(covariate[59:63])


def test_searches_and_pipelines(series, covariate):
    pipeline = make_pipeline(StandardScaler(), TrellisRegressor(**SMALL))
    search = GridSearchCV(
        TransformedTargetRegressor(pipeline, transformer=StandardScaler()),
        {"regressor__trellisregressor__context_length": [7, 14]},
        cv=TimeSeriesSplit(2, test_size=5),
        scoring="neg_mean_absolute_error",
        error_score="raise",
    )
    search.fit(covariate[:60].to_numpy(), series.to_numpy())
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert len(set(search.cv_results_["mean_test_score"])) == 2
    assert search.predict(covariate[60:].to_numpy()).shape == (10,)


def test_quantiles_missing_values_and_several_series(series, covariate):
    both = np.column_stack([series, series[::-1]])
    both[5, 1] = np.nan
    X = covariate.to_numpy(copy=True)
    X[7] = np.nan
    model = TrellisRegressor(**SMALL).fit(X[:60], both)
    levels = model.predict(X[60:], quantile_levels=[0.1, 0.5, 0.9])
    assert levels.shape == (10, 2, 3)
    assert (np.diff(levels, axis=-1) >= 0).all()
    np.testing.assert_allclose(levels[..., 1], model.predict(X[60:]))


def test_settings_reach_training(series, covariate):
    X = covariate[:60].to_numpy()
    with pytest.raises(ConfigError, match="there is no setting widht; did you mean width"):
        TrellisRegressor(settings={"widht": 3}).fit(X, series)
    seeded = SMALL | {"settings": TINY | {"initial_skip": "zero"}}  # the solved start, often best here, has no seed
    first = TrellisRegressor(**seeded, random_state=1).fit(X, series).predict(X)
    other = TrellisRegressor(**seeded, random_state=np.random.RandomState(2)).fit(X, series).predict(X)
    assert not np.allclose(first, other)
