"""The GluonTS adapter: trained, written, read back and evaluated as GluonTS does with its own models."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from gluonts.dataset.common import ListDataset
from gluonts.dataset.pandas import PandasDataset
from gluonts.dataset.split import split
from gluonts.ev.metrics import MSE, MeanWeightedSumQuantileLoss
from gluonts.evaluation import Evaluator, make_evaluation_predictions
from gluonts.model import evaluate_model
from gluonts.model.forecast import QuantileForecast, SampleForecast
from gluonts.model.predictor import Predictor

from trellis_ts.errors import CheckpointError, DataError
from trellis_ts.integrations.gluonts import TrellisEstimator, TrellisPredictor


def dataset(length, *, freq="h", features=True, count=4):
    """Levels that differ, of lengths that differ, with a gap; features over the length of the target."""
    rng = np.random.default_rng(0)
    entries = []
    for index in range(count):
        steps = length - index
        target = index + 0.1 * rng.normal(size=steps)
        target[3] = np.nan
        entry = {"item_id": f"item{index}", "start": pd.Period("2024-01-01 00:00", freq=freq), "target": target}
        if features:
            entry |= {
                "feat_static_cat": np.array([index]),
                "feat_static_real": np.array([float(index), 0.5]),
                "feat_dynamic_real": rng.normal(size=(2, steps)),
                "feat_dynamic_cat": rng.integers(0, 3, size=(1, steps)),
                "past_feat_dynamic_real": rng.normal(size=(1, steps)),
            }
        entries.append(entry)
    return entries


def without_end(entries, steps):
    """The histories: targets and past features end ``steps`` earlier than the known ones."""
    histories = []
    for each in entries:
        past = each["past_feat_dynamic_real"][:, :-steps]
        histories.append({**each, "target": each["target"][:-steps], "past_feat_dynamic_real": past})
    return histories


@pytest.mark.parametrize("forecast_type", ["quantile", "sample"])
@pytest.mark.parametrize("validation", [None, "same", "longer"])
@pytest.mark.parametrize("features", [False, True])
def test_train_write_read_forecast(tmp_path, tiny, validation, features, forecast_type):
    train = dataset(40, features=features)
    test = dataset(44, features=features)
    estimator = TrellisEstimator.from_hyperparameters(
        prediction_length=3, freq="h", forecast_type=forecast_type, settings=tiny
    )
    trained = estimator.train(train, {None: None, "same": train, "longer": test}[validation])
    trained.serialize(tmp_path)
    predictor = Predictor.deserialize(tmp_path)
    assert isinstance(predictor, TrellisPredictor)
    assert {each.suffix for each in tmp_path.rglob("*.*")} == {".json", ".safetensors"}
    forecasts, truths = make_evaluation_predictions(ListDataset(test, freq="h"), predictor, num_samples=20)
    forecasts, truths = list(forecasts), list(truths)
    again = list(make_evaluation_predictions(ListDataset(test, freq="h"), trained, num_samples=20)[0])
    for index, (forecast, other) in enumerate(zip(forecasts, again, strict=True)):
        assert type(forecast) is (QuantileForecast if forecast_type == "quantile" else SampleForecast)
        assert forecast.item_id == f"item{index}"
        assert forecast.start_date == pd.Period("2024-01-01 00:00", freq="h") + 44 - index - 3
        np.testing.assert_array_equal(forecast.quantile(0.9), other.quantile(0.9))
        assert forecast.mean.shape == (3,)
        assert abs(forecast.mean.mean() - index) < 0.6  # an item's own level
    scores, _ = Evaluator(quantiles=[0.1, 0.5, 0.9], num_workers=0)(iter(truths), iter(forecasts))
    assert 0 < scores["mean_wQuantileLoss"] < 1


def test_evaluate_model_and_windows_of_one_series(tiny, series):
    data = PandasDataset({"a": series.to_frame("target"), "b": 2 * series.to_frame("target")}, freq="D")
    training, template = split(data, offset=-9)
    predictor = TrellisEstimator(prediction_length=3, settings=tiny).train(training)
    instances = template.generate_instances(prediction_length=3, windows=3)
    frame = evaluate_model(
        predictor, test_data=instances, metrics=[MSE(), MeanWeightedSumQuantileLoss([0.1, 0.5, 0.9])], seasonality=7
    )
    assert 0 < float(frame["MSE[mean]"].iloc[0]) < 20
    starts = [each.start_date for each in predictor.predict(instances.input)]
    assert [str(each) for each in starts] == ["2024-02-21", "2024-02-24", "2024-02-27"] * 2


def test_features_are_read(tiny):
    train = dataset(40)
    predictor = TrellisEstimator(prediction_length=3, settings={**tiny, "max_epochs": 3}).train(train)
    assert {each.name: each.role for each in predictor.forecaster.checkpoint.data.covariates} == {
        "past_feat_dynamic_real_0": "past",
        "feat_dynamic_real_0": "known",
        "feat_dynamic_real_1": "known",
        "feat_dynamic_cat_0": "known",
        "feat_static_real_0": "static",
        "feat_static_real_1": "static",
        "feat_static_cat_0": "static",
    }
    histories = without_end(dataset(43), 3)
    before = next(iter(predictor.predict(histories))).mean
    histories[0]["feat_dynamic_real"] = histories[0]["feat_dynamic_real"] + np.array([[0.0] * 40 + [9.0] * 3] * 2)
    assert not np.allclose(next(iter(predictor.predict(histories))).mean, before)
    for name, message in (("feat_static_cat", "lacks the field.*feat_static_cat"), ("feat_dynamic_real", "lacks")):
        with pytest.raises(DataError, match=message):
            list(predictor.predict([{key: value for key, value in histories[0].items() if key != name}]))


def test_lead_time_leaves_a_gap(tiny):
    train = dataset(40, features=False)
    near = TrellisEstimator(prediction_length=5, settings=tiny).train(train)
    far = TrellisEstimator(prediction_length=3, lead_time=2, settings=tiny).train(train)
    one, other = next(near.predict(train)), next(far.predict(train))
    assert other.start_date == one.start_date + 2
    np.testing.assert_array_equal(other.mean, one.mean[2:])


def test_several_dimensions(tiny):
    rng = np.random.default_rng(0)
    train = [{"item_id": "a", "start": pd.Period("2024-01", freq="M"), "target": rng.normal(size=(2, 40))}]
    predictor = TrellisEstimator(prediction_length=3, settings=tiny).train(train)
    forecast = next(predictor.predict(train))
    assert forecast.mean.shape == (3, 2)
    assert forecast.copy_dim(1).quantile(0.5).shape == (3,)
    assert str(forecast.start_date) == "2027-05"


@pytest.mark.parametrize("freq", ["15min", "h", "D", "W-SUN", "W-WED", "M", "Q-DEC", "Q-NOV", "Y-DEC"])
def test_frequencies(tiny, freq):
    train = dataset(30, freq=freq, features=False, count=1)
    forecast = next(TrellisEstimator(prediction_length=2, settings=tiny).train(train).predict(train))
    assert forecast.start_date == pd.Period("2024-01-01 00:00", freq=freq) + 30


def test_points_have_one_quantile(tiny):
    train = dataset(30, features=False)
    forecast = next(TrellisEstimator(prediction_length=2, settings={**tiny, "loss": "mae"}).train(train).predict(train))
    assert forecast.forecast_keys == ["0.5", "mean"]
    np.testing.assert_array_equal(forecast.quantile(0.5), forecast.mean)


def test_bad_data_is_refused(tiny, tmp_path):
    estimator = TrellisEstimator(prediction_length=2, settings=tiny)
    with pytest.raises(DataError, match="holds no series"):
        estimator.train([])
    mixed = dataset(30, features=False)[:1] + dataset(30, freq="D", features=False)[:1]
    with pytest.raises(DataError, match="steps of h and of D"):
        estimator.train(mixed)
    estimator.train(dataset(30)).serialize(tmp_path)
    (tmp_path / "trellis.json").write_text(json.dumps({"lead_time": 9, "forecast_type": "quantile"}))
    with pytest.raises(CheckpointError, match="damaged"):
        Predictor.deserialize(tmp_path)
    (tmp_path / "trellis.json").unlink()
    with pytest.raises(CheckpointError, match="copy the whole directory"):
        Predictor.deserialize(tmp_path)
