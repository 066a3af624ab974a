"""Training that begins with a trained model: its settings and scales go along, and what cannot change is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trellis_ts.errors import ConfigError, DataError
from trellis_ts.forecaster import Forecaster

SETTINGS = {"num_layers": 1, "width": 8, "num_heads": 2, "num_slots": 3, "feedforward_width": 8, "batch_size": 16}
SETTINGS |= {"context_length": 21, "prediction_length": 7, "patch_length": 7, "device": "cpu", "max_epochs": 2}

pytestmark = pytest.mark.usefixtures("quiet_lightning")


def frame_of(panel):
    """The panel as a long frame."""
    import pandas as pd

    parts = [pd.DataFrame({"id": s.name, "date": s.time, "c0": s.values[:, 0]}) for s in panel.series]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def frame(make_panel):
    return frame_of(make_panel((120, 100, 90), noise=0.2, is_wide=False))


@pytest.fixture(scope="module")
def first(frame):
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        return Forecaster.fit(frame[frame["id"] != "s2"], **SETTINGS)


def test_new_series_are_learnt_from_the_weights_of_the_old(frame, first):
    # With a step too small to move anything, the new model is the old one.
    same = Forecaster.fit(frame[frame["id"] != "s0"], start=first, learning_rate=1e-12, max_epochs=1, average_steps=1)
    for name, value in first.checkpoint.model.state_dict().items():
        assert torch.allclose(value, same.checkpoint.model.state_dict()[name], atol=1e-6), name
    assert same.checkpoint.experiment.model == first.checkpoint.experiment.model
    old, new = ({each.name: each for each in model.checkpoint.data.series} for model in (first, same))
    assert old.keys() == {"s0", "s1"}
    assert new.keys() == {"s0", "s1", "s2"}  # what is not in the new table is not forgotten
    assert (old["s1"].loc, old["s0"]) == (new["s1"].loc, new["s0"])
    rows = frame.loc[frame["id"] == "s2", "c0"].to_numpy()
    assert new["s2"].loc[0] == pytest.approx(rows[: len(rows) - 18].mean())  # training rows alone


def test_the_rate_is_lower_unless_named(frame, first):
    rate = first.checkpoint.experiment.training.learning_rate
    again = Forecaster.fit(frame, start=first, max_epochs=1)
    assert again.checkpoint.experiment.training.learning_rate == pytest.approx(0.3 * rate)
    assert np.isfinite(again.predict(frame)["forecast"]).all()


def test_what_the_model_has_otherwise_is_refused(frame, first):
    with pytest.raises(ConfigError, match="width=16 is not the 8 of the model to start from; leave it out"):
        Forecaster.fit(frame, start=first, width=16)
    with pytest.raises(ConfigError, match="prediction_length=9 is not the 7 of the model"):
        Forecaster.fit(frame, start=first, prediction_length=9)
    with pytest.raises(DataError, match="c0"):
        Forecaster.fit(frame.rename(columns={"c0": "sales"}), start=first)
    weekly = frame.assign(
        date=frame.groupby("id")["date"].transform(lambda each: each.iloc[0] + 7 * (each - each.iloc[0]))
    )
    with pytest.raises(DataError, match="the model was trained on steps of D, the data has steps of W"):
        Forecaster.fit(weekly, start=first)
