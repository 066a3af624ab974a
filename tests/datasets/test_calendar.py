"""Calendars: found again after rows are lost, continued as pandas continues them, in step with local time."""

from __future__ import annotations

from datetime import date

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trellis_ts.datasets.calendar import (
    default_prediction_length,
    format_times,
    future_times,
    infer_freq,
    normalize_freq,
    season_length,
    season_position,
    to_grid,
)
from trellis_ts.errors import DataError

FREQS = ("YE-DEC", "YS-JAN", "YE-JUN", "QE-DEC", "QE-NOV", "QS-FEB", "ME", "MS", "BME", "BMS", "2ME", "W-SUN", "W-WED")
FREQS += ("2W-MON", "B", "D", "3D", "h", "2h", "30min", "15min", "10min", "min", "s", "250ms", "us", "ns")


def stamps(freq: str, count: int, first: str = "2001-03-05", timezone: str | None = None) -> np.ndarray:
    index = pd.date_range(first, periods=count, freq=freq).as_unit("ns")
    if timezone is None or freq == "h":
        return index.to_numpy()
    # Not through date_range, which fails where the clocks skip midnight.
    index = index.tz_localize(timezone, ambiguous=np.ones(count, dtype=bool), nonexistent="shift_forward")
    return index.tz_convert("UTC").tz_localize(None).to_numpy()


def days(*texts: str) -> np.ndarray:
    return np.array(texts, dtype="datetime64[ns]")


@settings(deadline=None)
@given(st.sampled_from(FREQS), st.integers(0, 2**32 - 1), st.dates(date(1960, 1, 1), date(2030, 1, 1)))
def test_freq_is_found_after_losing_rows(freq, seed, first):
    time = stamps(freq, 60, str(first))
    random = np.random.default_rng(seed)
    kept = np.concatenate([[0], 1 + random.permutation(58)[:44], [59]])
    assert infer_freq(random.permutation(time[kept])) == freq
    grid, positions = to_grid(time[kept], freq)
    np.testing.assert_array_equal(grid, time)
    np.testing.assert_array_equal(positions, kept)


@settings(deadline=None)
@given(st.sampled_from(FREQS), st.dates(date(1960, 1, 1), date(2030, 1, 1)), st.integers(0, 40))
def test_future_continues_the_grid(freq, first, steps):
    time = stamps(freq, 45, str(first))
    np.testing.assert_array_equal(future_times(time[4], freq, steps), time[5 : 5 + steps])


@pytest.mark.parametrize("timezone", ["Europe/Berlin", "America/New_York", "America/Santiago", "Australia/Lord_Howe"])
@pytest.mark.parametrize("freq", ["h", "D", "W-SUN", "MS"])
def test_local_calendars_cross_changes_of_the_clocks(freq, timezone):
    time = stamps(freq, 400, "2021-01-01", timezone)
    assert infer_freq(time, timezone) == freq
    assert to_grid(time, freq, timezone)[0].tolist() == time.tolist()
    np.testing.assert_array_equal(future_times(time[20], freq, 300, timezone), time[21:321])


def test_daily_steps_keep_local_midnight():
    last = days("2024-03-29T23:00")[0]
    assert format_times(future_times(last, "D", 2, "Europe/Paris"), "D", "Europe/Paris") == [
        "2024-03-31T00:00:00+01:00",
        "2024-04-01T00:00:00+02:00",
    ]
    assert future_times(last, "24h", 2, "Europe/Paris")[-1] == np.datetime64("2024-03-31T23:00")


def test_month_ends_follow_the_month():
    future = future_times(np.datetime64("2023-01-31"), "ME", 2)
    assert format_times(future, "ME") == ["2023-02-28", "2023-03-31"]


def test_weekdays_are_business_days_only_across_a_weekend():
    assert infer_freq(stamps("B", 8)) == "B"
    assert infer_freq(stamps("D", 4)) == "D"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("H", "h"),
        ("T", "min"),
        ("15T", "15min"),
        ("M", "ME"),
        ("Q", "QE-DEC"),
        ("A", "YE-DEC"),
        ("Y", "YE-DEC"),
        ("S", "s"),
        ("L", "ms"),
        ("U", "us"),
        ("N", "ns"),
        ("AS", "YS-JAN"),
        ("BM", "BME"),
        ("W", "W-SUN"),
        ("60min", "h"),
        ("1D", "D"),
        ("0.5h", "30min"),
        ("24h", "24h"),
        ("Q-NOV", "QE-NOV"),
        ("d", "D"),
        ("2W", "2W-SUN"),
    ],
)
def test_old_aliases_get_their_new_spelling(old, new):
    assert normalize_freq(old) == new
    assert normalize_freq(new) == new
    assert pd.tseries.frequencies.to_offset(new).freqstr == new


@pytest.mark.parametrize(
    ("freq", "hint"),
    [
        ("monthly", "MS or ME"),
        ("hours", "did you mean h?"),
        ("m", "min or ME"),
        ("mss", "did you mean MS?"),
        ("W-XXX", "W-MON"),
        ("-1h", "use one like"),
        ("0h", "length zero"),
        ("", "use one like"),
        ("1.5ME", "ME"),
    ],
)
def test_unknown_freq_is_refused_with_a_suggestion(freq, hint):
    with pytest.raises(DataError) as error:
        normalize_freq(freq)
    assert repr(freq) in str(error.value)
    assert hint in str(error.value)


