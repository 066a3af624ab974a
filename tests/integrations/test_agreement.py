"""The same data and settings give the same forecast, whichever way they come."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from gluonts.dataset.pandas import PandasDataset

from trellis_ts import Forecaster
from trellis_ts.integrations.gluonts import TrellisEstimator
from trellis_ts.integrations.sklearn import TrellisRegressor


@pytest.mark.parametrize("with_covariate", [False, True])
def test_all_ways_give_the_same_forecast(tiny, series, covariate, with_covariate):
    settings = {**tiny, "prediction_length": 5, "context_length": 14, "test_size": 0}
    frame = pd.DataFrame({"time": series.index, "y": series.to_numpy()})
    price = covariate["price"].to_numpy()
    future = None
    if with_covariate:
        frame["price"] = price[:60]
        future = pd.DataFrame({"time": covariate.index[60:65], "price": price[60:65]})
    known = {"known_covariates": "price"} if with_covariate else {}
    expected = Forecaster.fit(frame, **settings, **known).predict(frame, future)
    median, upper = expected["forecast"].to_numpy(), expected["q0.9"].to_numpy()

    entry = pd.DataFrame({"target": series}) if not with_covariate else None
    if with_covariate:
        entry = pd.DataFrame({"target": series, "price": price[:60]})
    train = PandasDataset(entry, target="target", freq="D", feat_dynamic_real=["price"] if with_covariate else None)
    history = [dict(each) for each in train]
    if with_covariate:
        history[0]["feat_dynamic_real"] = price[None, :65]
    rest = {key: value for key, value in settings.items() if key != "prediction_length"}
    forecast = next(TrellisEstimator(prediction_length=5, settings=rest).train(train).predict(history))
    np.testing.assert_allclose(forecast.mean, median, rtol=1e-6)
    np.testing.assert_allclose(forecast.quantile(0.9), upper, rtol=1e-6)

    if with_covariate:
        model = TrellisRegressor(settings=settings).fit(covariate[:60], series)
        np.testing.assert_allclose(model.predict(covariate[60:65]), median, rtol=1e-6)

    pytest.importorskip("sktime", reason="needs the extra sktime")
    from trellis_ts.integrations.sktime import TrellisForecaster

    past, ahead = (covariate[:60], covariate[60:65]) if with_covariate else (None, None)
    forecaster = TrellisForecaster(settings=settings).fit(series, X=past, fh=[1, 2, 3, 4, 5])
    np.testing.assert_allclose(forecaster.predict(X=ahead), median, rtol=1e-6)
    np.testing.assert_allclose(forecaster.predict_quantiles(X=ahead, alpha=[0.9])["y", 0.9], upper, rtol=1e-6)
