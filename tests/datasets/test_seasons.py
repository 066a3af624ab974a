"""Seasons are found where they are, and only there."""

from __future__ import annotations

import numpy as np
import pytest

from trellis_ts.datasets.calendar import season_candidates
from trellis_ts.datasets.seasons import find_seasons, seasonal_autocorrelation


def whole(panel):
    return [(0, len(series)) for series in panel.series]


@pytest.mark.parametrize(
    ("freq", "candidates"),
    [
        ("h", (24, 168)),
        ("30min", (48, 336)),
        ("D", (7, 365)),
        ("MS", (12,)),
        ("QS", (4,)),
        ("W-SUN", (52,)),
        ("B", (5, 260)),
        ("s", (60, 3600, 86400, 604800)),
        ("7h", (24,)),
        ("YS", ()),
    ],
)
def test_the_calendars_candidates(freq, candidates):
    assert season_candidates(freq) == candidates


def test_a_weekly_season_in_daily_data(make_panel):
    panel = make_panel((300,), noise=0.3, season_length=7)
    assert list(find_seasons(panel, whole(panel))) == [7]


def test_38_short_series_share_their_season(make_panel):
    panel = make_panel((40,) * 38, noise=0.5, season_length=7)
    assert list(find_seasons(panel, whole(panel))) == [7]


@pytest.mark.parametrize("kind", ["noise", "walk", "constant", "other season"])
def test_no_season_where_there_is_none(make_panel, kind):
    panel = make_panel((400,), season_length=10 if kind == "other season" else 7)
    values = panel.series[0].values
    noise = np.random.default_rng(3).normal(size=values.shape)
    if kind != "other season":
        values[:] = {"noise": noise, "walk": noise.cumsum(axis=0), "constant": 0 * noise + 0.1}[kind]
    assert find_seasons(panel, whole(panel)) == {}


def test_a_day_and_a_week_of_hourly_data_are_told_apart(make_panel):
    panel = make_panel((24 * 7 * 6,), freq="h", season_length=24)
    assert list(find_seasons(panel, whole(panel))) == [24]
    weekend = (np.arange(len(panel.series[0])) // 24 % 7 >= 5)[:, None]
    panel.series[0].values[:] -= 1.5 * weekend
    assert list(find_seasons(panel, whole(panel))) == [24, 168]


def test_missing_values_and_rows_not_given_are_left_out(make_panel):
    panel = make_panel((400,), missing=0.3, noise=0.3)
    assert list(find_seasons(panel, whole(panel))) == [7]
    panel.series[0].values[200:] = np.random.default_rng(0).normal(size=(200, 1)) * 1000
    assert list(find_seasons(panel, [(0, 200)])) == [7]


def test_too_few_rows_say_nothing():
    values = np.sin(2 * np.pi * np.arange(60) / 7)
    assert seasonal_autocorrelation(values, 7) > 0.9
    assert np.isnan(seasonal_autocorrelation(values[:20], 7))
