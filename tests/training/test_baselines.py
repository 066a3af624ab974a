"""Seasonal naive against a loop that says in words what it does."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from trellis_ts.baselines import seasonal_naive


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
    actual = seasonal_naive(context, observed, season, horizon)
    expected = [[one_channel(values[row, :, channel], season, horizon) for channel in range(2)] for row in range(3)]
    np.testing.assert_array_equal(actual.numpy(), np.array(expected).transpose(0, 2, 1))
    assert torch.equal(context, before)


def test_unobserved_numbers_are_not_read():
    context = torch.tensor([1.0, 2.0, 3.0, 1e9])[None, :, None]
    observed = torch.tensor([True, True, True, False])[None, :, None]
    assert seasonal_naive(context, observed, 2, 3).flatten().tolist() == [3.0, 2.0, 3.0]
