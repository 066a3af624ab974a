"""A model in the tree goes on giving the forecast it gave when it was made (by ``make_golden.py``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from trellis_ts.checkpoints import load_checkpoint
from trellis_ts.datasets.readers import read_table
from trellis_ts.evaluation import evaluate
from trellis_ts.forecaster import Forecaster
from trellis_ts.frames import forecast_frame

HERE = Path(__file__).parent


def test_the_model_says_what_it_said():
    expected = pd.read_csv(HERE / "forecast.csv", parse_dates=["day"])
    actual = Forecaster.load(HERE / "model").predict(pd.read_csv(HERE / "input.csv"), prediction_length=10)
    assert list(actual.columns) == list(expected.columns) == ["shop", "day", "forecast", "q0.1", "q0.5", "q0.9"]
    assert actual["shop"].tolist() == expected["shop"].tolist()
    assert actual["day"].tolist() == expected["day"].tolist()
    for name in expected.columns[2:]:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5)


def test_the_file_and_the_frame_give_the_same():
    forecaster = Forecaster.load(HERE / "model")
    panel = read_table(HERE / "input.csv")
    from_file = forecast_frame(panel, forecaster.forecast(panel))
    pd.testing.assert_frame_equal(from_file, forecaster.predict(pd.read_csv(HERE / "input.csv")))


def test_the_model_knows_more_than_nothing():
    """The forecast is of the right size for both shops, and better than its own spread is wide."""
    result = evaluate(Forecaster.load(HERE / "model"), read_table(HERE / "input.csv"))
    assert result.model.mse < 1.0
    assert result.num_windows == 2 * (14 - 7 + 1)


def test_the_model_is_small():
    size = sum(path.stat().st_size for path in (HERE / "model").iterdir())
    assert size < 40_000
    assert {path.name for path in (HERE / "model").iterdir()} == {"config.json", "data.json", "model.safetensors"}
    assert load_checkpoint(HERE / "model").data.series[0].name == "north"
