"""Calibration: the conformal quantile by hand, coverage on new data, no crossing, and the adaptive promise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trellis_ts.conformal import BANDS, AdaptiveConformal, Calibration, apply, calibrate
from trellis_ts.datasets.splits import Scaler
from trellis_ts.datasets.windows import ScaledPanel, WindowDataset
from trellis_ts.distributions import PredictiveDistribution
from trellis_ts.errors import ConfigError
from trellis_ts.types import Columns, Forecast, Panel, Series

LEVELS = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
SCORES = torch.special.ndtri(torch.tensor(LEVELS, dtype=torch.float64)).float()
CPU = torch.device("cpu")


def windows_of(values, *, horizon=4, context=2):
    """Every window of one series of channels, unscaled."""
    values = np.asarray(values, dtype=float).reshape(len(values), -1)
    channels = values.shape[1]
    time = np.datetime64("2024-01-01", "ns") + np.arange(len(values)) * np.timedelta64(1, "D")
    names = tuple(f"c{index}" for index in range(channels))
    panel = Panel((Series("", time, values),), Columns("date", None, names), "D")
    scaled = ScaledPanel(panel, Scaler(("",), np.zeros((1, channels)), np.ones((1, channels))), 7)
    return WindowDataset(scaled, [(0, len(values))], context_length=context, prediction_length=horizon, min_context=1)


def normal_model(spread, *, horizon=4, kind="quantile"):
    """Forecasts normal quantiles around 0 of a standard deviation of its own choice, whatever it reads."""

    def model(batch):
        point = torch.zeros(len(batch.context), horizon, batch.context.shape[2])
        if kind == "point":
            return Forecast(point)
        if kind == "distribution":
            distribution = PredictiveDistribution("normal", (point, torch.full_like(point, spread)))
            return Forecast(point, distribution=distribution)
        return Forecast(point, point[..., None] + spread * SCORES, LEVELS)

    return model


def noise(rows, seed=0, channels=1):
    return np.random.default_rng(seed).normal(size=(rows, channels))


def quantile_of(band):
    """The upper edge the model gives: its levels leave out that of the 90 % band, which is interpolated."""
    forecast = normal_model(1.0, horizon=1)(windows_of(noise(3), horizon=1).__getitems__([0]))
    return float(forecast.quantile((1 + band) / 2))


def test_the_offset_is_the_right_order_statistic():
    """One step: the scores are |y| minus the edge, one per row; the 80 % offset is the ceil(0.8 (n + 1))-th of them."""
    values = noise(152)
    calibration = calibrate(normal_model(1.0, horizon=1), windows_of(values, horizon=1), device=CPU)
    scores = np.sort(np.abs(values[2:, 0]))
    assert len(scores) == calibration.num_windows == 150
    assert calibration.bands == BANDS
    for band, (offset,) in zip(BANDS, calibration.offsets, strict=True):
        rank = math.ceil(band * 151)
        expected = scores[rank - 1] - quantile_of(band)
        # 150 windows of one step do not overlap: bands are narrowed by 150 of 170 parts.
        assert offset == pytest.approx(expected if expected > 0 else expected * 150 / 170, abs=1e-5)


@pytest.mark.parametrize("kind", ["quantile", "distribution", "point"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 2.5])
def test_wrong_bands_come_to_cover_what_they_say(kind, spread):
    calibration = calibrate(normal_model(spread, kind=kind), windows_of(noise(3000)), device=CPU)
    fresh = windows_of(noise(6000, seed=1))
    batch = fresh.__getitems__(list(range(len(fresh))))
    forecast = apply(calibration, normal_model(spread, kind=kind)(batch))
    assert torch.equal(forecast.point, torch.zeros_like(forecast.point))
    for band in BANDS:
        lower, upper = forecast.quantile((1 - band) / 2), forecast.quantile((1 + band) / 2)
        covered = float(((lower <= batch.future) & (batch.future <= upper)).double().mean())
        # Four standard errors of a share from 3000 calibration rows and 6000 fresh ones.
        assert abs(covered - band) < 4 * math.sqrt(band * (1 - band) * (1 / 3000 + 1 / 6000))


def test_steps_have_offsets_of_their_own_where_there_are_enough():
    """Later steps are noisier: each gets its own offset; of a few windows all steps share one."""

    class Growing:
        """A window set whose future at step h has standard deviation h + 1."""

        def __init__(self, windows):
            self.windows, self.panel, self.prediction_length = windows, windows.panel, windows.prediction_length

        def __len__(self):
            return len(self.windows)

        def locate(self, indices):
            return self.windows.locate(indices)

        def __getitems__(self, indices):
            batch = self.windows.__getitems__(indices)
            return batch._replace(future=batch.future * torch.arange(1.0, 5.0)[:, None])

    many = calibrate(normal_model(1.0), Growing(windows_of(noise(3000))), device=CPU)
    assert many.pooled_steps == 1
    edge = float(SCORES[5])
    np.testing.assert_allclose(many.offsets[1], edge * np.arange(4), atol=0.25)
    few = calibrate(normal_model(1.0), Growing(windows_of(noise(30))), device=CPU)
    assert few.pooled_steps == 4
    assert len(set(few.offsets[1])) == 1
    assert few.num_independent == 7


def test_bands_too_wide_for_the_scores_are_left_out():
    """13 windows of one step: the 90 % band needs 9 scores, the 95 % band 19."""
    calibration = calibrate(normal_model(1.0, horizon=1), windows_of(noise(15), horizon=1), device=CPU)
    assert calibration.bands == (0.5, 0.8, 0.9)
    assert len(calibration.offsets) == 3


def test_missing_futures_do_not_count_and_none_at_all_gives_none():
    values = noise(400)
    holes = values.copy()
    holes[np.random.default_rng(5).random(400) < 0.3] = np.nan
    calibration = calibrate(normal_model(0.2, horizon=1), windows_of(holes, horizon=1), device=CPU)
    seen = np.sort(np.abs(holes[2:, 0][~np.isnan(holes[2:, 0])]))
    rank = math.ceil(0.5 * (len(seen) + 1))
    assert calibration.offsets[0][0] == pytest.approx(seen[rank - 1] - 0.2 * 0.67449, abs=1e-4)
    assert calibration.offsets[0][0] > 0
    assert calibrate(normal_model(1.0), windows_of(np.full((20, 1), np.nan)), device=CPU) is None


def test_a_quantile_that_is_not_the_median_has_no_band():
    def model(batch):
        point = torch.zeros(len(batch.context), 4, 1)
        return Forecast(point, point[..., None], (0.9,))

    assert calibrate(model, windows_of(noise(100)), device=CPU) is None


def made(offsets, bands=BANDS, horizon=2):
    return Calibration(tuple(bands), tuple((each,) * horizon for each in offsets), ((0.5,),) * horizon, 100, 50, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    st.lists(st.floats(0, 3), min_size=6, max_size=6),
    st.lists(st.floats(0.001, 0.999), min_size=2, max_size=6, unique=True),
)
def test_quantiles_never_cross(offsets, steps, wanted):
    values = torch.cat((torch.zeros(1), torch.tensor(steps).cumsum(0))) - 3
    quantiles = values.expand(1, 2, 1, 7).contiguous()
    forecast = apply(made(offsets), Forecast(quantiles[..., 3], quantiles, LEVELS))
    assert torch.equal(forecast.quantile(0.5), quantiles[..., 3])
    for levels in (LEVELS, wanted):
        assert (forecast.at_levels(levels).quantiles.diff(dim=-1) >= -1e-5).all()


def test_offsets_between_bands_are_interpolated():
    quantiles = SCORES.expand(1, 2, 1, 7).contiguous()
    plain = Forecast(quantiles[..., 3], quantiles, LEVELS)
    forecast = apply(made([0.1, 0.2, 0.3, 0.4]), plain)

    def moved(level):
        return float((forecast.quantile(level) - plain.quantile(level))[0, 0, 0])

    assert [moved(level) for level in (0.75, 0.9, 0.975)] == pytest.approx([0.1, 0.2, 0.4], abs=1e-5)
    assert [moved(level) for level in (0.25, 0.1, 0.025)] == pytest.approx([-0.1, -0.2, -0.4], abs=1e-5)
    assert 0.1 < moved(0.85) < 0.2
    assert moved(0.5) == 0.0
    assert moved(0.995) > moved(0.98) > 0.4  # the normal tail of the calibrated levels goes on


def test_steps_beyond_the_calibrated_ones_take_the_last():
    quantiles = SCORES.expand(1, 5, 1, 7).contiguous()
    calibration = replace(made([0.0] * 4), offsets=((0.0, 1.0),) * 4)
    forecast = apply(calibration, Forecast(quantiles[..., 3], quantiles, LEVELS))
    widened = (forecast.quantiles[..., -1] - quantiles[..., -1])[0, :, 0]
    assert widened.tolist() == pytest.approx([0.0, 1.0, 1.0, 1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bands": (0.8, 0.5, 0.9, 0.95)}, "must rise"),
        ({"bands": (0.5, 0.8, 0.9, 1.0)}, "between 0 and 1"),
        ({"bands": (0.5,)}, "one offset per band"),
        ({"offsets": ((0.1,),) * 4}, "one offset per band and step"),
        ({"offsets": ((0.1, math.inf),) * 4}, "no number"),
        ({"offsets": ((0.1, math.nan),) * 4}, "no number"),
        ({"correlations": ((0.1, 0.2), (0.1, 0.2))}, "1 correlations"),
        ({"correlations": ((0.1,), (1.5,))}, "from -1 to 1"),
        ({"correlations": ((0.1,), (math.nan,))}, "from -1 to 1"),
    ],
)
def test_a_forged_calibration_is_refused(change, complaint):
    with pytest.raises(ConfigError, match=complaint):
        replace(made([0.1] * 4), **change)


class TestAdaptive:
    """The promise holds for any sequence; the bands follow a change."""

    @staticmethod
    def run(actual, *, spread, band=0.8, rate=0.05):
        """The share of misses and the adaptive object after one value at a time."""
        point = torch.zeros(1, 1, 1)
        forecast = Forecast(point, point[..., None] + spread * SCORES, LEVELS)
        adaptive = AdaptiveConformal([band], rate=rate)
        missed = []
        for value in actual:
            lower, upper = adaptive.band(forecast, band)
            is_empty = bool((adaptive.alpha(band) >= 1).all())
            missed.append(is_empty or not float(lower) <= value <= float(upper))
            adaptive.update(torch.tensor(value, dtype=torch.float64).view(1, 1, 1), forecast)
        return np.array(missed), adaptive

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.sampled_from([0.0, 0.5, -3.0, 1e9]), min_size=50, max_size=150), st.sampled_from([0.2, 0.5]))
    def test_the_share_of_misses_is_bounded_whatever_happens(self, actual, rate):
        missed, _ = self.run(actual, spread=1.0, rate=rate)
        assert abs(missed.mean() - 0.2) <= (0.8 + rate) / (rate * len(actual)) + 1e-9

    @pytest.mark.parametrize("spread", [0.2, 5.0])
    def test_bands_too_narrow_or_too_wide_are_put_right(self, spread):
        missed, _ = self.run(noise(3000)[:, 0], spread=spread)
        assert abs(missed[500:].mean() - 0.2) < 0.02

    def test_a_change_is_followed(self):
        calm, wild = noise(1500)[:, 0], 4 * noise(1500, seed=1)[:, 0]
        missed, _ = self.run(np.concatenate((calm, wild)), spread=1.0)
        assert missed[1500:1520].mean() > 0.4
        assert abs(missed[1700:].mean() - 0.2) < 0.03

    def test_missing_values_teach_nothing_and_each_element_has_its_own_level(self):
        point = torch.zeros(2, 3, 1)
        forecast = Forecast(point, point[..., None] + SCORES, LEVELS)
        adaptive = AdaptiveConformal([0.8, 0.5], rate=0.1)
        actual = torch.zeros(2, 3, 1)
        actual[0, 1], actual[1, 2] = 100.0, math.nan
        adaptive.update(actual, forecast)
        alpha = adaptive.alpha(0.8)
        assert float(alpha[0, 1]) == pytest.approx(0.2 - 0.08)
        assert float(alpha[0, 0]) == pytest.approx(0.2 + 0.02)
        assert float(alpha[1, 2]) == pytest.approx(0.2)

    @pytest.mark.parametrize(
        ("bands", "rate", "complaint"), [((), 0.1, "bands"), ((1.0,), 0.1, "bands"), ((0.8,), 0.0, "rate")]
    )
    def test_what_makes_no_sense_is_refused(self, bands, rate, complaint):
        with pytest.raises(ConfigError, match=complaint):
            AdaptiveConformal(bands, rate=rate)

    def test_other_shapes_and_bands_are_refused(self):
        point = torch.zeros(2, 3, 1)
        forecast = Forecast(point, point[..., None] + SCORES, LEVELS)
        adaptive = AdaptiveConformal([0.8])
        with pytest.raises(ConfigError, match=r"\[2, 2, 1\] do not fit the forecast \[2, 3, 1\]"):
            adaptive.update(torch.zeros(2, 2, 1), forecast)
        adaptive.update(point, forecast)
        with pytest.raises(ConfigError, match="those before"):
            adaptive.update(point[:1], forecast.map(lambda each: each[:1]))
        with pytest.raises(ConfigError, match=r"band 0\.9 is not among"):
            adaptive.band(forecast, 0.9)
