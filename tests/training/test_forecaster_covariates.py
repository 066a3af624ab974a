"""Forecasts with covariates: from frames, from the future, beyond the trained horizon, never from what is to come."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from trellis_ts.checkpoints import Checkpoint, DataRecord
from trellis_ts.config import DataConfig, ExperimentConfig, ModelConfig, TrainingConfig, WindowConfig
from trellis_ts.datasets.readers import panel_from_frame
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.errors import CheckpointError, ConfigError, DataError
from trellis_ts.evaluation import evaluate
from trellis_ts.forecaster import Forecaster
from trellis_ts.frames import forecast_frame
from trellis_ts.preparation import prepare
from trellis_ts.training import fit

HORIZON, FUTURE = 5, 13


@pytest.fixture(scope="module")
def panel(make_panel, make_covariates):
    return make_covariates(make_panel((40, 30), channels=2, missing=0.1), future=FUTURE)


@pytest.fixture(scope="module")
def forecaster(panel, make_checkpoint):
    return Forecaster(make_checkpoint(panel, known=25, cycles=("week",)))


def quantiles(forecaster, panel, length=HORIZON):
    return forecaster.forecast(panel, prediction_length=length).quantiles


@settings(max_examples=25, deadline=None)
@given(series=st.integers(0, 1), back=st.integers(0, 15), horizon=st.integers(1, FUTURE), poison=st.floats(-1e6, 1e6))
def test_a_forecast_does_not_know_what_is_to_come(forecaster, panel, series, back, horizon, poison):
    """What lies after the origin (targets, past covariates) or after the horizon (known ones) changes nothing."""
    forecaster_ = forecaster
    origin = len(panel.series[series]) - back
    chosen = panel.series[series]
    cut = replace(chosen, time=chosen.time[:origin], values=chosen.values[:origin], past=chosen.past[:origin])
    cut = replace(cut, known=chosen.known[: origin + horizon])
    expected = quantiles(forecaster_, replace(panel, series=(cut,)), horizon)
    known = chosen.known.copy()
    known[origin + horizon :] = 2.0
    longer = replace(panel, series=(replace(cut, known=known),))
    assert torch.equal(quantiles(forecaster_, longer, horizon), expected)
    # The windows of an evaluation see the same although the rows after the origin are there.
    if back >= HORIZON:
        values, past = chosen.values.copy(), chosen.past.copy()
        values[origin:], past[origin:] = poison, np.nan
        scores = []
        for each in (chosen, replace(chosen, values=values, past=past)):
            scaled = _scaled(forecaster_, replace(panel, series=(each,)))
            batch = scaled.gather(np.array([0]), np.array([origin]), 12, HORIZON)
            scores.append(forecaster_.roll_out(batch, HORIZON).quantiles)
        assert torch.equal(*scores)


def _scaled(forecaster, panel):
    return ScaledPanel(panel, forecaster.scaler().of(panel), 7)


@pytest.mark.parametrize("role", ["past", "known", "static"])
def test_covariates_move_the_forecast(forecaster, panel, role):
    changed = tuple(
        replace(each, **{role: np.where(np.isnan(getattr(each, role)), 1.0, 2 - getattr(each, role))})
        for each in panel.series
    )
    before, after = quantiles(forecaster, panel), quantiles(forecaster, replace(panel, series=changed))
    assert (before - after).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_beyond_the_trained_horizon_known_covariates_reach_on(forecaster, panel):
    length = 2 * HORIZON + 2
    before = quantiles(forecaster, panel, length)
    assert torch.equal(before[:, :HORIZON], quantiles(forecaster, panel))
    for step in (HORIZON, length - 1):
        known = [each.known.copy() for each in panel.series]
        for each, series in zip(known, panel.series, strict=True):
            each[len(series) + step] = (55.0, (each[len(series) + step, 1] != 1) * 1.0)
        changed = tuple(replace(each, known=one) for each, one in zip(panel.series, known, strict=True))
        moved = (quantiles(forecaster, replace(panel, series=changed), length) - before).abs().amax(dim=(0, 2, 3))
        assert not moved[:step].any()
        assert moved[step] > 1e-3


def test_past_covariates_are_missing_beyond_it(forecaster, panel, monkeypatch):
    seen = []
    model = forecaster._model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda batch: (seen.append(batch), forward(batch))[1])
    forecaster.forecast(panel, prediction_length=2 * HORIZON)
    first, second = seen
    assert torch.equal(second.past.values[:, :-HORIZON], first.past.values[:, HORIZON:])
    assert not second.past.observed[:, -HORIZON:].any()
    assert not second.past.codes[:, -HORIZON:].any()
    assert torch.equal(second.known.codes[:, :12], first.known.codes[:, HORIZON : HORIZON + 12])


def test_a_batch_that_ends_too_soon_is_refused(forecaster, panel):
    batch = _scaled(forecaster, panel).gather(np.array([0]), np.array([20]), 12, 0)
    with pytest.raises(ValueError, match="reach over 0 steps, the forecast over 5"):
        forecaster.roll_out(batch, HORIZON)


def test_a_saved_model_forecasts_the_same(forecaster, panel, tmp_path):
    loaded = Forecaster.load(forecaster.save(tmp_path / "model"))
    assert torch.equal(quantiles(loaded, panel, 8), quantiles(forecaster, panel, 8))
    assert loaded.checkpoint.data == forecaster.checkpoint.data


def test_a_record_that_does_not_fit_the_shape_is_refused(forecaster, tmp_path):
    checkpoint = forecaster.checkpoint
    fewer = replace(checkpoint.data, covariates=checkpoint.data.covariates[1:])
    directory = Forecaster(Checkpoint(checkpoint.model, checkpoint.experiment, fewer)).save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="disagree on covariates"):
        Forecaster.load(directory)


@pytest.mark.parametrize(
    "change",
    [
        {"import": "os"},
        {"role": "future"},
        {"categories": "abc"},
        {"categories": ["a", "a"]},
        {"scale": 0.0},
        {"loc": float("nan")},
        {"name": "state"},
    ],
    ids=str,
)
def test_the_record_is_closed(forecaster, change):
    schema = TypeAdapter(DataRecord)
    record = json.loads(json.dumps(asdict(forecaster.checkpoint.data)))
    assert schema.validate_json(json.dumps(record), strict=False) == forecaster.checkpoint.data
    record["covariates"][0] |= change
    with pytest.raises((ValidationError, ConfigError)):
        schema.validate_json(json.dumps(record))


def test_the_horizon_has_to_be_covered(forecaster, panel):
    short = replace(panel.series[1], known=panel.series[1].known[: 30 + 3])
    partly = replace(panel, series=(panel.series[0], short))
    message = (
        r"known covariates \(price, event\) are missing from 2024-02-03 on of series 's1'; give 5 steps of them with "
        r"--future FILE, or as rows of DATA with an empty target; or forecast less with --prediction-length 3"
    )
    with pytest.raises(DataError, match=message):
        forecaster.forecast(partly)
    assert forecaster.forecast(partly, prediction_length=3).point.shape == (2, 3, 2)


def test_a_covariate_that_is_absent_is_refused(forecaster, panel):
    fewer = panel.columns.covariates[1:]
    series = tuple(replace(each, past=each.past[:, 1:]) for each in panel.series)
    with pytest.raises(DataError, match=r"reads covariate 'wind' \(past\), which the data lack"):
        forecaster.forecast(replace(panel, series=series, columns=replace(panel.columns, covariates=fewer)))


def make_frame(rows: int = 160, future: int = 12) -> pd.DataFrame:
    """Daily sales that a promotion doubles."""
    parts = []
    for number, (shop, item) in enumerate((("north", 1), ("north", 2), ("south", 1))):
        rng = np.random.default_rng(number)
        promo = rng.random(rows + future) < 0.4
        sales = (number + 1) * (10 + 10 * promo + 0.5 * rng.normal(size=rows + future))
        parts.append(
            pd.DataFrame(
                {
                    "shop": shop,
                    "item": item,
                    "day": pd.date_range("2024-01-01", periods=rows + future),
                    "sales": np.where(np.arange(rows + future) < rows, sales, np.nan),
                    "promo": np.where(promo, "yes", "no"),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def promoted(tmp_path_factory):
    """A model that had a few seconds to learn what a promotion does."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    config = ExperimentConfig(
        data=DataConfig(known_covariates=("promo",), id="shop,item"),
        window=WindowConfig(context_length=14, prediction_length=6, patch_length=7),
        model=ModelConfig(width=16, num_heads=2, num_slots=4, num_layers=1, feedforward_width=16),
        training=TrainingConfig(
            max_epochs=15,
            learning_rate=0.01,
            batch_size=32,
            quantile_levels=(0.1, 0.5, 0.9),
            device="cpu",
            implementation="reference",
        ),
    )
    panel = panel_from_frame(make_frame(), id="shop,item", target=["sales"], known_covariates=["promo"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        checkpoint, _ = fit(prepare(panel, config), tmp_path_factory.mktemp("promoted"))
    return Forecaster(checkpoint)


def test_what_is_known_of_the_future_is_used(promoted):
    """Without the covariate nobody can know which days sell twice as much."""
    frame = make_frame()
    result = promoted.predict(frame)
    assert list(result.columns) == ["shop", "item", "day", "forecast", "q0.1", "q0.5", "q0.9"]
    merged = result.merge(frame.astype({"item": str}), on=["shop", "item", "day"])
    assert len(merged) == 18
    level = merged.groupby(["shop", "item", "promo"])["forecast"].mean().unstack()
    size = np.array([1, 2, 3])
    np.testing.assert_allclose(level["no"], 10 * size, rtol=0.2)
    np.testing.assert_allclose(level["yes"], 20 * size, rtol=0.2)


def test_evaluation_reads_them_too(promoted):
    result = evaluate(
        promoted, panel_from_frame(make_frame(), id="shop,item", target=["sales"], known_covariates=["promo"])
    )
    assert result.model.mae < 0.5 * result.seasonal_naive.mae


def test_a_backtest_that_refits_hands_on_covariates(promoted):
    frame = make_frame()
    again = promoted.backtest(frame, max_origins=2, refit=lambda panel: promoted)
    once = promoted.backtest(frame, max_origins=2)
    assert again.model.mae == pytest.approx(once.model.mae, rel=1e-5)
    assert once.model.mae < 0.5 * once.seasonal_naive.mae


def test_the_future_may_come_in_a_frame_of_its_own(promoted):
    frame = make_frame()
    history, future = frame[frame["sales"].notna()], frame[frame["sales"].isna()].drop(columns="sales")
    for length in (None, 10):
        expected = promoted.predict(frame, prediction_length=length)
        pd.testing.assert_frame_equal(promoted.predict(history, future, prediction_length=length), expected)
    with pytest.raises(DataError, match="missing from 2024-06-09 on of series 'north/1'; give 6 steps"):
        promoted.predict(history)


def test_frames_of_other_libraries_give_frames_of_theirs(promoted):
    polars, pyarrow = pytest.importorskip("polars"), pytest.importorskip("pyarrow")
    frame = make_frame()
    expected = promoted.predict(frame)
    for native in (pyarrow.Table.from_pandas(frame), polars.DataFrame(frame.to_dict(orient="list"))):
        result = promoted.predict(native)
        assert type(result) is type(native)
        columns = result.to_pydict() if isinstance(native, pyarrow.Table) else result.to_dict(as_series=False)
        assert list(columns) == list(expected.columns)
        assert columns["forecast"] == expected["forecast"].tolist()
        assert [pd.Timestamp(stamp) for stamp in columns["day"]] == expected["day"].tolist()


def test_the_callers_frames_stay_as_they_are(promoted):
    frame = make_frame().sample(frac=1, random_state=0)
    history, future = frame[frame["sales"].notna()], frame[frame["sales"].isna()]
    before = [each.copy(deep=True) for each in (history, future)]
    promoted.predict(history, future)
    for one, other in zip((history, future), before, strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_an_unseen_category_is_unknown_and_said_once(promoted, caplog):
    frame = make_frame()
    frame.loc[frame["sales"].isna(), "promo"] = "mega"
    with caplog.at_level(logging.WARNING, "trellis_ts.forecaster"):
        result = promoted.predict(frame)
    assert caplog.messages == ["<frame>: covariate 'promo': 'mega' not seen in training, read as unknown"]
    assert np.isfinite(result["forecast"]).all()
    frame.loc[frame["sales"].isna(), "promo"] = None
    pd.testing.assert_frame_equal(promoted.predict(frame), result)  # unknown and missing are alike


@pytest.mark.parametrize("taken", ["forecast", "q0.1", "channel", "unique_id"])
def test_columns_of_the_table_keep_their_names(forecaster, panel, taken):
    names = replace(panel.columns, time=taken, id="shop")
    frame = forecast_frame(replace(panel, columns=names), forecaster.forecast(panel))
    ours = [f"{name}_" if name == taken else name for name in ("channel", "forecast", "q0.1", "q0.5", "q0.9")]
    assert list(frame.columns) == ["shop", ours[0], taken, *ours[1:]]
    assert frame[taken].dtype.kind == "M"


@pytest.mark.parametrize(
    ("freq", "timezone", "first"),
    [
        ("B", None, "2020-10-16"),
        ("MS", None, "2032-10-01"),
        ("ME", None, "2032-09-30"),
        ("QS", None, "2057-10-01"),
        ("100ms", None, "2020-03-20 00:00:15"),
        ("h", "Europe/Berlin", "2020-03-26 06:00+01:00"),
        ("D", "America/New_York", "2020-08-17 00:00-04:00"),
    ],
)
def test_every_calendar_takes_covariates(make_checkpoint, freq, timezone, first):
    stamps = pd.date_range("2020-03-20", periods=162, freq=freq, tz=timezone)
    parts = [
        pd.DataFrame(
            {"id": name, "t": stamps, "y": np.arange(162.0), "event": ["a", "b", "b"] * 54, "wind": 1.5, "size": size}
        )
        for name, size in (("p", 1), ("q", 2))
    ]
    frame = pd.concat(parts).reset_index(drop=True)
    frame.loc[frame.groupby("id").cumcount() >= 150, "y"] = np.nan
    options = {"past_covariates": ["wind"], "known_covariates": ["event"], "static": ["size"]}
    panel = panel_from_frame(frame, **options)
    cycles = ("hour", "day", "week", "year")
    forecaster = Forecaster(make_checkpoint(panel, cycles=cycles))
    result = forecaster.predict(frame, prediction_length=12)
    assert result["t"].tolist() == stamps[150:].tolist() * 2
    assert result["t"][0] == pd.Timestamp(first)
    history, future = frame[frame["y"].notna()], frame[frame["y"].isna()][["id", "t", "event"]]
    pd.testing.assert_frame_equal(forecaster.predict(history, future, prediction_length=12), result)
