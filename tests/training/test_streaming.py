"""A streaming model from a frame to a directory and back: trained, calibrated, scored, rolled out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from trellis_ts import ConfigError, Forecaster

pytestmark = pytest.mark.usefixtures("quiet_lightning")


@pytest.fixture(scope="module")
def frame():
    """A long and a short series with a rhythm of twelve, on levels far apart, with holes."""
    rng = np.random.default_rng(0)
    parts = []
    for name, length, level in (("long", 500, 1000.0), ("short", 90, -3.0)):
        step = np.arange(length)
        y = level + 5 * np.sin(2 * np.pi * step / 12) + rng.normal(0, 0.5, length)
        y[rng.random(length) < 0.05] = np.nan
        stamps = pd.date_range("2024-01-01", periods=length, freq="h")
        parts.append(pd.DataFrame({"id": name, "ds": stamps, "y": y}))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def forecaster(frame):
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        return Forecaster.fit(
            frame,
            mode="streaming",
            context_length=24,
            prediction_length=8,
            patch_length=4,
            width=16,
            num_heads=2,
            num_slots=8,
            num_layers=1,
            feedforward_width=16,
            max_epochs=10,
            learning_rate=1e-2,
            quantile_levels=[0.1, 0.5, 0.9],
            calendar_features=True,
        )


def test_it_learns_and_is_scored_on_every_window(forecaster, frame):
    evaluation = forecaster.backtest(frame, step=3)
    assert evaluation.num_windows > 10
    assert evaluation.model.mase < 0.97  # seasonal naive at a season of 24 has 1
    assert evaluation.model.mae < evaluation.scores["seasonal_naive"].mae
    assert 0.5 < evaluation.model.coverage <= 1


def test_a_saved_model_forecasts_the_same(forecaster, frame, tmp_path):
    expected = forecaster.predict(frame)
    loaded = Forecaster.load(forecaster.save(tmp_path / "model"))
    pd.testing.assert_frame_equal(loaded.predict(frame), expected)
    assert loaded.checkpoint.experiment.model.mode == "streaming"
    assert forecaster.checkpoint.calibration is not None


def test_longer_forecasts_begin_with_the_trained_horizon_and_go_on(forecaster, frame):
    trained = forecaster.predict(frame).groupby("id").head(8).reset_index(drop=True)
    longer = forecaster.predict(frame, prediction_length=30)
    assert len(longer) == 60
    pd.testing.assert_frame_equal(longer.groupby("id").head(8).reset_index(drop=True), trained)
    tail = longer[longer["id"] == "long"]["forecast"].to_numpy()
    assert 6 < np.ptp(tail[-12:]) < 15  # the rhythm goes on


def test_paths_can_be_drawn(forecaster, frame):
    assert len(forecaster.sample(frame, num_samples=3)) == 3 * 16


def test_a_setting_of_the_window_model_is_refused_before_training(frame):
    with pytest.raises(ConfigError, match="mixer=attention does not go with mode=streaming"):
        Forecaster.fit(frame, mode="streaming", mixer="attention")


def test_a_short_table_will_do():
    """Few rows are held out, fewer than a patch and a horizon."""
    stamps = pd.date_range("2015-01-01", periods=60, freq="MS")
    frame = pd.DataFrame({"ds": stamps, "y": 10 + np.arange(60) + np.sin(np.arange(60) * np.pi / 6)})
    forecaster = Forecaster.fit(frame, mode="streaming", width=8, num_heads=1, feedforward_width=8, max_epochs=2)
    assert np.isfinite(forecaster.predict(frame)["forecast"]).all()
