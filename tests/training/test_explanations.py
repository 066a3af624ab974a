"""Explanations: what is found important is what the forecast needs, and the memory's record is what the layers did."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from trellis_ts import ConfigError, Forecaster
from trellis_ts.config import WindowShape
from trellis_ts.datasets.readers import panel_from_frame
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.explanations import memory_records, patch_importance, patch_steps, without_steps

SMALL = {"preset": "fast", "width": 16, "num_heads": 2, "num_slots": 8, "num_layers": 1, "windows_per_epoch": 512}
SMALL |= {"context_length": 168, "patch_length": 24, "prediction_length": 24, "max_epochs": 4, "patience": 40}
SMALL |= {"max_time": "20m"}  # never reached: a busy machine trains as long as an idle one


@pytest.mark.parametrize(
    ("name", "column", "step"), [("ETTh1", "OT", 1), ("vic_electricity", "Demand", 2)], ids=["ETTh1", "vic_electricity"]
)
def test_removing_what_is_ranked_highest_hurts_more_than_removing_at_random(name, column, step):
    folder = os.environ.get("TRELLIS_DATA")
    if folder is None:
        pytest.skip("needs the data sets under TRELLIS_DATA")
    table = pd.read_csv(Path(folder) / f"{name}.csv.gz")[::step][-3000:]
    frame = pd.DataFrame({"time": pd.date_range("2020", periods=3000, freq="h"), "y": table[column].to_numpy()})
    forecaster = Forecaster.fit(frame, **SMALL, linear_skip=False)
    panel, shape = panel_from_frame(frame), forecaster.checkpoint.model.shape
    scaled = ScaledPanel(panel, forecaster.scaler(), shape.season_length)
    origins = np.arange(2700, 2976, 4)
    batch = scaled.gather(np.zeros_like(origins), origins, shape.context_length, shape.prediction_length)
    predict = forecaster.predictor(scaled)

    def error(patches):
        missing = torch.zeros(batch.context.shape[:2], dtype=torch.bool)
        for row, chosen in enumerate(patches):
            for index in chosen:
                missing[row, slice(*patch_steps(shape)[index])] = True
        return float((predict(without_steps(batch, missing)).point - batch.future).square().mean())

    importance = patch_importance(predict, batch, shape)[:, 0]
    highest, lowest = importance.argsort(descending=True)[:, :2].tolist(), importance.argsort()[:, :2].tolist()
    rng = np.random.default_rng(0)
    at_random = np.mean([error([rng.choice(7, 2, replace=False) for _ in origins]) for _ in range(10)])
    assert error(highest) > at_random > error(lowest)
    assert at_random > error([[]] * len(origins))


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(0)
    steps, parts = np.arange(120), []
    for name in "ab":
        price = rng.normal(size=120)
        values = np.sin(2 * np.pi * steps / 7) + 3 * price
        part = {"id": name, "day": pd.date_range("2024-01-01", periods=120, freq="D"), "y": values, "price": price}
        parts.append(pd.DataFrame({**part, "noise": rng.normal(size=120), "kind": rng.choice(["x", "z"], size=120)}))
    return pd.concat(parts)


@pytest.fixture(scope="module")
def forecaster(frame):
    settings = {**SMALL, "context_length": 28, "patch_length": 7, "prediction_length": 4, "max_epochs": 40}
    known = ["price", "noise", "kind"]
    return Forecaster.fit(frame, id="id", target="y", known_covariates=known, learning_rate=0.01, **settings)


def test_the_covariate_that_drives_the_series_comes_first(forecaster, frame, tmp_path):
    is_past = frame["day"] < "2024-04-25"
    explanation = forecaster.explain(frame[is_past], frame[~is_past].drop(columns="y"))
    assert explanation.covariates[:3] == ("price", "noise", "kind")
    values = explanation.covariate_importance
    assert (values[..., 0] > 2 * values[..., 1]).all()
    assert explanation.importance.shape == (2, 1, 4)
    assert explanation.patches == ((0, 7), (7, 14), (14, 21), (21, 28))
    assert json.loads(json.dumps(explanation.to_dict()))["series"] == ["a", "b"]


def test_the_memory_is_recorded_as_the_layer_ran(forecaster, frame):
    panel = forecaster._read(frame)
    model = forecaster.checkpoint.model
    scaled = ScaledPanel(panel, forecaster.scaler().of(panel), model.shape.season_length, future_length=4)
    batch = scaled.gather(np.arange(2), np.array([120, 120]), 28, 0, 4)
    missing = torch.zeros(2, 28, dtype=torch.bool)
    missing[:, 7:14] = True
    (record,) = memory_records(model, without_steps(batch, missing))
    assert record.forget_gate.shape == (2, 1, 2, 4)
    assert (record.forget_gate[..., 1] == 1).all()  # a token that is missing leaves the memory alone
    assert (record.written[..., 1] == 0).all()
    assert (record.step_size[..., 1] == 0).all()
    assert (record.written[..., 0] > 0).all()
    np.testing.assert_allclose(record.kept[..., -1], 1)
    np.testing.assert_allclose(record.kept[..., 0], record.forget_gate[..., 1:].prod(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(record.slot_usage.sum(axis=-1), 1, rtol=1e-5)


def test_patches_are_where_the_network_reads_them():
    assert patch_steps(WindowShape(10, 1, 4, 3, 1, 1)) == ((0, 4), (3, 7), (6, 10))
    assert patch_steps(WindowShape(9, 1, 4, 4, 1, 1)) == ((0, 1), (1, 5), (5, 9))


def test_a_streaming_model_is_refused(forecaster, frame, monkeypatch):
    monkeypatch.setattr(forecaster, "checkpoint", type("Other", (), {"model": object(), "data": None})())
    from trellis_ts.explanations import explain_panel

    with pytest.raises(ConfigError, match="--mode window"):
        explain_panel(forecaster, panel_from_frame(frame.drop(columns=["price", "noise", "kind"])))
