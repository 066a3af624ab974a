"""The naive forecasts against loops that say in words what they do, their spread by hand and by simulation."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trellis_ts.baselines import NAIVE_BASELINES, drift, naive, naive_forecast, seasonal_naive

NAN = float("nan")
LEVELS = (0.1, 0.5, 0.9)


def tensors(values):
    """One row, one channel."""
    array = torch.tensor(values, dtype=torch.float64)[None, :, None]
    return array.nan_to_num(), ~array.isnan()


def deviations(forecast):
    """The standard deviation of each step, from the highest quantile."""
    z = NormalDist().inv_cdf(forecast.quantile_levels[-1])
    return ((forecast.quantiles[..., -1] - forecast.point) / z).flatten().tolist()


def one_channel(values, season_length, prediction_length):
    """The newest value observed a whole number of seasons before; else the last observed one; else 0."""
    known = [value for value in values if not np.isnan(value)]
    forecast = []
    for step in range(prediction_length):
        answer = known[-1] if known else 0.0
        place = len(values) + step % season_length - season_length
        while place >= 0:
            if not np.isnan(values[place]):
                answer = values[place]
                break
            place -= season_length
        forecast.append(answer)
    return forecast


@given(
    length=st.integers(1, 30),
    season=st.integers(1, 12),
    horizon=st.integers(1, 30),
    missing=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_loop(length, season, horizon, missing, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(3, length, 2))
    values[rng.random(values.shape) < missing] = np.nan
    context, observed = torch.tensor(np.nan_to_num(values)), torch.tensor(~np.isnan(values))
    before = context.clone()
    actual = seasonal_naive(context, observed, season, horizon).point
    expected = [[one_channel(values[row, :, channel], season, horizon) for channel in range(2)] for row in range(3)]
    np.testing.assert_array_equal(actual.numpy(), np.array(expected).transpose(0, 2, 1))
    assert torch.equal(context, before)


def test_unobserved_numbers_are_not_read():
    context = torch.tensor([1.0, 2.0, 3.0, 1e9])[None, :, None]
    observed = torch.tensor([True, True, True, False])[None, :, None]
    assert seasonal_naive(context, observed, 2, 3).point.flatten().tolist() == [3.0, 2.0, 3.0]
    assert naive(context, observed, 2).point.flatten().tolist() == [3.0, 3.0]
    assert drift(context, observed, 2).point.flatten().tolist() == pytest.approx([5.0, 6.0])


def test_naive_by_hand():
    """Residuals 2, -1, 3: their root mean square grows with the root of the step."""
    forecast = naive(*tensors([1.0, 3.0, 2.0, 5.0]), 3, LEVELS)
    assert forecast.point.flatten().tolist() == [5.0] * 3
    s = np.sqrt((4 + 1 + 9) / 3)
    assert deviations(forecast) == pytest.approx([s, s * np.sqrt(2), s * np.sqrt(3)])


def test_steps_are_counted_from_the_last_observed_value():
    forecast = naive(*tensors([1.0, 3.0, 2.0, 5.0, NAN, NAN]), 1, LEVELS)
    assert deviations(forecast) == pytest.approx([np.sqrt(14 / 3) * np.sqrt(3)])
    forecast = drift(*tensors([NAN, 1.0, 2.0, 4.0, NAN]), 2)
    assert forecast.point.flatten().tolist() == pytest.approx([7.0, 8.5])


def test_drift_by_hand():
    """Slope 4/3 over three steps; residuals 2/3, -7/3, 5/3 with two degrees of freedom; T = 4."""
    forecast = drift(*tensors([1.0, 3.0, 2.0, 5.0]), 2, LEVELS)
    assert forecast.point.flatten().tolist() == pytest.approx([5 + 4 / 3, 5 + 8 / 3])
    s = np.sqrt((4 + 49 + 25) / 9 / 2)
    assert deviations(forecast) == pytest.approx([s * np.sqrt(1 + 1 / 3), s * np.sqrt(2 * (1 + 2 / 3))])


def test_seasonal_naive_by_hand():
    """Changes over a season of 2: 2, 2, -3. The third step lies two seasons after the value it repeats."""
    forecast = seasonal_naive(*tensors([1.0, 3.0, 3.0, 5.0, 0.0]), 2, 3, LEVELS)
    assert forecast.point.flatten().tolist() == [5.0, 0.0, 5.0]
    s = np.sqrt((4 + 4 + 9) / 3)
    assert deviations(forecast) == pytest.approx([s, s, s * np.sqrt(2)])


def test_a_value_from_an_older_season_is_less_certain():
    forecast = seasonal_naive(*tensors([1.0, 3.0, 3.0, 5.0, NAN, 6.0]), 2, 2, LEVELS)
    assert forecast.point.flatten().tolist() == [3.0, 6.0]
    s = np.sqrt((4 + 4 + 1) / 3)
    assert deviations(forecast) == pytest.approx([s * np.sqrt(2), s])


@pytest.mark.parametrize("name", NAIVE_BASELINES)
@pytest.mark.parametrize("values", [[NAN] * 5, [2.0], [3.0] * 8, [NAN, 4.0, NAN]])
def test_without_residuals_there_is_no_spread(name, values):
    forecast = naive_forecast(name, *tensors(values), season_length=2, prediction_length=5, quantile_levels=(0.1, 0.9))
    known = [value for value in values if value == value]
    assert forecast.point.flatten().tolist() == [known[-1] if known else 0.0] * 5
    assert torch.equal(forecast.quantiles, forecast.point[..., None].expand(-1, -1, -1, 2))


@pytest.mark.parametrize("name", NAIVE_BASELINES)
def test_bands_of_a_process_it_is_right_for_cover_as_they_say(name):
    """Random walks (seasonal ones for seasonal naive): 80 % bands hold 80 % at every step."""
    rng = np.random.default_rng(0)
    steps = rng.normal(0.5 if name == "drift" else 0.0, 1, size=(2000, 220))
    if name == "seasonal_naive":
        walk = np.cumsum(steps.reshape(2000, 55, 4), axis=1).reshape(2000, 220)
    else:
        walk = np.cumsum(steps, axis=1)
    context, future = torch.tensor(walk[:, :208, None]), walk[:, 208:]
    forecast = naive_forecast(
        name,
        context,
        torch.ones_like(context, dtype=torch.bool),
        season_length=4,
        prediction_length=12,
        quantile_levels=LEVELS,
    )
    lower, upper = forecast.quantiles[..., 0, 0].numpy(), forecast.quantiles[..., 0, 2].numpy()
    covered = ((lower <= future) & (future <= upper)).mean(axis=0)
    assert covered == pytest.approx(np.full(12, 0.8), abs=0.035)


def test_levels_are_those_asked_for():
    forecast = naive(*tensors([1.0, 3.0, 2.0, 5.0]), 2, (0.25, 0.5))
    assert forecast.quantile_levels == (0.25, 0.5)
    assert torch.equal(forecast.quantile(0.5), forecast.point)
    assert (forecast.quantile(0.25) < forecast.point).all()


@pytest.mark.parametrize(("name", "model"), [("naive", "Naive"), ("drift", "RandomWalkWithDrift")])
def test_statsforecast_agrees(name, model):
    models = pytest.importorskip("statsforecast.models")
    values = np.cumsum(np.random.default_rng(1).normal(0.3, 1, size=40))
    theirs = getattr(models, model)().forecast(y=values, h=6, level=[80])
    ours = naive_forecast(name, *tensors(values), season_length=1, prediction_length=6, quantile_levels=LEVELS)
    np.testing.assert_allclose(ours.point.flatten(), theirs["mean"])
    np.testing.assert_allclose(ours.quantile(0.1).flatten(), theirs["lo-80"], rtol=0.02)
    np.testing.assert_allclose(ours.quantile(0.9).flatten(), theirs["hi-80"], rtol=0.02)


def test_statsforecast_agrees_on_seasonal_naive():
    models = pytest.importorskip("statsforecast.models")
    values = np.random.default_rng(1).normal(size=42)
    theirs = models.SeasonalNaive(season_length=7).forecast(y=values, h=16, level=[80])
    ours = seasonal_naive(*tensors(values), 7, 16, LEVELS)
    np.testing.assert_allclose(ours.point.flatten(), theirs["mean"])
    np.testing.assert_allclose(ours.quantile(0.9).flatten(), theirs["hi-80"], rtol=0.05)
