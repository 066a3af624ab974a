"""Real files as people have them. They are not in this repository: TRELLIS_DATA names the folder that holds them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from trellis_ts.datasets.readers import read_rows, read_table
from trellis_ts.errors import DataError


@pytest.fixture
def real():
    folder = os.environ.get("TRELLIS_DATA")
    if not folder:
        pytest.skip("needs the folder of real data files: set TRELLIS_DATA")
    return lambda name: Path(folder) / f"{name}.csv.gz"


@pytest.mark.parametrize(
    ("name", "time_column", "freq", "timezone", "shape", "first"),
    [
        ("air_passengers", None, "MS", None, (144, 1), "1949-01-01"),
        ("uk_daily_flights", None, "D", None, (1118, 1), "2019-01-02"),
        ("vic_electricity", "Time", "30min", "UTC", (52608, 2), "2011-12-31T13:00"),
        ("air_quality_valencia", None, "h", None, (43824, 10), "2019-01-01"),
        ("exchange_rate", None, "D", None, (7588, 8), "1990-01-01"),
        ("national_illness", None, "W-TUE", None, (966, 7), "2002-01-01"),
        ("weather", None, "10min", None, (52704, 21), "2020-01-01T00:10"),
    ],
)
def test_wide_files(real, name, time_column, freq, timezone, shape, first):
    panel = read_table(real(name), time=time_column)
    assert (panel.freq, panel.timezone, panel.is_wide) == (freq, timezone, True)
    assert panel.series[0].values.shape == shape
    assert panel.series[0].time[0] == np.datetime64(first)


def test_missing_values_are_kept(real):
    panel = read_table(real("air_quality_valencia"))
    assert int(np.isnan(panel.series[0].values).sum()) == 13262
    assert "13262 values are missing" in panel.notes


def test_byte_order_mark_is_no_part_of_a_name(real):
    panel = read_table(real("uk_daily_flights"))
    assert (panel.columns.time, panel.channels) == ("Date", ("Number of flights",))
    assert panel.series[0].time[-1] == np.datetime64("2022-01-23")


def test_two_time_columns_are_refused(real):
    with pytest.raises(DataError, match="columns 'Time' and 'Date' both hold dates; say which with --time Time"):
        read_table(real("vic_electricity"))
    assert read_table(real("vic_electricity"), time="Time").channels == ("Demand", "Temperature")


def test_codes_of_goods_name_the_series(real):
    panel = read_table(real("online_retail_daily"))
    assert (panel.columns.id, panel.channels, panel.freq) == ("StockCode", ("Quantity", "Sales"), "D")
    assert len(panel.series) == 38
    assert {len(series) for series in panel.series} == {363}
    assert {"POST", "DOT", "20685"} <= {series.name for series in panel.series}


def test_long_file_is_read_in_a_few_seconds(real):
    start = time.perf_counter()
    panel = read_table(real("m4_hourly_long"))
    assert time.perf_counter() - start < 10  # half a second on an idle machine
    assert (len(panel.series), panel.freq) == (414, "h")
    assert {len(series) for series in panel.series} == {748, 1008}
    assert [series.name for series in panel.series[:2]] == ["H1", "H2"]


def test_weather_has_a_repeated_row_and_a_gap(real):
    notes = read_table(real("weather")).notes
    assert notes[0] == "1 exact duplicate row is dropped"
    assert notes[1] == "9 steps are absent from the calendar '10min' and kept as missing"


def test_rows_of_benchmarks_are_kept(real):
    stamps, values, names = read_rows(real("weather"))
    assert values.shape == (52696, 21)
    assert (names[-1], names[-5]) == ("OT", "SWDR (W/m\ufffd)")
    assert stamps[19043] == stamps[19044] == np.datetime64("2020-05-12T06:00")
    assert read_rows(real("exchange_rate"))[0][1] == np.datetime64("1990-01-02")
