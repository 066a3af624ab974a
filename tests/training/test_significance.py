"""The paired tests: by hand, by simulation, and where they decline to answer."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trellis_ts.significance import diebold_mariano, paired_bootstrap


def test_one_step_ahead_it_is_nearly_the_t_test():
    """Without overlap the statistic is that of a paired t-test: the variance by n, times sqrt((n - 1) / n)."""
    difference = np.random.default_rng(0).normal(0.2, 1, size=30)
    found = diebold_mariano(difference, 1)
    expected = stats.ttest_1samp(difference, 0)
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.num_origins, found.overlap, found.kernel) == (30, 1, "rectangular")


def test_two_steps_ahead_by_hand():
    d = np.array([1.0, 3.0, 2.0, 4.0, 1.0, 2.0, 5.0, 2.0])
    c = d - 2.5
    variance = (c @ c + 2 * (c[1:] @ c[:-1])) / 8
    found = diebold_mariano(d, 2)
    assert variance > 0
    assert found.statistic == pytest.approx(2.5 / np.sqrt(variance / 8) * np.sqrt((8 + 1 - 4 + 2 / 8) / 8))
    assert found.p_value == pytest.approx(2 * stats.t.sf(found.statistic, 7))


def test_a_negative_variance_falls_back_to_bartlett():
    d = np.tile([1.0, -0.8], 10)
    assert d @ d + 2 * ((d - d.mean())[1:] @ (d - d.mean())[:-1]) < 0
    found = diebold_mariano(d, 2)
    assert found.kernel == "bartlett"
    assert 0 < found.p_value < 1


@pytest.mark.parametrize(
    ("difference", "overlap"),
    [
        (np.arange(7.0), 1),
        (np.arange(30.0), 8),
        (np.full(30, 0.1), 1),
        (np.zeros(30), 1),
        (np.array([np.nan, *range(29)]), 1),
    ],
    ids=["few", "few horizons", "equal", "zero", "no number"],
)
def test_it_declines(difference, overlap):
    assert diebold_mariano(difference, overlap) is None


def test_its_size_under_overlapping_horizons_is_about_right():
    """Losses that are moving sums of 4: a test that took them for independent would reject far too often."""
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(600, 203))
    sums = np.apply_along_axis(lambda row: np.convolve(row, np.ones(4), "valid"), 1, noise)
    rejected = np.mean([diebold_mariano(each, 4).p_value < 0.05 for each in sums])
    careless = np.mean([diebold_mariano(each, 1).p_value < 0.05 for each in sums])
    assert 0.03 < rejected < 0.10
    assert careless > 0.25


def test_swapping_the_forecasters_changes_the_sign_only():
    d = np.random.default_rng(2).normal(size=40)
    one, other = diebold_mariano(d, 3), diebold_mariano(-d, 3)
    assert one.statistic == pytest.approx(-other.statistic)
    assert one.p_value == pytest.approx(other.p_value)


def test_the_bootstrap_is_seeded_and_brackets_the_difference():
    rng = np.random.default_rng(0)
    theirs = rng.gamma(4, size=60)
    ours = theirs * rng.normal(0.9, 0.1, size=60)
    found = paired_bootstrap(ours, theirs, seed=5)
    assert found == paired_bootstrap(ours, theirs, seed=5)
    assert found != paired_bootstrap(ours, theirs, seed=6)
    assert found.difference == pytest.approx(ours.sum() / theirs.sum() - 1)
    assert found.low < found.difference < found.high < 0
    assert found.p_value == pytest.approx(2 / 2001)


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(4)
    inside = 0
    for draw in range(200):
        theirs = rng.gamma(4, size=50)
        ours = theirs + rng.normal(0, 1, size=50)
        found = paired_bootstrap(ours, theirs, seed=draw, num_draws=300)
        inside += found.low <= 0 <= found.high
    assert 0.88 < inside / 200 <= 0.99


def test_equal_losses_are_no_difference():
    losses = np.arange(1.0, 21.0)
    found = paired_bootstrap(losses, losses)
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(np.ones(9), np.ones(9)), (np.ones(20), np.zeros(20)), (np.full(20, np.nan), np.ones(20))],
    ids=["few", "no loss", "no number"],
)
def test_the_bootstrap_declines(ours, theirs):
    assert paired_bootstrap(ours, theirs) is None
