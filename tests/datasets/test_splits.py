"""Splits: in the order of time, and nothing learnt from what is held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis_ts.datasets.splits import Scaler, Splits, held_out_rows, split_borders
from trellis_ts.errors import DataError
from trellis_ts.types import Borders, Series

SIZES = st.one_of(st.floats(0, 0.99), st.integers(0, 50).map(float))


@given(num_rows=st.integers(0, 300), validation=SIZES, test=SIZES, horizon=st.integers(1, 40))
def test_borders_are_ordered_disjoint_and_cover_all_rows(num_rows, validation, test, horizon):
    borders = split_borders(num_rows, validation_size=validation, test_size=test, prediction_length=horizon)
    assert borders.train[0] == 0
    assert borders.train[1] == borders.validation[0] <= borders.validation[1] == borders.test[0] <= borders.test[1]
    assert borders.test[1] == num_rows
    for size, (start, stop) in ((validation, borders.validation), (test, borders.test)):
        if size == 0:
            assert start == stop
        elif start > 0:
            assert stop - start >= horizon


@pytest.mark.parametrize(
    ("size", "rows"), [(0, 0), (0.1, 20), (0.25, 50), (0.001, 7), (1, 7), (7, 7), (30, 30), (0.9999, 200)]
)
def test_a_fraction_or_a_count_but_at_least_a_horizon(size, rows):
    assert held_out_rows(size, 200, 7) == rows


def test_borders_by_name():
    borders = Borders((0, 5), (5, 7), (7, 9))
    assert [borders.of(name) for name in ("train", "validation", "test")] == [(0, 5), (5, 7), (7, 9)]


@pytest.fixture(scope="module")
def panel(make_panel):
    return make_panel((50, 31), channels=2, missing=0.1)


def split(panel, prediction_length=4):
    return Splits.chronological(panel, validation_size=0.2, test_size=6, prediction_length=prediction_length)


def test_the_scaler_has_the_statistics_of_the_training_rows(panel):
    splits = split(panel)
    assert [border.train[1] for border in splits.borders] == [34, 19]
    for index, (series, border) in enumerate(zip(panel.series, splits.borders, strict=True)):
        rows = series.values[: border.train[1]]
        np.testing.assert_allclose(splits.scaler.loc[index], np.nanmean(rows, axis=0))
        np.testing.assert_allclose(splits.scaler.scale[index], np.nanstd(rows, axis=0))


@pytest.mark.parametrize("poison", [np.nan, 1e9, -1e300])
def test_the_scaler_never_sees_later_rows(panel, poison):
    clean = split(panel)
    poisoned = []
    for series, border in zip(panel.series, clean.borders, strict=True):
        values = series.values.copy()
        values[border.train[1] :] = poison
        poisoned.append(Series(series.name, series.time, values))
    scaler = split(replace(panel, series=tuple(poisoned))).scaler
    np.testing.assert_array_equal(scaler.loc, clean.scaler.loc)
    np.testing.assert_array_equal(scaler.scale, clean.scaler.scale)


@pytest.mark.parametrize(
    ("column", "loc", "scale"),
    [
        ([0.1] * 10, 0.1, 1.0),
        ([0.0] * 10, 0.0, 1.0),
        ([-1e12] * 10, -1e12, 1.0),
        ([np.nan] * 10, 0.0, 1.0),
        ([np.nan] * 9 + [3.0], 3.0, 1.0),
        ([1e-9, 3e-9] * 5, 2e-9, 1e-9),
        ([1e9, 1e9 + 2] * 5, 1e9 + 1, 1.0),
        ([1e5, 3e5] * 5, 2e5, 1e5),
    ],
)
def test_constant_and_missing_channels(panel, column, loc, scale):
    values = np.column_stack((column, np.arange(10.0)))
    one = replace(panel, series=(Series("a", panel.series[0].time[:10], values),))
    scaler = Scaler.fit(one, [(0, 10)])
    np.testing.assert_allclose((scaler.loc[0, 0], scaler.scale[0, 0]), (loc, scale), rtol=1e-6)
    np.testing.assert_allclose((scaler.loc[0, 1], scaler.scale[0, 1]), (4.5, np.arange(10).std()))


def test_no_rows_are_the_neutral_scale(panel):
    scaler = Scaler.fit(panel, [(0, 0), (0, 5)])
    assert scaler.loc[0].tolist() == [0, 0]
    assert scaler.scale[0].tolist() == [1, 1]


def test_statistics_go_by_name_and_a_new_series_has_its_own(panel):
    scaler = split(panel).scaler
    first, second = panel.series
    stranger = Series("stranger", first.time, 1000 + 7 * first.values)
    other = scaler.of(replace(panel, series=(stranger, second, first)))
    assert other.names == ("stranger", "s1", "s0")
    np.testing.assert_array_equal(other.loc[1:], scaler.loc[::-1])
    np.testing.assert_array_equal(other.scale[1:], scaler.scale[::-1])
    np.testing.assert_allclose(other.loc[0], np.nanmean(stranger.values, axis=0))
    np.testing.assert_allclose(other.scale[0], np.nanstd(stranger.values, axis=0))


def test_too_few_rows_are_refused_with_the_numbers(panel):
    with pytest.raises(DataError, match=r"longest series has 50 rows, of which 40 are held out.*predict 20 steps"):
        split(panel, prediction_length=20)


def test_splitting_changes_nothing(panel):
    before = [series.values.copy() for series in panel.series]
    split(panel)
    for series, values in zip(panel.series, before, strict=True):
        np.testing.assert_array_equal(series.values, values)


def test_a_series_never_seen_can_be_kept_to_some_rows(panel):
    scaler = split(panel).scaler
    stranger = replace(panel.series[0], name="stranger")
    other = replace(panel, series=(panel.series[1], stranger))
    found = scaler.of(other, [(0, 3), (2, 9)])
    np.testing.assert_array_equal(found.loc[0], scaler.loc[1])
    np.testing.assert_allclose(found.loc[1], np.nanmean(stranger.values[2:9], axis=0))
    np.testing.assert_allclose(found.scale[1], np.nanstd(stranger.values[2:9], axis=0))
    np.testing.assert_allclose(scaler.of(other).loc[1], np.nanmean(stranger.values, axis=0))
