"""Bands that adapt from origin to origin: the rule, what it promises, and that nothing is learnt too early."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import trellis_ts.evaluation as module
from trellis_ts.adaptive import AdaptiveForecasts, AdaptiveWidths
from trellis_ts.datasets.splits import Scaler
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.errors import ConfigError
from trellis_ts.evaluation import backtest
from trellis_ts.forecaster import Forecaster
from trellis_ts.types import Forecast

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
HORIZON = 5


def forecast_of(edges: list[float], batch: int = 1, horizon: int = HORIZON) -> Forecast:
    quantiles = torch.tensor(edges, dtype=torch.float64).expand(batch, horizon, 1, len(edges))
    return Forecast(quantiles[..., len(edges) // 2], quantiles, LEVELS)


def test_factors_move_edges_from_the_median_and_nothing_else():
    widths = AdaptiveWidths(LEVELS)
    assert widths.bands == (0.5, 0.8, 0.9)
    forecast = forecast_of([-3.0, -2, -1, 0.5, 2, 3, 4])
    torch.testing.assert_close(widths.apply(forecast).quantiles, forecast.quantiles)
    widths.learn(np.array([0.5, 1.0, 0.1]))  # right, all outside, right
    factor = float(np.exp(0.5 * (1.0 - 0.2)))
    assert widths.factors == pytest.approx({0.5: 1.0, 0.8: factor, 0.9: 1.0})
    found = widths.apply(forecast)
    expected = [0.5 - factor * 2.5, 0.5 - factor * 2.5, -1, 0.5, 2, 0.5 + factor * 2.5, max(4, 0.5 + factor * 2.5)]
    expected[0] = min(-3.0, expected[1])
    torch.testing.assert_close(found.quantiles[0, 0, 0], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(found.point, forecast.point)
    torch.testing.assert_close(found.quantile(0.9), found.quantiles[..., 5])


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_misses_come_to_what_was_promised(size):
    """Errors of another size than the bands were made for: the share of misses stays within the bound."""
    rng, widths = np.random.default_rng(0), AdaptiveWidths(LEVELS)
    score = torch.special.ndtri(torch.tensor(LEVELS, dtype=torch.float64)).tolist()
    forecast, missed = forecast_of(score), []
    for _ in range(200):
        truth = size * rng.normal(size=(1, HORIZON, 1))
        missed.append(widths.missed(widths.apply(forecast), truth).mean(axis=(0, 1, 2)))
        widths.learn(missed[-1])
    share = np.mean(missed, axis=0)
    bound = np.abs(np.log(list(widths.factors.values()))) / (0.5 * 200)
    assert (np.abs(share - (1 - np.array(widths.bands))) <= bound + 1e-12).all()
    assert bound.max() < 0.03


def test_a_band_without_width_keeps_a_finite_factor():
    widths = AdaptiveWidths(LEVELS)
    for _ in range(5000):
        widths.learn(np.ones(3))
    assert all(factor == pytest.approx(100.0) for factor in widths.factors.values())


@pytest.mark.parametrize("levels", [(), (0.5,), (0.1, 0.5, 0.8)])
def test_levels_without_a_band_are_refused(levels):
    with pytest.raises(ConfigError, match="hold no band to adapt"):
        AdaptiveWidths(levels)


@pytest.mark.parametrize("step", [1, 2, 5, 7])
def test_every_value_counts_once_and_not_before_it_is_known(make_panel, step):
    """Against the rule written out value by value."""
    panel = make_panel((60, 60), missing=0.1)
    scaled = ScaledPanel(panel, Scaler.fit(panel, [(0, 30)] * 2), 7)
    edges = [-1.5, -1.0, -0.5, 0, 0.5, 1.0, 1.5]
    adaptive = AdaptiveForecasts(lambda series, _: forecast_of(edges, len(series)), panel, scaled, LEVELS, step=step)
    both = np.arange(2)
    rows = scaled.gather(both, np.full(2, 60), 60, 0)
    values = torch.where(rows.observed, rows.context, torch.nan)[..., 0].numpy()
    made: list[tuple[int, dict[float, float]]] = []
    for origin in range(30, 55, step):
        adaptive(both, np.full(2, origin))
        made.append((origin, adaptive.widths.factors))
        log_factors = np.zeros(3)
        for earlier, factors in made[:-1]:
            for row in range(earlier, min(earlier + HORIZON, origin)):
                for value in values[~np.isnan(values[:, row]), row]:
                    for place, (band, factor) in enumerate(factors.items()):
                        edge = {0.5: 0.5, 0.8: max(1.0 * factors[0.8], 0.5 * factors[0.5])}.get(band)
                        if edge is None:
                            edge = max(1.5 * factor, 1.0 * factors[0.8], 0.5 * factors[0.5])
                        elif band == 0.5:
                            edge *= factor
                        missed = float(abs(value) > edge)
                        weight = 0.5 * min(1, step / HORIZON) / (2 * HORIZON)
                        log_factors[place] += weight * (missed - (1 - band))
        np.testing.assert_allclose(np.log(list(adaptive.widths.factors.values())), log_factors, atol=1e-9)
    assert np.abs(log_factors).max() > 0.01


@pytest.fixture(scope="module")
def panel(make_panel):
    return make_panel((60, 55), channels=2, missing=0.1)


@pytest.fixture(scope="module")
def forecaster(make_checkpoint, panel):
    return Forecaster(make_checkpoint(panel, known=24, prediction_length=HORIZON, context_length=12))


def quantiles_by_stamp(forecaster, panel, **options):
    """What the model forecast, standardised, per series and origin stamp."""
    made = {}

    class Recording(module.ScoreSums):
        def add(self, windows, forecast):
            for row, key in enumerate(zip(windows.series.tolist(), windows.origin.tolist(), strict=True)):
                made.setdefault(key, forecast.quantiles[row].numpy().copy())
            super().add(windows, forecast)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ScoreSums", Recording)
        backtest(forecaster, panel, adaptive=True, baselines=(), **options)
    return made


@pytest.mark.parametrize("step", [1, 3, HORIZON])
@pytest.mark.parametrize("value", [np.nan, 1e9])
def test_no_band_sees_what_comes_after_its_origin(forecaster, panel, step, value):
    """Values of one series poisoned from a row on: no forecast up to that stamp changes, of any series."""
    row = 40
    values = panel.series[0].values.copy()
    values[row:] = value
    changed = replace(panel, series=(replace(panel.series[0], values=values), panel.series[1]))
    clean, poisoned = (quantiles_by_stamp(forecaster, each, step=step) for each in (panel, changed))
    stamps = module.RollingOrigins(
        panel, forecaster.checkpoint.model.shape, forecaster.checkpoint.data, step=step
    ).stamps
    until = np.searchsorted(stamps, panel.series[0].time[row], side="right")
    early = [key for key in clean if key[1] < until]
    assert len(early) > 4
    for key in early:
        np.testing.assert_array_equal(clean[key], poisoned[key])
    assert any((clean[key] != poisoned[key]).any() for key in clean if key[0] == 1), "series learn from each other"


def test_first_origin_is_as_calibrated_and_points_never_change(forecaster, panel):
    static, adaptive = backtest(forecaster, panel), backtest(forecaster, panel, adaptive=True)
    assert adaptive.model.mae == pytest.approx(static.model.mae, rel=1e-6)
    assert adaptive.scores["seasonal_naive"].crps == pytest.approx(static.scores["seasonal_naive"].crps, rel=1e-6)
    assert adaptive.calibration["model"].coverage != static.calibration["model"].coverage
    alone = {"max_origins": 1, "step": HORIZON}
    single, same = backtest(forecaster, panel, **alone), backtest(forecaster, panel, adaptive=True, **alone)
    # The second series ends before the first: nothing could be learnt for its only origin.
    assert single.by_series["model"][2].coverage == same.by_series["model"][2].coverage
