"""Covariates in windows: each is the slice it says it is, coded as the model knows it, and never of the future."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trellis_ts.datasets.splits import Scaler
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.types import Features

LENGTHS, FUTURE, CONTEXT = (40, 7, 25), 6, 9
ROWS = [(0, 20), (0, 7), (0, 20)]


@pytest.fixture(scope="module")
def panel(make_panel, make_covariates):
    return make_covariates(make_panel(LENGTHS, channels=2, missing=0.1), future=FUTURE)


def make_scaler(panel, cycles=("week",)):
    scaler = Scaler.fit(panel, ROWS)
    return replace(scaler, covariates=replace(scaler.covariates, cycles=cycles))


@pytest.fixture(scope="module")
def scaled(panel):
    scaled = ScaledPanel(panel, make_scaler(panel), 7, future_length=FUTURE)
    scaled.gather(np.array([0]), np.array([9]), CONTEXT, 0)  # compiles, which no example's deadline allows for
    return scaled


def check(features: Features, raw: np.ndarray, covariates, names) -> None:
    """The first number and the first category are the standardised and coded raw columns."""
    number, category = covariates
    expected = (raw[:, 0] - number.loc) / number.scale
    np.testing.assert_array_equal(features.observed[0, :, 0].numpy(), ~np.isnan(expected))
    np.testing.assert_allclose(features.values[0, :, 0].numpy(), np.nan_to_num(expected), rtol=1e-5, atol=1e-5)
    known = [0 if np.isnan(code) else category.categories.index(names[int(code)]) + 1 for code in raw[:, 1]]
    assert features.codes[0, :, 0].tolist() == known


@given(series=st.integers(0, 2), back=st.integers(0, 30), horizon=st.integers(0, FUTURE))
def test_a_window_holds_the_slices_it_says(panel, scaled, series, back, horizon):
    length = LENGTHS[series]
    origin = max(1, length - back)
    batch = scaled.gather(np.array([series]), np.array([origin]), CONTEXT, 0, horizon)
    each, covariates = panel.series[series], make_scaler(panel).covariates
    padding = np.full((CONTEXT, 2), np.nan)
    past = np.concatenate((padding, each.past))[origin : origin + CONTEXT]
    known = np.concatenate((padding, each.known))[origin : origin + CONTEXT + horizon]
    names = panel.covariates("past")[1].categories
    check(batch.past, past, covariates.of_role("past"), names)
    check(batch.known, known, covariates.of_role("known"), names)
    assert batch.past.codes.dtype == batch.known.codes.dtype == torch.int64
    assert batch.past.values.dtype == torch.float32
    check(Features(*(part[:, None] for part in batch.static)), each.static[None], covariates.of_role("static"), names)


@given(
    series=st.integers(0, 2),
    back=st.integers(0, 20),
    horizon=st.integers(1, FUTURE),
    poison=st.sampled_from([np.nan, 1e6, -3.0]),
    seed=st.integers(0, 99),
)
def test_nothing_after_the_origin_is_seen(panel, scaled, series, back, horizon, poison, seed):
    """Targets and past covariates end at the origin, known covariates at the horizon's end."""
    origin = max(1, LENGTHS[series] - back)
    each = panel.series[series]
    values, past, known = each.values.copy(), each.past.copy(), each.known.copy()
    values[origin:] = poison
    past[origin:] = np.random.default_rng(seed).integers(0, 3, past[origin:].shape)
    known[origin + horizon :] = 2.0
    others = tuple(
        replace(other, values=values, past=past, known=known) if index == series else other
        for index, other in enumerate(panel.series)
    )
    poisoned = ScaledPanel(replace(panel, series=others), make_scaler(panel), 7, future_length=FUTURE)
    expected = scaled.gather(np.array([series]), np.array([origin]), CONTEXT, 0, horizon)
    actual = poisoned.gather(np.array([series]), np.array([origin]), CONTEXT, 0, horizon)
    for one, other in zip(expected, actual, strict=True):
        parts = zip(one, other, strict=True) if isinstance(one, Features) else [(one, other)]
        assert all(a is b is None or torch.equal(a, b) for a, b in parts)


def test_a_category_the_scaler_does_not_know_is_zero(panel, scaled):
    scaler = make_scaler(panel)
    covariates = tuple(
        replace(each, categories=("green",)) if each.name == "event" else each for each in scaler.covariates.covariates
    )
    fewer = replace(scaler, covariates=replace(scaler.covariates, covariates=covariates))
    batch = ScaledPanel(panel, fewer, 7).gather(np.array([0]), np.array([30]), 30, 0, 0)
    raw = panel.series[0].known[:30, 1]
    assert batch.known.codes[0, :, 0].tolist() == [1 if code == 1 else 0 for code in raw]


def test_the_calendar_goes_on_where_the_panel_ends(panel, scaled):
    batch = scaled.gather(np.array([0]), np.array([40]), 7, 0, FUTURE)
    waves = batch.known.values[0, :, 1:]
    assert waves.shape == (13, 6)
    torch.testing.assert_close(waves[:6], waves[7:])  # a week later
    assert (waves[0] - waves[1]).abs().max() > 0.1
    assert batch.known.observed[0, :, 1:].all()
    beyond = scaled.gather(np.array([0]), np.array([40]), 7, 0, FUTURE + 2).known
    assert not beyond.observed[0, -2:].any()
    assert not beyond.values[0, -2:].any()


def test_covariates_are_read_where_they_lie(panel):
    """Nothing is stored per row but where it is in each cycle."""
    scaled = ScaledPanel(panel, make_scaler(panel, ("day", "week")), 7, future_length=FUTURE)
    known, past = scaled._known, scaled._past
    assert all(own is series.known for own, series in zip(known._values, panel.series, strict=True))
    assert all(own is series.past for own, series in zip(past._values, panel.series, strict=True))
    assert known._positions.dtype == np.int16
    assert known._positions.shape == (sum(LENGTHS) + 3 * FUTURE, 2)
    assert past._positions.shape[1] == 0


def test_no_covariates_give_a_batch_as_ever(make_panel):
    panel = make_panel(LENGTHS)
    batch = ScaledPanel(panel, Scaler.fit(panel, ROWS), 7).gather(np.array([0]), np.array([20]), 9, 3)
    assert batch.past is batch.known is batch.static is None
