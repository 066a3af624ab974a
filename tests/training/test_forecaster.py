"""Forecasts from tables: the frame says what the tensors say, in the table's own calendar and units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import trellis_ts.forecaster as module
from trellis_ts.datasets.readers import panel_from_frame
from trellis_ts.errors import ConfigError, DataError
from trellis_ts.evaluation import backtest
from trellis_ts.forecaster import Forecaster
from trellis_ts.frames import forecast_frame
from trellis_ts.types import Batch, Columns, Panel, Series


def to_frame(panel):
    """The table a panel could have been read from."""
    pieces = []
    for series in panel.series:
        index = pd.DatetimeIndex(series.time)
        if panel.timezone:
            index = index.tz_localize("UTC").tz_convert(panel.timezone)
        piece = pd.DataFrame({"date": index})
        if not panel.is_wide:
            piece["id"] = series.name
        for column, name in enumerate(panel.channels):
            piece[name] = series.values[:, column]
        pieces.append(piece)
    return pd.concat(pieces, ignore_index=True)


@pytest.fixture(scope="module")
def long_panel(make_panel):
    return make_panel((30, 25, 9), missing=0.05)


@pytest.fixture(scope="module")
def long(make_checkpoint, long_panel):
    return Forecaster(make_checkpoint(long_panel, seasonal_cycle=True))


@pytest.fixture(scope="module")
def wide_panel(make_panel):
    return make_panel((30,), channels=3)


@pytest.fixture(scope="module")
def wide(make_checkpoint, wide_panel):
    return Forecaster(make_checkpoint(wide_panel, seasonal_cycle=True))


def by_hand(forecaster, series, index, horizon):
    """Quantiles ``[horizon, channel, level]`` of a series from its last rows, put together without the package."""
    model, record = forecaster.checkpoint.model, forecaster.checkpoint.data
    shape = model.shape
    loc, scale = np.array(record.series[index].loc), np.array(record.series[index].scale)
    weekday = int((series.time[-1].astype("datetime64[D]").astype(int) + 3) % 7)  # Monday is 0
    values = (series.values - loc) / scale
    context = np.full((shape.context_length, values.shape[1]), np.nan)
    rows = min(len(values), shape.context_length)
    context[-rows:] = values[-rows:]
    pieces, phase = [], weekday - shape.context_length + 1
    for _ in range(-(-horizon // shape.prediction_length)):
        observed = ~np.isnan(context)
        batch = Batch(
            torch.tensor(np.where(observed, context, 0.0), dtype=torch.float32)[None],
            torch.tensor(observed)[None],
            torch.tensor([phase % 7]),
            torch.tensor([index]),
        )
        with torch.no_grad():
            pieces.append(model(batch).quantiles[0].double().numpy())
        middle = pieces[-1][..., 1]
        context = np.concatenate((context, middle))[-shape.context_length :]
        phase += shape.prediction_length
    return np.concatenate(pieces)[:horizon] * scale[:, None] + loc[:, None]


@pytest.mark.parametrize("horizon", [1, 5, 13])
def test_the_frame_says_what_the_model_says_of_a_long_table(long, long_panel, horizon):
    result = long.predict(to_frame(long_panel), prediction_length=horizon)
    assert list(result.columns) == ["id", "date", "forecast", "q0.1", "q0.5", "q0.9"]
    assert list(result["id"]) == np.repeat(["s0", "s1", "s2"], horizon).tolist()
    for index, series in enumerate(long_panel.series):
        rows = result[result["id"] == series.name]
        expected = by_hand(long, series, index, horizon)[:, 0]
        np.testing.assert_allclose(rows[["q0.1", "q0.5", "q0.9"]].to_numpy(), expected, rtol=1e-5)
        np.testing.assert_array_equal(rows["forecast"], rows["q0.5"])
        stamps = series.time[-1] + np.arange(1, horizon + 1) * np.timedelta64(1, "D")
        np.testing.assert_array_equal(rows["date"].to_numpy(), stamps)


def test_the_frame_says_what_the_model_says_of_a_wide_table(wide, wide_panel):
    result = wide.predict(to_frame(wide_panel))
    expected = by_hand(wide, wide_panel.series[0], 0, 5)
    assert list(result.columns) == ["unique_id", "date", "forecast", "q0.1", "q0.5", "q0.9"]
    assert list(result["unique_id"]) == np.repeat(["c0", "c1", "c2"], 5).tolist()
    actual = result[["q0.1", "q0.5", "q0.9"]].to_numpy().reshape(3, 5, 3)
    np.testing.assert_allclose(actual, expected.transpose(1, 0, 2), rtol=1e-5)


def test_a_long_table_of_several_targets(make_panel, make_checkpoint):
    panel = make_panel((20, 30), channels=2)
    forecaster = Forecaster(make_checkpoint(panel))
    result = forecaster.predict(to_frame(panel))
    assert list(result.columns[:4]) == ["id", "channel", "date", "forecast"]
    for index, series in enumerate(panel.series):
        for channel, name in enumerate(panel.channels):
            rows = result[(result["id"] == series.name) & (result["channel"] == name)]
            np.testing.assert_allclose(rows["q0.9"], by_hand(forecaster, series, index, 5)[:, channel, 2], rtol=1e-5)


def test_a_model_of_points_gives_no_quantiles(make_panel, make_checkpoint):
    panel = make_panel()
    result = Forecaster(make_checkpoint(panel, loss="mae")).predict(to_frame(panel))
    assert list(result.columns) == ["unique_id", "date", "forecast"]
    assert np.isfinite(result["forecast"]).all()


def test_a_longer_horizon_begins_with_the_shorter_one(long, long_panel):
    short, far = (long.forecast(long_panel, prediction_length=steps).quantiles for steps in (5, 23))
    assert far.shape[1] == 23
    assert torch.equal(far[:, :5], short)
    assert len(np.unique(far[0, :, 0, 1])) == 23


@pytest.mark.parametrize("horizon", [0, -3])
def test_a_horizon_of_nothing_is_refused(long, long_panel, horizon):
    with pytest.raises(ConfigError, match=f"prediction_length={horizon}"):
        long.forecast(long_panel, prediction_length=horizon)


def test_the_callers_table_is_not_changed(long, long_panel):
    frame = to_frame(long_panel)
    before = frame.copy(deep=True)
    long.predict(frame)
    pd.testing.assert_frame_equal(frame, before)


def test_the_order_of_rows_and_columns_is_irrelevant(long, wide, long_panel, wide_panel):
    for forecaster, panel in ((long, long_panel), (wide, wide_panel)):
        frame = to_frame(panel)
        expected = forecaster.predict(frame)
        keys = list(expected.columns[:2])
        for changed in (frame.sample(frac=1, random_state=0), frame[list(frame.columns)[::-1]]):
            actual = forecaster.predict(changed)
            assert list(actual.columns) == list(expected.columns)
            pd.testing.assert_frame_equal(
                actual.sort_values(keys, ignore_index=True), expected.sort_values(keys, ignore_index=True), rtol=1e-6
            )


def test_the_order_of_series_is_irrelevant(long, long_panel):
    turned = replace(long_panel, series=long_panel.series[::-1])
    expected, actual = long.forecast(long_panel).point, long.forecast(turned).point
    torch.testing.assert_close(actual.flip(0), expected, rtol=1e-6, atol=1e-6)


def test_the_order_of_channels_is_irrelevant(wide, wide_panel):
    series = wide_panel.series[0]
    turned = replace(
        wide_panel,
        series=(Series(series.name, series.time, series.values[:, [2, 0, 1]]),),
        columns=replace(wide_panel.columns, channels=("c2", "c0", "c1")),
    )
    assert wide.check(turned).channels == wide_panel.channels
    assert torch.equal(wide.forecast(turned).quantiles, wide.forecast(wide_panel).quantiles)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_size_of_batches_is_irrelevant(long, long_panel, monkeypatch, rows):
    expected = long.forecast(long_panel, prediction_length=9).quantiles
    monkeypatch.setattr(module, "_ROWS_PER_BATCH", rows)
    torch.testing.assert_close(long.forecast(long_panel, prediction_length=9).quantiles, expected, rtol=1e-6, atol=1e-6)


def test_other_columns_are_refused_by_name(long, wide, long_panel, wide_panel):
    with pytest.raises(DataError, match="c0"):
        long.predict(to_frame(long_panel).rename(columns={"c0": "load"}))
    with pytest.raises(DataError, match="c1"):
        wide.predict(to_frame(wide_panel).drop(columns="c1"))
    panel = replace(wide_panel, columns=Columns("date", None, ("c0", "c1", "load")))
    with pytest.raises(DataError, match=r"trained on column\(s\) c0, c1, c2, the data has c0, c1, load"):
        wide.forecast(panel)
    fewer = Panel(
        tuple(Series(each.name, each.time, each.values[:, :2]) for each in wide_panel.series),
        Columns("date", None, ("c0", "c1")),
        "D",
    )
    with pytest.raises(DataError, match="c2"):
        wide.forecast(fewer)


def test_another_calendar_is_refused(long, long_panel, make_panel):
    hourly = make_panel((30, 25, 9), freq="h")
    with pytest.raises(DataError, match=r"steps of D, the data has steps of h"):
        long.forecast(hourly)
    with pytest.raises(DataError, match="D"):
        long.predict(to_frame(hourly))


@pytest.mark.parametrize(
    ("freq", "start", "expected"),
    [
        ("ME", "2023-01-31", ["2024-02-29", "2024-03-31", "2024-04-30", "2024-05-31", "2024-06-30"]),
        ("MS", "2023-01-01", ["2024-02-01", "2024-03-01", "2024-04-01", "2024-05-01", "2024-06-01"]),
        ("B", "2024-01-01", ["2024-01-18", "2024-01-19", "2024-01-22", "2024-01-23", "2024-01-24"]),
        ("QE-DEC", "2020-12-31", ["2024-03-31", "2024-06-30", "2024-09-30", "2024-12-31", "2025-03-31"]),
    ],
)
def test_stamps_go_on_with_the_calendar(make_panel, make_checkpoint, freq, start, expected):
    panel = make_panel((13,), freq=freq, start=start)
    result = Forecaster(make_checkpoint(panel)).predict(to_frame(panel))
    assert result["date"].dt.strftime("%Y-%m-%d").tolist() == expected


def test_the_time_zone_is_kept_across_the_change_of_the_clocks(make_panel, make_checkpoint):
    zone = "Europe/Paris"
    days = make_panel((20,), start="2024-03-10", timezone=zone)
    result = Forecaster(make_checkpoint(days)).predict(to_frame(days))
    assert str(result["date"].dt.tz) == zone
    assert result["date"].dt.strftime("%d %H %z").tolist() == [
        "30 00 +0100",
        "31 00 +0100",
        "01 00 +0200",
        "02 00 +0200",
        "03 00 +0200",
    ]
    hours = make_panel((24,), freq="h", start="2024-03-30", timezone=zone)
    result = Forecaster(make_checkpoint(hours)).predict(to_frame(hours))
    assert result["date"].dt.strftime("%H %z").tolist() == [
        "00 +0100",
        "01 +0100",
        "03 +0200",
        "04 +0200",
        "05 +0200",
    ]


def test_a_series_never_seen_is_forecast_on_its_own_scale(make_panel, make_checkpoint, long_panel):
    forecaster = Forecaster(make_checkpoint(long_panel))
    first = long_panel.series[0]
    shifted = Series("stranger", first.time, 1000 + 50 * first.values)
    result = forecaster.forecast(replace(long_panel, series=(Series("stranger", first.time, first.values), shifted)))
    torch.testing.assert_close(result.quantiles[1], 1000 + 50 * result.quantiles[0], rtol=1e-6, atol=1e-3)
    assert (result.point[1] > 1000).all()


def test_a_known_series_keeps_the_scale_of_its_training_rows(long, long_panel):
    """Its later rows are on another level: the numbers of the checkpoint are used, not new ones."""
    grown = replace(long_panel, series=tuple(replace(each, values=each.values + 5.0) for each in long_panel.series[:1]))
    expected = by_hand(long, grown.series[0], 0, 5)
    np.testing.assert_allclose(long.forecast(grown).quantiles[0].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"mixer": "attention"}, {"instance_norm": False}])
def test_a_series_of_missing_values_gets_numbers(make_panel, make_checkpoint, settings):
    panel = make_panel((20, 20))
    forecaster = Forecaster(make_checkpoint(panel, **settings))
    empty = replace(panel, series=(panel.series[0], replace(panel.series[1], values=np.full((20, 1), np.nan))))
    assert torch.isfinite(forecaster.forecast(empty).quantiles).all()


def test_a_history_of_one_row_is_enough(long, long_panel):
    short = replace(
        long_panel, series=tuple(replace(s, time=s.time[-1:], values=s.values[-1:]) for s in long_panel.series)
    )
    assert torch.isfinite(long.forecast(short).quantiles).all()


def test_dates_are_read_in_the_order_the_model_was_trained_on(make_panel, make_checkpoint):
    checkpoint = make_checkpoint(make_panel())
    data = replace(checkpoint.experiment.data, day_first=True)
    forecaster = Forecaster(replace(checkpoint, experiment=replace(checkpoint.experiment, data=data)))
    result = forecaster.predict(pd.DataFrame({"date": ["03/02/2024"], "c0": [10.0]}))
    assert result["date"].dt.strftime("%Y-%m-%d").tolist()[:2] == ["2024-02-04", "2024-02-05"]


def test_names_of_columns_can_be_chosen(long, long_panel):
    result = forecast_frame(long_panel, long.forecast(long_panel), id_name="unique_id", time_name="ds")
    assert list(result.columns[:3]) == ["unique_id", "ds", "forecast"]


def test_a_saved_forecaster_says_the_same(long, long_panel, tmp_path):
    again = Forecaster.load(long.save(tmp_path / "model"))
    assert torch.equal(again.forecast(long_panel).quantiles, long.forecast(long_panel).quantiles)
    assert again.prediction_length == 5


def test_reading_the_table_and_forecasting_the_panel_agree(long, long_panel):
    panel = panel_from_frame(to_frame(long_panel), time="date", target=("c0",), id="id", freq="D")
    direct = forecast_frame(panel, long.forecast(panel))
    pd.testing.assert_frame_equal(direct, long.predict(to_frame(long_panel)))


def test_forecasting_leaves_random_numbers_alone(long, long_panel):
    before = torch.random.get_rng_state()
    long.forecast(long_panel)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_backtest_of_a_frame_is_that_of_its_panel(make_panel, make_checkpoint, channels):
    panel = make_panel((40, 33), channels=channels)
    forecaster = Forecaster(make_checkpoint(panel, known=26))
    frame = to_frame(panel)
    before = frame.copy()
    options = {"step": 2, "max_origins": 3, "baselines": ("naive", "drift")}
    found, expected = forecaster.backtest(frame, **options), backtest(forecaster, panel, **options)
    assert found.data() == expected.data()
    pd.testing.assert_frame_equal(frame, before)


def test_the_frame_of_a_backtest_is_tidy(make_panel, make_checkpoint):
    panel = make_panel((40, 33), channels=2)
    result = Forecaster(make_checkpoint(panel, known=26)).backtest(to_frame(panel))
    frame = result.frame()
    assert frame.dtypes.astype(str).to_dict()["step"] == "Int64"
    assert not frame.duplicated(["forecaster", "scope", "series", "channel", "step", "metric"]).any()
    steps = frame[(frame.scope == "step") & (frame.metric == "mase") & (frame.forecaster == "seasonal_naive")]
    assert steps.value.tolist() == [each.mase for each in result.by_step["seasonal_naive"]]
    assert steps.step.tolist() == [1, 2, 3, 4, 5]
    series = frame[(frame.scope == "series") & (frame.metric == "mse") & (frame.forecaster == "model")]
    assert list(zip(series.series, series.channel, strict=True)) == list(result.items)


def test_a_backtest_says_what_is_wrong(wide, wide_panel):
    with pytest.raises(ConfigError, match="unknown baseline 'oracle'"):
        wide.backtest(to_frame(wide_panel), baselines=("oracle",))
    with pytest.raises(DataError, match="no column"):
        wide.backtest(to_frame(wide_panel).drop(columns="c1"))


SMALL = {
    "prediction_length": 3,
    "context_length": 6,
    "patch_length": 3,
    "width": 8,
    "num_heads": 2,
    "num_slots": 4,
    "feedforward_width": 8,
    "num_layers": 1,
    "max_epochs": 1,
    "implementation": "reference",
}


class TestFit:
    def test_a_frame_makes_a_model_that_forecasts_and_survives_saving(self, long_panel, tmp_path):
        frame = to_frame(long_panel)
        before = frame.copy(deep=True)
        forecaster = Forecaster.fit(
            frame, id="id", target=list(long_panel.channels), quantile_levels=[0.1, 0.5], **SMALL
        )
        pd.testing.assert_frame_equal(frame, before)
        forecast = forecaster.predict(frame)
        assert len(forecast) == 3 * len(long_panel.series) * long_panel.num_channels
        assert (forecast["q0.1"] <= forecast["q0.5"]).all()
        again = Forecaster.load(forecaster.save(tmp_path / "model")).predict(frame)
        pd.testing.assert_frame_equal(again, forecast)

    def test_the_same_seed_gives_the_same_model(self, wide_panel):
        frame = to_frame(wide_panel)
        first, second = (Forecaster.fit(frame, seed=3, **SMALL).predict(frame) for _ in range(2))
        pd.testing.assert_frame_equal(first, second)

    def test_a_wrong_name_is_refused_with_the_right_one(self, wide_panel):
        with pytest.raises(ConfigError, match="there is no setting predicton_length; did you mean prediction_length"):
            Forecaster.fit(to_frame(wide_panel), predicton_length=3)

    def test_a_single_name_serves_where_several_can_be(self, wide_panel):
        name = wide_panel.channels[0]
        forecaster = Forecaster.fit(to_frame(wide_panel), target=name, **SMALL)
        assert forecaster.checkpoint.data.channels == (name,)
