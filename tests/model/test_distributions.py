"""Distributions as forecasts: scipy's numbers, in the units of the data, and safe whatever the network says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from trellis_ts.config import WindowShape
from trellis_ts.distributions import FAMILIES, NUM_PARAMETERS, PredictiveDistribution, shape_distribution
from trellis_ts.losses import forecast_loss
from trellis_ts.model import ForecastModel

LEVELS = np.array([1e-4, 0.01, 0.05, 0.3, 0.5, 0.8, 0.975, 0.9999])


def tensors(*numbers):
    return tuple(torch.tensor(each, dtype=torch.float64) for each in numbers)


def frozen(family, index):
    """scipy's distribution of one element, in the order of the parameters below."""
    if family == "normal":
        return scipy.stats.norm([-1.0, 5.0, 0.0][index], [0.5, 2.0, 1e-3][index])
    if family == "student_t":
        return scipy.stats.t([2.01, 4.5, 200.0][index], [-1.0, 5.0, 0.0][index], [0.5, 2.0, 1e-3][index])
    mean, dispersion = [0.3, 12.0, 40000.0][index], [2.0, 0.4, 1e-4][index]
    return scipy.stats.nbinom(1 / dispersion, 1 / (1 + mean * dispersion))


DISTRIBUTIONS = {
    "normal": tensors([-1.0, 5.0, 0.0], [0.5, 2.0, 1e-3]),
    "student_t": tensors([-1.0, 5.0, 0.0], [0.5, 2.0, 1e-3], [2.01, 4.5, 200.0]),
    "negative_binomial": tensors([0.0] * 3, [1.0] * 3, [0.3, 12.0, 40000.0], [2.0, 0.4, 1e-4]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_quantiles_and_probabilities_are_scipys(family):
    distribution = PredictiveDistribution(family, DISTRIBUTIONS[family])
    found = distribution.quantile(torch.tensor(LEVELS)[:, None])
    for index in range(3):
        expected = frozen(family, index)
        np.testing.assert_allclose(found[:, index], expected.ppf(LEVELS), rtol=1e-8)
        value = torch.tensor(expected.ppf([0.2, 0.6, 0.99]))
        one = PredictiveDistribution(family, tuple(each[index] for each in distribution.parameters))
        log_prob = expected.logpmf if family == "negative_binomial" else expected.logpdf
        np.testing.assert_allclose(one.log_prob(value), log_prob(value), rtol=1e-6)
        below = expected.cdf(value - 1) if family == "negative_binomial" else expected.cdf(value)
        alone = PredictiveDistribution(family, tuple(each.expand(3) for each in one.parameters))
        np.testing.assert_allclose(alone.cdf(value), (expected.cdf(value) + below) / 2, rtol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_moves_and_scales_with_the_data(family):
    distribution = PredictiveDistribution(family, DISTRIBUTIONS[family])
    loc, scale = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64), torch.tensor([2.0, 0.1, 7.0], dtype=torch.float64)
    moved = distribution.affine(loc, scale)
    level = torch.tensor(0.9, dtype=torch.float64)
    expected = distribution.quantile(level) * scale + loc
    torch.testing.assert_close(moved.quantile(level), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moved.mean, distribution.mean * scale + loc)
    torch.testing.assert_close(moved.cdf(expected), distribution.cdf(distribution.quantile(level)), rtol=1e-6, atol=0)


def test_equal_counts_are_equal_numbers_on_the_scale_of_a_batch():
    """A count's quantile and the data come onto the scale by the same arithmetic, so that ties are ties."""
    counts = np.arange(0.0, 400.0)
    loc, scale = 12.3456789, 7.654321
    on_scale = torch.empty(400).copy_(torch.from_numpy((counts - loc) / scale))
    parameters = (torch.full((400,), loc).double() * 0 + loc, torch.zeros(400).double() + scale)
    mean = torch.full((400,), 100.0)
    distribution = PredictiveDistribution("negative_binomial", (*parameters, mean, torch.ones(400)))
    levels = scipy.stats.nbinom(1.0, 1 / 101).cdf(counts) - 1e-6
    found = distribution.quantile(torch.tensor(levels))
    assert found.dtype == torch.float32
    assert torch.equal(found, on_scale)


def test_in_data_units_counts_are_whole():
    loc, scale = torch.tensor([12.3456789]).double(), torch.tensor([7.654321]).double()
    parameters = (loc, scale, torch.tensor([100.0]), torch.tensor([1.0]))
    distribution = PredictiveDistribution("negative_binomial", parameters).map(torch.Tensor.double).affine(loc, scale)
    assert [float(each) for each in distribution.parameters[:2]] == [0.0, 1.0]
    found = distribution.quantile(torch.tensor(LEVELS)[:, None])
    assert torch.equal(found, found.round())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [0.0, 1.0, -1.0, 80.0, -80.0, 3e4, -3e4])
def test_numbers_are_finite_whatever_the_network_says(family, size):
    location = torch.full((2, 3, 1), size, requires_grad=True)
    raw = torch.full((2, 3, 1, NUM_PARAMETERS[family] - 1), size, requires_grad=True)
    spread = torch.tensor([0.01, 5.0])[:, None, None]
    units = (torch.zeros(2, 1, 1).double(), torch.ones(2, 1, 1).double())
    distribution = shape_distribution(family, location, raw, spread, units)
    future = torch.tensor([0.0, 1.0, 1000.0])[None, :, None].expand(2, 3, 1)
    log_prob = distribution.log_prob(future)
    log_prob.sum().backward()
    for each in (log_prob, location.grad, raw.grad, distribution.mean, *distribution.parameters):
        assert each.isfinite().all()
    if family == "student_t":
        assert (distribution.parameters[2] > 2).all()
    if family != "normal" or size > 0:
        assert (distribution.parameters[-1] > 0).all()


def test_a_counts_mean_is_its_location_far_from_zero_and_positive_below_it():
    location = torch.tensor([100.0, 50.0, -20.0])[:, None, None]
    units = (torch.zeros(3, 1, 1).double(), torch.ones(3, 1, 1).double())
    spread = torch.tensor(4.0).expand(3, 1, 1)
    mean = shape_distribution("negative_binomial", location, torch.zeros(3, 1, 1, 1), spread, units).parameters[2]
    assert mean.flatten()[:2].tolist() == pytest.approx([100.0, 50.0], rel=1e-6)
    assert 0 < float(mean[2]) < 0.01


def build(family, batch, **settings):
    shape = WindowShape(13, 5, 4, 3, 7, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        from trellis_ts.config import ModelConfig

        config = ModelConfig(width=8, num_heads=2, num_slots=3, num_layers=1, feedforward_width=6, **settings)
        return ForecastModel(config, shape, (0.1, 0.5, 0.9), family=family, implementation="reference")


@pytest.fixture
def batch(make_batch):
    made = make_batch(dtype=torch.float32)
    loc, scale = torch.full((4, 1, 3), 20.0).double(), torch.full((4, 1, 3), 4.0).double()
    future = (made.future * 4 + 20).round().clamp(min=0).sub(20).div(4)
    future = torch.where(made.future_observed, future, 0.0)
    return made._replace(future=future, loc=loc, scale=scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_futures_do_not_count(family, batch):
    model = build(family, batch)
    expected = forecast_loss(model(batch), batch.future, batch.future_observed, family)
    poisoned = torch.where(batch.future_observed, batch.future, float("nan"))
    for future in (poisoned, torch.where(batch.future_observed, batch.future, 1e30)):
        loss = forecast_loss(model(batch), future, batch.future_observed, family)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    nothing = torch.zeros_like(batch.future_observed)
    loss = forecast_loss(model(batch), batch.future, nothing, family)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_likelihood_is_learned(family, batch):
    """A few steps of plain descent bring the loss down: gradients reach location and shape."""
    model = build(family, batch, seasonal_cycle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = forecast_loss(model(batch), batch.future, batch.future_observed, family)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("family", ["normal", "student_t"])
def test_shifting_and_scaling_the_context_shifts_and_scales_the_distribution(family, batch):
    """Instance normalisation undone: but for the floor on the variance, which is small beside 3 standard deviations."""
    model = build(family, batch)
    plain = batch._replace(context=batch.context * 3 * batch.observed)
    moved = batch._replace(context=(batch.context * 6 + 5) * batch.observed)
    one, other = model(plain).distribution, model(moved).distribution
    torch.testing.assert_close(other.parameters[0], one.parameters[0] * 2 + 5, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.parameters[1], one.parameters[1] * 2, rtol=1e-3, atol=1e-3)


def test_counts_do_not_depend_on_the_scaler(batch):
    """The same counts under another mean and deviation of the training rows have the same distribution."""
    model = build("negative_binomial", batch)
    count = batch.context * 4 + 20
    other = batch._replace(
        context=(count - 5) / 8 * batch.observed,
        loc=torch.full((4, 1, 3), 5.0).double(),
        scale=torch.full((4, 1, 3), 8.0).double(),
    )
    one, two = model(batch).distribution.parameters, model(other).distribution.parameters
    torch.testing.assert_close(one[2], two[2], rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(one[3], two[3], rtol=2e-3, atol=1e-3)
    point = (model(batch).point - 0) * 4 + 20
    torch.testing.assert_close(point, one[2], rtol=1e-5, atol=1e-4)


def test_counts_without_units_are_refused(batch):
    model = build("negative_binomial", batch)
    with pytest.raises(ValueError, match="loc and scale"):
        model(replace_units(batch))


def replace_units(batch):
    return batch._replace(loc=None, scale=None)


def test_replacing_the_family_replaces_the_numbers():
    one = PredictiveDistribution("student_t", DISTRIBUTIONS["student_t"])
    other = replace(one, family="normal", parameters=one.parameters[:2])
    level = torch.tensor(0.99, dtype=torch.float64)
    assert (one.quantile(level)[:2] > other.quantile(level)[:2]).all()
