"""Sample paths: standard normal at every step, and correlated from step to step as the data were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trellis_ts.copula import LARGEST_LAG, lag_correlations, sample_scores

HORIZON, PHI = 12, 0.8


def forecast_errors(num_windows, *, missing=0.0, seed=0):
    """Errors of the best forecast of an AR(1) series: those of a step are PHI times those before, plus news."""
    rng = np.random.default_rng(seed)
    news = rng.normal(size=(num_windows, HORIZON, 1))
    errors = np.zeros_like(news)
    for step in range(HORIZON):
        errors[:, step] = news[:, step] + (PHI * errors[:, step - 1] if step else 0)
    errors[rng.random(errors.shape) < missing] = np.nan
    return errors


def true_correlations():
    """Of those errors: the covariance of steps s < t is PHI**(t - s) times the variance of s."""
    variance = np.cumsum(PHI ** (2 * np.arange(HORIZON)))
    deviation = np.sqrt(variance)
    result = np.eye(HORIZON)
    for t in range(HORIZON):
        for s in range(t):
            result[t, s] = result[s, t] = PHI ** (t - s) * variance[s] / (deviation[s] * deviation[t])
    return result


def drawn(correlations, horizon, num_samples=40_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return sample_scores(correlations, (1, horizon, 1), num_samples, generator)[:, 0, :, 0].numpy()


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_the_errors_of_an_autoregression_are_learned_and_drawn(missing):
    correlations = lag_correlations(np.exp(forecast_errors(4000, missing=missing)), num_independent=4000)
    assert np.shape(correlations) == (HORIZON, LARGEST_LAG)
    expected = true_correlations()
    for step in range(HORIZON):
        for lag in range(1, min(step, LARGEST_LAG) + 1):
            # Four standard errors of a correlation from 4000 pairs, 2560 where a fifth of each is missing.
            assert abs(correlations[step][lag - 1] - expected[step, step - lag]) < 4 / np.sqrt(2560)
    found = np.corrcoef(drawn(correlations, HORIZON).T)
    # Also the lags that were not stored: they follow from those that were.
    assert np.abs(found - expected).max() < 0.06


def test_every_step_is_standard_normal_whatever_was_estimated():
    rng = np.random.default_rng(0)
    for correlations in (rng.uniform(-1, 1, (6, 5)), np.ones((6, 5)), -np.ones((6, 5)), np.zeros((6, 5))):
        scores = drawn(correlations, 9)
        np.testing.assert_allclose(scores.mean(axis=0), 0, atol=0.03)
        np.testing.assert_allclose(scores.std(axis=0), 1, atol=0.03)


def test_a_longer_horizon_goes_on_as_the_last_step():
    correlations = lag_correlations(forecast_errors(2000), num_independent=2000)
    found = np.corrcoef(drawn(correlations, 3 * HORIZON).T)
    late = [found[step, step - 1] for step in range(HORIZON, 3 * HORIZON)]
    assert np.abs(np.array(late) - PHI).max() < 0.05


def test_few_windows_are_trusted_little():
    """Pure noise in a handful of windows does not make correlations."""
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(size=(6, HORIZON, 1))
        few = np.array(lag_correlations(noise, num_independent=6))
        raw = np.array([np.corrcoef(noise[:, s, 0], noise[:, s - 1, 0])[0, 1] for s in range(1, HORIZON)])
        assert np.sqrt((few[1:, 0] ** 2).mean()) < 0.75 * np.sqrt((raw**2).mean())


def test_one_step_and_nothing_observed():
    assert lag_correlations(np.zeros((5, 1, 2)), num_independent=5) == ((),)
    assert drawn(((),), 1).shape == (40_000, 1)
    nothing = lag_correlations(np.full((5, 3, 1), np.nan), num_independent=1)
    assert np.array(nothing).tolist() == [[0.0, 0.0]] * 3


def test_series_channels_and_samples_are_independent_and_the_seed_decides():
    correlations = lag_correlations(forecast_errors(500), num_independent=500)
    one, again, other = (
        sample_scores(correlations, (3, HORIZON, 2), 4000, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    flat = one.permute(0, 2, 1, 3)[:, -1].flatten(1).numpy()
    assert np.abs(np.corrcoef(flat.T) - np.eye(6)).max() < 0.08
