"""Formulas against numbers worked out by hand, against other libraries, and against their own definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from trellis_ts import metrics

NAN = float("nan")
LEVELS = (0.1, 0.5, 0.9)


def test_errors_by_hand():
    truth, point = [1.0, 4.0, NAN, 0.0], [2.0, 1.0, 100.0, 0.0]
    assert metrics.mse(truth, point) == pytest.approx((1 + 9 + 0) / 3)
    assert metrics.mae(truth, point) == pytest.approx(4 / 3)
    assert metrics.rmse(truth, point) == pytest.approx(math.sqrt(10 / 3))
    assert metrics.smape(truth, point) == pytest.approx((2 / 3 + 6 / 5 + 0) / 3)


def test_scaled_errors_by_hand():
    history = [1.0, 5.0, 3.0, 6.0, 7.0]  # a season of 2: |3-1|, |6-5|, |7-3|
    assert metrics.seasonal_error(np.array(history), 2) == pytest.approx(7 / 3)
    assert metrics.seasonal_error(np.array(history), 2, squared=True) == pytest.approx((4 + 1 + 16) / 3)
    truth, point = [8.0, 2.0], [7.0, 5.0]
    assert metrics.mase(truth, point, history, 2) == pytest.approx(2 / (7 / 3))
    assert metrics.rmsse(truth, point, history, 2) == pytest.approx(math.sqrt(5 / 7))


def test_a_missing_row_takes_its_pairs_along():
    assert metrics.seasonal_error(np.array([1.0, NAN, 3.0, 7.0]), 1) == 4.0


@pytest.mark.parametrize(
    "history",
    [[5.0] * 9, [0.0] * 9, [0.1 + 0.2, 0.3] * 5, [1.0, 2.0] * 4, [1.0], [], [NAN] * 6, [1.0, NAN, 2.0, NAN]],
    ids=["constant", "zero", "rounding", "exact season", "short", "empty", "missing", "no neighbours"],
)
def test_a_history_without_an_error_has_no_scale(history):
    season = 2 if history == [1.0, 2.0] * 4 else 1
    assert np.isnan(metrics.seasonal_error(np.array(history), season))
    assert math.isnan(metrics.mase([1.0], [2.0], history, season))


def test_each_series_has_its_own_scale():
    history = np.array([[0.0, 5.0, NAN], [2.0, 5.0, NAN], [3.0, 5.0, 1.0]])
    np.testing.assert_array_equal(metrics.seasonal_error(history, 1), [1.5, NAN, NAN])


def test_quantile_scores_by_hand():
    truth, quantiles = np.array([10.0, NAN]), np.array([[8.0, 11.0, 13.0], [0.0, 0.0, 0.0]])
    loss = [2 * 0.1 * 2, 2 * 0.5 * 1, 2 * 0.1 * 3]
    np.testing.assert_allclose(metrics.pinball_loss(truth, quantiles, LEVELS)[0], loss)
    assert metrics.quantile_loss(truth, quantiles, LEVELS) == pytest.approx(sum(loss) / 3)
    assert metrics.weighted_quantile_loss(truth, quantiles, LEVELS) == pytest.approx(sum(loss) / 3 / 10)
    crps = metrics.crps_from_quantiles(truth, quantiles, LEVELS)
    assert crps[0] == pytest.approx(0.3 * loss[0] + 0.4 * loss[1] + 0.3 * loss[2])
    assert np.isnan(crps[1])


def test_the_interval_score_by_hand():
    truth = np.array([5.0, 1.0, 12.0, NAN])
    score = metrics.interval_score(truth, np.full(4, 2.0), np.full(4, 10.0), (0.1, 0.9))
    np.testing.assert_allclose(score, [8.0, 8.0 + 10 * 1.0, 8.0 + 10 * 2.0, NAN])


def test_coverage_counts_the_ends_and_leaves_the_missing_out():
    assert metrics.coverage([1.0, 2.0, 3.0, NAN], [1.0] * 4, [2.0] * 4) == pytest.approx(2 / 3)
    assert math.isnan(metrics.coverage([NAN], [0.0], [1.0]))


def test_the_pit_histogram_by_hand():
    quantiles = np.tile([1.0, 2.0, 3.0], (5, 1))
    truth = np.array([0.0, 1.5, 2.5, 2.6, NAN])
    np.testing.assert_allclose(metrics.pit_histogram(truth, quantiles, LEVELS), [1, 1, 2, 0])
    np.testing.assert_allclose(metrics.pit_widths(LEVELS), [0.1, 0.4, 0.4, 0.1])


def test_a_truth_without_spread_is_divided_as_calibration_would():
    flat = metrics.pit_histogram(np.array([4.0]), np.full((1, 3), 4.0), LEVELS)
    np.testing.assert_allclose(flat, metrics.pit_widths(LEVELS))
    on_one = metrics.pit_histogram(np.array([2.0]), np.array([[1.0, 2.0, 3.0]]), LEVELS)
    np.testing.assert_allclose(on_one, [0, 0.5, 0.5, 0])


def test_a_calibrated_forecast_fills_the_bins_evenly():
    truth = np.random.default_rng(0).normal(size=20_000)
    quantiles = np.broadcast_to(norm.ppf(LEVELS), (len(truth), 3))
    share = metrics.pit_histogram(truth, quantiles, LEVELS) / len(truth)
    np.testing.assert_allclose(share, metrics.pit_widths(LEVELS), atol=0.01)


@given(
    samples=st.lists(st.floats(-100, 100), min_size=2, max_size=12),
    truth=st.floats(-100, 100),
    fair=st.booleans(),
)
def test_the_crps_of_samples_is_its_definition(samples, truth, fair):
    x = np.array(samples)
    pairs = np.abs(x[:, None] - x[None, :]).sum() / (len(x) * (len(x) - 1) if fair else len(x) ** 2)
    expected = np.abs(x - truth).mean() - pairs / 2
    actual = metrics.crps_from_samples(np.array(truth), x, fair=fair)
    assert float(actual) == pytest.approx(expected, abs=1e-9)


def test_the_crps_of_samples_is_the_integral_over_thresholds():
    samples, truth = np.array([0.3, 1.0, 4.0, 4.5]), 2.2
    grid = np.linspace(-1, 6, 700_001)
    distribution = (samples[:, None] <= grid).mean(axis=0)
    integral = np.square(distribution - (truth <= grid)).mean() * 7
    assert float(metrics.crps_from_samples(np.array(truth), samples)) == pytest.approx(integral, abs=1e-4)


def test_a_forecast_of_nan_is_not_left_out():
    truth, point = np.array([1.0, 2.0]), np.array([1.0, NAN])
    quantiles = np.array([[0.0, 1.0, 2.0], [NAN, NAN, NAN]])
    for score in (metrics.mse, metrics.mae, metrics.rmse, metrics.smape):
        assert math.isnan(score(truth, point))
    assert math.isnan(metrics.coverage(truth, quantiles[:, 0], quantiles[:, 2]))
    assert math.isnan(metrics.quantile_loss(truth, quantiles, LEVELS))
    assert math.isnan(metrics.weighted_quantile_loss(truth, quantiles, LEVELS))
    assert np.isnan(metrics.pit_histogram(truth, quantiles, LEVELS)).all()


def test_the_crps_of_a_normal_by_samples_and_by_quantiles():
    z = 0.7
    exact = z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / math.sqrt(math.pi)
    levels = (np.arange(500) + 0.5) / 500
    assert float(metrics.crps_from_quantiles(np.array(z), norm.ppf(levels), levels)) == pytest.approx(exact, abs=1e-3)
    assert float(metrics.crps_from_samples(np.array(z), norm.ppf(levels))) == pytest.approx(exact, abs=1e-3)


def test_the_fair_crps_needs_pairs():
    with pytest.raises(ValueError, match="two samples"):
        metrics.crps_from_samples(np.array(0.0), np.array([1.0]), fair=True)


def test_the_weights_of_levels():
    np.testing.assert_allclose(metrics.level_weights(LEVELS), [0.3, 0.4, 0.3])
    np.testing.assert_allclose(metrics.level_weights([0.5]), [1.0])


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(3)
    truth = rng.normal(5, 2, size=40)
    quantiles = np.sort(rng.normal(5, 2, size=(40, 3)), axis=-1)
    return truth, quantiles, rng.normal(5, 2, size=60)


def test_scikit_learn_agrees(example):
    from sklearn.metrics import mean_absolute_error, mean_pinball_loss, mean_squared_error

    truth, quantiles, _ = example
    assert metrics.mse(truth, quantiles[:, 1]) == pytest.approx(mean_squared_error(truth, quantiles[:, 1]))
    assert metrics.mae(truth, quantiles[:, 1]) == pytest.approx(mean_absolute_error(truth, quantiles[:, 1]))
    theirs = [mean_pinball_loss(truth, quantiles[:, k], alpha=level) for k, level in enumerate(LEVELS)]
    assert metrics.quantile_loss(truth, quantiles, LEVELS) == pytest.approx(2 * np.mean(theirs))


def test_gluonts_agrees(example):
    from gluonts.ev.metrics import MAE, MASE, MSIS, SMAPE, MeanWeightedSumQuantileLoss

    truth, quantiles, history = example
    season = 4
    data = {
        "label": np.ma.masked_invalid(truth[None]),
        "seasonal_error": metrics.seasonal_error(history, season)[None],
        **{str(level): quantiles[None, :, k] for k, level in enumerate(LEVELS)},
        "0.05": quantiles[None, :, 0],
        "0.95": quantiles[None, :, 2],
    }

    def theirs(metric):
        evaluator = metric()
        evaluator.update(data)
        return evaluator.get()

    point = quantiles[:, 1]
    assert metrics.mae(truth, point) == pytest.approx(theirs(MAE(forecast_type="0.5")))
    assert metrics.smape(truth, point) == pytest.approx(theirs(SMAPE(forecast_type="0.5")))
    assert metrics.mase(truth, point, history, season) == pytest.approx(theirs(MASE(forecast_type="0.5")))
    weighted = theirs(MeanWeightedSumQuantileLoss(quantile_levels=list(LEVELS)))
    assert metrics.weighted_quantile_loss(truth, quantiles, LEVELS) == pytest.approx(weighted)
    interval = metrics.interval_score(truth, quantiles[:, 0], quantiles[:, 2], (0.025, 0.975))
    scaled = interval.mean() / metrics.seasonal_error(history, season)
    # GluonTS's MSIS(alpha=0.05) reads the quantiles 0.025 and 0.975.
    data |= {"0.025": quantiles[None, :, 0], "0.975": quantiles[None, :, 2]}
    assert scaled == pytest.approx(theirs(MSIS(alpha=0.05)))


def test_utilsforecast_agrees(example):
    losses = pytest.importorskip("utilsforecast.losses")
    import pandas as pd

    truth, quantiles, history = example
    frame = pd.DataFrame(
        {"unique_id": "a", "y": truth, "m": quantiles[:, 1], "m-lo-80": quantiles[:, 0], "m-hi-80": quantiles[:, 2]}
    )
    train = pd.DataFrame({"unique_id": "a", "y": history})

    def theirs(function, **options):
        return function(frame, models=["m"], **options)["m"].item()

    point = quantiles[:, 1]
    assert metrics.rmse(truth, point) == pytest.approx(theirs(losses.rmse))
    assert metrics.smape(truth, point) == pytest.approx(2 * theirs(losses.smape))  # theirs lacks the factor 2
    scaled = {"seasonality": 4, "train_df": train}
    assert metrics.mase(truth, point, history, 4) == pytest.approx(theirs(losses.mase, **scaled))
    assert metrics.rmsse(truth, point, history, 4) == pytest.approx(theirs(losses.rmsse, **scaled))
    assert metrics.coverage(truth, quantiles[:, 0], quantiles[:, 2]) == theirs(losses.coverage, level=80)
    winkler = metrics.interval_score(truth, quantiles[:, 0], quantiles[:, 2], (0.1, 0.9)).mean()
    assert winkler == pytest.approx(theirs(losses.winkler_score, level=80))
