"""Where stamps lie in the cycles of the calendar, and which cycles are worth reading."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from trellis_ts.datasets.cycles import num_features, positions, useful_cycles, waves

ALL = ("minute", "hour", "day", "week", "year")


@pytest.mark.parametrize("timezone", [None, "Europe/Berlin", "Australia/Lord_Howe"])
def test_positions_are_those_pandas_says(timezone):
    stamps = np.sort(np.random.default_rng(0).integers(-(10**18), 2 * 10**18, 500)).astype("datetime64[ns]")
    local = pd.DatetimeIndex(stamps)
    local = local if timezone is None else local.tz_localize("UTC").tz_convert(timezone)
    found = positions(stamps, ALL, timezone)
    assert found.dtype == np.int16
    expected = (local.second, local.minute, 60 * local.hour + local.minute, local.dayofweek, local.dayofyear - 1)
    np.testing.assert_array_equal(found, np.column_stack(expected))


@pytest.mark.parametrize("cycle", ALL)
def test_every_position_has_a_row_of_waves(cycle):
    table = waves(cycle)
    assert table.dtype == np.float32
    assert table.shape[1] == num_features([cycle])
    assert len(np.unique(table.round(6), axis=0)) == len(table)  # no two positions look alike
    assert {"minute": 60, "hour": 60, "day": 1440, "week": 7, "year": 366}[cycle] == len(table)


@pytest.mark.parametrize(
    ("freq", "rows", "cycles"),
    [
        ("h", 24 * 20, ("day", "week")),
        ("h", 24 * 10, ("day",)),
        ("30min", 48 * 800, ("day", "week", "year")),
        ("10s", 9000, ("minute", "hour")),
        ("10s", 18000, ("minute", "hour", "day")),
        ("12h", 100, ("week",)),
        ("D", 800, ("week", "year")),
        ("B", 600, ("week", "year")),
        ("W-MON", 200, ("year",)),
        ("MS", 60, ("year",)),
        ("QS-JAN", 20, ("year",)),
        ("YS-JAN", 30, ()),
        ("10ms", 500, ()),
        ("D", 1, ()),
    ],
)
def test_a_cycle_is_useful_if_it_was_seen_twice(make_panel, freq, rows, cycles):
    panel = make_panel((3, rows), freq=freq)
    assert useful_cycles(panel, [(0, 3), (0, rows)]) == cycles
    assert useful_cycles(panel, [(0, 3), (0, 0)]) == ()
