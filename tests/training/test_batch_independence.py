"""A forecast is the series' own: it does not depend on the batch, on the order, or on what else is in the frame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from trellis_ts import evaluation, forecaster
from trellis_ts.datasets.readers import panel_from_frame
from trellis_ts.forecaster import Forecaster

LENGTHS = (40, 9, 25, 60, 33)
HORIZON = 5
LOSSES = ("quantile", "mae", "student_t", "negative_binomial")
ROLES = {"past_covariates": ["wind"], "known_covariates": ["price", "event"], "static": ["kind"]}


@pytest.fixture(scope="module")
def frame():
    """A long table: counts with gaps, covariates of every role, and known ones beyond the last value."""
    rng, parts = np.random.default_rng(0), []
    for index, length in enumerate(LENGTHS):
        rows = length + HORIZON
        y = rng.poisson(5 * (index + 1), rows).astype(float)
        y[rng.random(rows) < 0.1] = np.nan
        y[length - 1], y[length:] = 4.0, np.nan
        part = {"unique_id": f"s{index}", "ds": pd.date_range("2024-01-01", periods=rows, freq="D"), "y": y}
        part |= {"wind": rng.normal(size=rows), "price": rng.normal(size=rows), "kind": "ab"[index % 2]}
        parts.append(pd.DataFrame(part | {"event": rng.choice(["fair", "rain"], rows)}))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module", params=LOSSES)
def model(request, frame, make_checkpoint):
    panel = panel_from_frame(frame, target=["y"], **ROLES)
    return Forecaster(make_checkpoint(panel, loss=request.param, cycles=("week",), known=20))


def of_series(frame, name):
    return frame[frame["unique_id"] == name].reset_index(drop=True)


def assert_same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, rtol=1e-5, atol=1e-5)


def test_predict_reads_a_series_alone_in_any_order_and_in_any_batch(model, frame, monkeypatch):
    whole = model.predict(frame)
    for index in range(len(LENGTHS)):
        name = f"s{index}"
        assert_same(model.predict(of_series(frame, name)), of_series(whole, name))
    names = [f"s{index}" for index in (3, 0, 4, 2, 1)]
    turned = model.predict(pd.concat([of_series(frame, name) for name in names]))
    shuffled = model.predict(frame.sample(frac=1.0, random_state=1))
    monkeypatch.setattr(forecaster, "_ROWS_PER_BATCH", 2)
    in_pairs = model.predict(frame)
    for other in (turned, shuffled, in_pairs):
        for name in names:
            assert_same(of_series(other, name), of_series(whole, name))


def test_predict_passes_over_other_columns(model, frame):
    assert_same(model.predict(frame.assign(other=1.0, text="x")), model.predict(frame))


def test_forecasts_past_the_trained_horizon_are_the_series_own(model, frame):
    panel = panel_from_frame(frame, target=["y"], **ROLES)
    padding = np.full((2 * HORIZON, 2), np.nan)
    panel = replace(
        panel, series=tuple(replace(each, known=np.concatenate((each.known, padding))) for each in panel.series)
    )
    whole = model.forecast(panel, prediction_length=2 * HORIZON).point
    for index, each in enumerate(panel.series):
        alone = model.forecast(replace(panel, series=(each,)), prediction_length=2 * HORIZON).point
        np.testing.assert_allclose(alone[0], whole[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_wide_frame(loss, make_checkpoint, monkeypatch):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=50, freq="D")})
    for name in ("a", "b", "c"):
        table[name] = rng.poisson(9, 50).astype(float)
    model = Forecaster(make_checkpoint(panel_from_frame(table), loss=loss, cycles=("week",)))
    whole = model.predict(table)
    assert_same(model.predict(table[["c", "date", "a", "b"]].assign(other=2.0)), whole)
    # Each channel is forecast by itself: what the others hold changes nothing.
    other = table.assign(b=1.0, c=table["c"] * 3)
    chosen = [each[each["unique_id"] == "a"] for each in (model.predict(other), whole)]
    assert_same(*chosen)


def scores_of(model, frame):
    """Every score by what it is of; the order of the series does not matter."""
    found = model.backtest(frame, baselines=("naive",)).frame()
    return found.set_index(["forecaster", "scope", "series", "channel", "step", "metric"])["value"].sort_index()


def test_backtests_score_a_series_alike_whatever_the_batch_and_the_others(model, frame, monkeypatch):
    whole = scores_of(model, frame)
    of_series_alone = whole[whole.index.get_level_values("scope") == "series"]
    for name in ("s0", "s3"):
        alone = scores_of(model, of_series(frame, name))
        alone = alone[alone.index.get_level_values("series") == name]
        expected = of_series_alone[of_series_alone.index.get_level_values("series") == name]
        pd.testing.assert_series_equal(alone, expected, rtol=1e-5, atol=1e-5)
    turned = scores_of(model, pd.concat([of_series(frame, f"s{index}") for index in (2, 4, 3, 1, 0)]))
    pd.testing.assert_series_equal(turned, whole, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(evaluation, "_WINDOWS_PER_BATCH", 3)
    pd.testing.assert_series_equal(scores_of(model, frame), whole, rtol=1e-5, atol=1e-5)
