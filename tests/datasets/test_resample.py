"""Irregular and repeated stamps onto a calendar, on request."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis_ts.datasets import calendar
from trellis_ts.datasets.readers import panel_from_frame
from trellis_ts.errors import DataError


def frame_of(stamps, **columns) -> pd.DataFrame:
    return pd.DataFrame({"t": pd.to_datetime(stamps), **columns})


IRREGULAR = frame_of(
    ["2024-01-01 00:05", "2024-01-01 00:35", "2024-01-01 01:10", "2024-01-01 03:00", "2024-01-01 03:00"],
    v=[1.0, 2.0, np.nan, 4.0, 8.0],
    k=["a", "b", None, "a", None],
)


def test_a_step_holds_the_mean_of_its_rows():
    panel = panel_from_frame(IRREGULAR, freq="h", past_covariates=["k"], regularize=True)
    assert panel.series[0].time.tolist() == pd.date_range("2024-01-01", periods=4, freq="h").to_numpy().tolist()
    np.testing.assert_array_equal(panel.series[0].values[:, 0], [1.5, np.nan, np.nan, 6.0])
    np.testing.assert_array_equal(panel.series[0].past[:, 0], [1.0, np.nan, np.nan, 0.0])  # the last category
    assert "regularized onto steps of 'h': 5 of 5 rows were moved or averaged, 3 steps have values" in panel.notes


@pytest.mark.parametrize("freq", [None, "h"])
def test_without_being_asked_it_is_refused(freq):
    with pytest.raises(DataError, match=r"occurs twice with different values; .*--regularize true"):
        panel_from_frame(IRREGULAR, freq=freq)
    apart = IRREGULAR.iloc[:4]
    message = "is not on the calendar 'h'" if freq else "follow no regular grid: .*--regularize true"
    with pytest.raises(DataError, match=message):
        panel_from_frame(apart, freq=freq)


def test_a_regular_table_stays_as_it_is():
    frame = frame_of(pd.date_range("2024-01-01", periods=9, freq="h"), v=np.arange(9.0))
    panel, same = (panel_from_frame(frame, regularize=each) for each in (True, False))
    assert panel.notes == same.notes
    np.testing.assert_array_equal(panel.series[0].values, same.series[0].values)


@pytest.mark.parametrize(
    ("distances", "freq"),
    [
        ([50, 61, 70, 58], "min"),
        ([3300, 3700, 4000, 3601], "h"),
        ([86000, 86500, 90000], "D"),
        ([14, 290, 310], "5min"),
    ],
)
def test_the_step_is_the_usual_one_nearest_to_the_median(distances, freq):
    stamps = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.cumsum([0, *distances]), unit="s")
    assert panel_from_frame(frame_of(stamps, v=1.0 * np.arange(len(stamps))), regularize=True).freq == freq


def test_series_are_apart():
    frame = pd.concat([IRREGULAR.assign(s="x"), IRREGULAR.assign(s="y", v=IRREGULAR["v"] * 10)])
    panel = panel_from_frame(frame, id="s", freq="h", target=["v"], regularize=True)
    for series, factor in zip(panel.series, (1, 10), strict=True):
        np.testing.assert_array_equal(series.values[:, 0], factor * np.array([1.5, np.nan, np.nan, 6.0]))


def test_fixed_steps_do_not_follow_the_clocks():
    stamps = pd.date_range("2024-03-29 00:20", periods=20, freq="6h", tz="Europe/Berlin")
    panel = panel_from_frame(frame_of(stamps, v=np.arange(20.0)), freq="6h", regularize=True)
    np.testing.assert_array_equal(panel.series[0].values[:, 0], np.arange(20.0))
    assert panel.series[0].time[0] == np.datetime64("2024-03-28T23:00")


def test_two_readings_of_a_date_are_refused():
    frame = pd.DataFrame({"t": ["01/02/2024", "03/02/2024", "03/02/2024"], "v": [1.0, 2, 3]})
    with pytest.raises(DataError, match="give --day-first true or false"):
        panel_from_frame(frame, regularize=True)


@pytest.mark.parametrize(
    ("freq", "stamp", "expected"),
    [
        ("15min", "2024-03-05 10:29:59", "2024-03-05 10:15"),
        ("D", "2024-03-05 10:29", "2024-03-05"),
        ("W-MON", "2024-03-07 01:00", "2024-03-04"),
        ("B", "2024-03-09 12:00", "2024-03-11"),
        ("MS", "2024-03-05 10:29", "2024-03-01"),
        ("ME", "2024-02-05 10:29", "2024-02-29"),
        ("QS-JAN", "2024-03-05", "2024-01-01"),
    ],
)
def test_the_stamp_that_stands_for_a_step(freq, stamp, expected):
    found = calendar.snap(np.array([stamp], dtype="datetime64[ns]"), freq)
    assert found[0] == np.datetime64(expected, "ns")


@given(st.integers(0, 2 * 10**18), st.sampled_from(["h", "15min", "D", "W-SUN", "MS", "QE-DEC", "B"]))
def test_what_is_snapped_is_on_the_calendar_and_stays(moment, freq):
    for timezone in (None, "Europe/Berlin", "Asia/Kolkata"):
        stamp = np.array([moment], dtype="datetime64[ns]")
        found = calendar.snap(stamp, freq, timezone)
        calendar.to_grid(found, freq, timezone)  # raises where it is not
        assert calendar.snap(found, freq, timezone) == found