def test_irregular_stamps_are_refused_by_name():
    time = stamps("10min", 30, "2024-01-01")
    time[12] += np.timedelta64(3, "m")
    with pytest.raises(DataError, match=r"most are 10 min apart but 2024-01-01T02:03:00 is off it; give --freq"):
        infer_freq(time)
    with pytest.raises(DataError, match=r"2024-01-01T02:03:00 is not on the calendar '10min'; give another --freq"):
        to_grid(time, "10min")


def test_stamps_without_a_usual_distance_are_refused():
    with pytest.raises(DataError, match=r"the most common distance is 1 day, but only 25% are"):
        infer_freq(days("2024-01-01", "2024-01-02", "2024-01-04", "2024-01-07", "2024-01-11"))


def test_two_stamps_do_not_make_a_freq():
    with pytest.raises(DataError, match="2 stamps are too few to tell the frequency; give --freq"):
        infer_freq(days("2024-01-01", "2024-01-02"))


def test_a_far_stamp_does_not_fill_the_memory():
    with pytest.raises(DataError, match=r"2 stamps from 1900-01-01T00:00:00 to 2024-01-01T00:00:00 would fill"):
        to_grid(days("1900-01-01", "2024-01-01"), "s")


def test_future_refuses_a_last_stamp_off_the_calendar_and_the_end_of_time():
    with pytest.raises(DataError, match="2024-01-15T00:00:00 is not on the calendar 'ME'"):
        future_times(np.datetime64("2024-01-15"), "M", 3)
    with pytest.raises(DataError, match="past the year 2261"):
        future_times(np.datetime64("2024-01-01"), "YS", 400)


@pytest.mark.parametrize(
    ("freq", "season", "horizon"),
    [
        ("h", 24, 48),
        ("30min", 48, 48),
        ("15min", 96, 96),
        ("10min", 144, 144),
        ("min", 1440, 288),
        ("2h", 12, 24),
        ("7h", 1, 24),
        ("s", 60, 60),
        ("250ms", 1, 60),
        ("24h", 1, 14),
        ("D", 7, 14),
        ("7D", 52, 13),
        ("B", 5, 10),
        ("W-MON", 52, 13),
        ("MS", 12, 12),
        ("ME", 12, 12),
        ("3MS", 4, 8),
        ("QE", 4, 8),
        ("QS", 4, 8),
        ("YE", 1, 6),
    ],
)
def test_default_season_and_horizon(freq, season, horizon):
    assert season_length(freq) == season
    assert default_prediction_length(freq) == horizon


@pytest.mark.parametrize(
    ("first", "freq", "season", "timezone", "position"),
    [
        ("2024-01-01T05:00", "h", 24, None, 5),
        ("2024-07-01T05:00", "h", 24, "Europe/Paris", 7),
        ("2024-01-03T05:00", "h", 168, None, 53),
        ("2024-01-01T05:30", "30min", 48, None, 11),
        ("2024-01-03", "D", 7, None, 2),
        ("2024-01-02T23:00", "D", 7, "Europe/Paris", 2),
        ("2024-01-05", "B", 5, None, 4),
        ("2024-03-31", "ME", 12, None, 2),
        ("2024-04-01", "QS", 4, None, 1),
    ],
)
def test_season_position_is_that_of_the_local_calendar(first, freq, season, timezone, position):
    assert season_position(np.datetime64(first), freq, season, timezone) == position


@settings(deadline=None)
@given(st.sampled_from(FREQS), st.integers(0, 50), st.integers(2, 60))
def test_season_position_advances_by_one_a_step(freq, index, season):
    time = stamps(freq, 52)
    here, there = (season_position(time[i], freq, season) for i in (index, index + 1))
    assert there == (here + 1) % season


def test_times_are_written_as_iso():
    assert format_times(days("2024-03-31"), "D") == ["2024-03-31"]
    assert format_times(days("2024-03-31", "2024-04-30T12:00"), "ME") == ["2024-03-31T00:00:00", "2024-04-30T12:00:00"]
    assert format_times(days("2024-03-31"), "h") == ["2024-03-31T00:00:00"]
    assert format_times(days("2024-03-31T00:00:00.25"), "250ms") == ["2024-03-31T00:00:00.250"]
    assert format_times(days("2024-03-31"), "D", "UTC") == ["2024-03-31T00:00:00+00:00"]
    assert format_times(days("2023-12-31T23:00"), "D", "+01:00") == ["2024-01-01T00:00:00+01:00"]
    assert format_times(days("2024-03-31T12:00"), "h", "-03:30") == ["2024-03-31T08:30:00-03:30"]


def test_an_unknown_time_zone_is_refused():
    with pytest.raises(DataError, match="'Europe/Pari' is not a time zone; use a name like"):
        infer_freq(stamps("D", 5), "Europe/Pari")
