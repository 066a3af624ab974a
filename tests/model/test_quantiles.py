"""Quantile curves: exact where they know, monotone between, a normal tail beyond."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trellis_ts.errors import ConfigError
from trellis_ts.quantiles import QuantileCurve, rising
from trellis_ts.types import Forecast

LEVELS = (0.025, 0.1, 0.5, 0.8)


def at(level):
    return torch.tensor(level, dtype=torch.float64)


@pytest.fixture
def curve():
    steps = torch.rand(2, 3, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return QuantileCurve(LEVELS, steps.cumsum(dim=-1))


def test_known_levels_come_back_to_the_bit(curve):
    for dtype in (torch.float32, torch.float64):
        known = curve.map(lambda values, dtype=dtype: values.to(dtype))
        for index, level in enumerate(LEVELS):
            assert torch.equal(known.quantile(at(level)), known.values[..., index])


def test_a_normal_distribution_is_read_exactly_everywhere():
    normal = scipy.stats.norm(3.0, 2.0)
    curve = QuantileCurve(LEVELS, torch.tensor(normal.ppf(LEVELS))[None])
    levels = np.array([0.0001, 0.01, 0.3, 0.65, 0.99, 0.9999])
    found = curve.quantile(torch.tensor(levels)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(found, normal.ppf(levels), rtol=1e-9)
    np.testing.assert_allclose(curve.map(lambda v: v.expand(6, 4)).cdf(torch.tensor(found)), levels, rtol=1e-7)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.001, 0.999), min_size=2, max_size=20))
def test_more_is_never_less(levels):
    curve = QuantileCurve((0.1, 0.3, 0.5), torch.tensor([[1.0, 1.0, 4.0], [-2.0, 0.0, 1e6]], dtype=torch.float64))
    found = curve.quantile(torch.tensor(sorted(levels), dtype=torch.float64)[:, None])
    assert (found.diff(dim=0) >= -1e-9).all()


def test_each_element_may_have_a_level_of_its_own(curve):
    levels = torch.rand(5, 2, 3, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = curve.quantile(levels)
    assert found.shape == levels.shape
    for index in ((0, 0, 0, 0), (4, 1, 2, 0), (2, 0, 1, 0)):
        alone = QuantileCurve(LEVELS, curve.values[index[1:]])
        assert float(found[index]) == pytest.approx(float(alone.quantile(levels[index])), rel=1e-12)


def test_the_cdf_undoes_the_quantile(curve):
    for level in (0.01, 0.07, 0.5, 0.79, 0.97):
        torch.testing.assert_close(curve.cdf(curve.quantile(at(level))), at(level).expand(2, 3, 1))


def test_moving_and_scaling_moves_and_scales(curve):
    loc, scale = torch.tensor([[[5.0]], [[-1.0]]], dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    for level in (0.01, 0.1, 0.6):
        expected = curve.quantile(at(level)) * scale + loc
        torch.testing.assert_close(curve.affine(loc, scale).quantile(at(level)), expected)


def test_counts_are_whole_and_not_negative():
    curve = QuantileCurve((0.1, 0.9), torch.tensor([[-0.5, 2.2], [1.9999999, 5.0000001]]), is_count=True)
    assert curve.quantile(at(0.1)).tolist() == [0.0, 2.0]
    assert not curve.quantile(at(0.1)).signbit().any()
    assert curve.quantile(at(0.9)).tolist() == [3.0, 5.0]


def test_crossings_are_undone_outwards():
    crossed = torch.tensor([[1.0, 2.0, 1.5, 1.2, 3.0]])
    assert rising(crossed, 2).tolist() == [[1.0, 1.5, 1.5, 1.5, 3.0]]
    assert rising(torch.tensor([[3.0, 2.0, 1.0]]), 1).tolist() == [[2.0, 2.0, 2.0]]


def test_one_level_tells_nothing_of_others():
    with pytest.raises(ValueError, match="two or more"):
        QuantileCurve((0.5,), torch.zeros(1, 1))


class TestForecast:
    """``Forecast.quantile`` over what a forecast may hold."""

    def test_any_level_of_a_quantile_forecast(self):
        quantiles = torch.tensor([[[[1.0, 2.0, 4.0]]]])
        forecast = Forecast(quantiles[..., 1], quantiles, (0.1, 0.5, 0.9))
        assert float(forecast.quantile(0.9)) == 4.0
        assert 2.0 < float(forecast.quantile(0.7)) < 4.0 < float(forecast.quantile(0.95))
        assert forecast.at_levels([0.9, 0.2, 0.9]).quantile_levels == (0.2, 0.9)

    @pytest.mark.parametrize("level", [0.0, 1.0, -0.1, float("nan")])
    def test_a_level_outside_is_refused(self, level):
        with pytest.raises(ConfigError, match="must lie between 0 and 1"):
            Forecast(torch.zeros(1, 1, 1)).quantile(level)

    @pytest.mark.parametrize(
        ("forecast", "known"),
        [
            (Forecast(torch.zeros(1, 1, 1)), "points only"),
            (Forecast(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 1), (0.5,)), "the level 0.5 only"),
        ],
    )
    def test_a_forecast_that_does_not_tell_says_so(self, forecast, known):
        with pytest.raises(ConfigError, match=known):
            forecast.quantile(0.9)

    def test_joining_and_cutting(self):
        quantiles = torch.arange(12.0).view(2, 3, 1, 2)
        curve = QuantileCurve((0.1, 0.9), quantiles)
        whole = Forecast(quantiles[..., 0], quantiles, (0.1, 0.9), curve)
        halves = [whole.map(lambda each, row=row: each[row : row + 1]) for row in range(2)]
        joined = Forecast.joined(halves, dim=0)
        assert torch.equal(joined.point, whole.point)
        assert torch.equal(joined.quantiles, quantiles)
        assert torch.equal(joined.distribution.values, quantiles)
