"""Scores: those of explicit windows, none of them known to the model."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trellis_ts.evaluation as module
from trellis_ts import metrics, scores
from trellis_ts.errors import ConfigError, DataError
from trellis_ts.evaluation import backtest, evaluate
from trellis_ts.forecaster import Forecaster
from trellis_ts.origins import RollingOrigins, unseen_ranges
from trellis_ts.scored import most_overlapping
from trellis_ts.types import Series

HORIZON, CONTEXT = 5, 12
LEVELS = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def panel(make_panel):
    return make_panel((40, 33), channels=2, missing=0.2)


@pytest.fixture(scope="module")
def forecaster(make_checkpoint, panel):
    return Forecaster(make_checkpoint(panel, known=24, prediction_length=HORIZON, context_length=CONTEXT))


def direct(forecaster, panel, first_origins):
    """Truths, quantiles, seasonal naive and scales of windows cut one by one with numpy: one entry per window.

    Forecasts come through ``Forecaster.forecast``; everything is standardised.
    """
    record = {each.name: each for each in forecaster.checkpoint.data.series}
    windows = []
    for index, (series, first) in enumerate(zip(panel.series, first_origins, strict=True)):
        before = series.values[:first]
        if series.name in record:
            loc, scale = np.array(record[series.name].loc), np.array(record[series.name].scale)
        else:
            loc, scale = np.nanmean(before, axis=0), np.nanstd(before, axis=0)
        seasonal = [np.abs(before[7:] - before[:-7]) ** power for power in (1, 2)]
        for origin in range(first, len(series) - HORIZON + 1):
            past = Series(series.name, series.time[:origin], series.values[:origin])
            truth = (series.values[origin : origin + HORIZON] - loc) / scale
            if series.name in record:
                quantiles = forecaster.forecast(replace(panel, series=(past,))).quantiles[0].numpy()
                quantiles = (quantiles - loc[:, None]) / scale[:, None]
            else:  # hand the scale over by pretending to be a series the model knows
                anchor = record["s0"]
                anchor_loc, anchor_scale = np.array(anchor.loc), np.array(anchor.scale)
                values = (past.values - loc) / scale * anchor_scale + anchor_loc
                pretender = replace(past, name="s0", values=values)
                quantiles = forecaster.forecast(replace(panel, series=(pretender,))).quantiles[0].numpy()
                quantiles = (quantiles - anchor_loc[:, None]) / anchor_scale[:, None]
            naive = np.zeros_like(truth)
            for channel in range(truth.shape[1]):
                history = (series.values[max(0, origin - 70) : origin, channel] - loc[channel]) / scale[channel]
                known_values = history[~np.isnan(history)]
                for step in range(HORIZON):
                    back = history[::-1][6 - step % 7 :: 7]
                    back = back[~np.isnan(back)]
                    naive[step, channel] = back[0] if len(back) else known_values[-1] if len(known_values) else 0.0
            windows.append(
                {
                    "series": index,
                    "truth": truth,
                    "quantiles": quantiles,
                    "naive": naive,
                    "loc": np.broadcast_to(loc, truth.shape),
                    "scale": np.broadcast_to(scale, truth.shape),
                    "seasonal": np.broadcast_to(np.nanmean(seasonal[0], axis=0) / scale, truth.shape),
                    "seasonal_squared": np.broadcast_to(np.nanmean(seasonal[1], axis=0) / scale**2, truth.shape),
                }
            )
    return windows


def expected_scores(windows, chosen=np.s_[:]):
    """All scores by the formulas of ``metrics``, on all steps and channels or those chosen."""
    parts = {
        name: np.concatenate([window[name][chosen].reshape(-1) for window in windows])
        for name in ("truth", "naive", "loc", "scale", "seasonal", "seasonal_squared")
    }
    quantiles = np.concatenate([window["quantiles"][chosen].reshape(-1, 3) for window in windows])
    truth, point, scale, loc = parts["truth"], quantiles[:, 1], parts["scale"], parts["loc"]
    lower, upper = quantiles[:, 0], quantiles[:, 2]
    original = truth * scale + loc
    return {
        "mse": metrics.mse(truth, point),
        "mae": metrics.mae(truth, point),
        "rmse_original": metrics.rmse(truth * scale, point * scale),
        "mae_original": metrics.mae(truth * scale, point * scale),
        "smape": metrics.smape(original, point * scale + loc),
        "mase": metrics.mean(np.abs(truth - point) / parts["seasonal"], truth),
        "rmsse": metrics.mean((truth - point) ** 2 / parts["seasonal_squared"], truth) ** 0.5,
        "quantile_loss": metrics.quantile_loss(truth, quantiles, LEVELS),
        "weighted_quantile_loss": metrics.weighted_quantile_loss(
            original, quantiles * scale[:, None] + loc[:, None], LEVELS
        ),
        "crps": metrics.mean(metrics.crps_from_quantiles(truth, quantiles, LEVELS), truth),
        "interval_score": metrics.mean(metrics.interval_score(truth, lower, upper, (0.1, 0.9)), truth),
        "coverage": metrics.coverage(truth, lower, upper),
    }


def check(result, windows):
    known = sum(int((~np.isnan(window["truth"])).sum()) for window in windows)
    assert (result.num_windows, result.num_values) == (len(windows), known)
    assert asdict(result.model) == pytest.approx(expected_scores(windows), rel=1e-4)
    truth, naive = (np.stack([window[name] for window in windows]) for name in ("truth", "naive"))
    assert result.seasonal_naive.mse == pytest.approx(metrics.mse(truth, naive), rel=1e-4)
    assert result.seasonal_naive.mae == pytest.approx(metrics.mae(truth, naive), rel=1e-4)


def test_scores_are_those_of_explicit_windows(forecaster, panel):
    result, windows = evaluate(forecaster, panel), direct(forecaster, panel, (24, 24))
    check(result, windows)
    assert (result.num_series, result.prediction_length, result.season_length) == (2, HORIZON, 7)
    assert result.band == pytest.approx(0.8)
    assert result.items == (("s0", "c0"), ("s0", "c1"), ("s1", "c0"), ("s1", "c1"))
    for index in range(4):
        own = [window for window in windows if window["series"] == index // 2]
        expected = expected_scores(own, np.s_[:, index % 2])
        assert asdict(result.by_series["model"][index]) == pytest.approx(expected, rel=1e-4), index
    for step in range(HORIZON):
        expected = expected_scores(windows, np.s_[step])
        assert asdict(result.by_step["model"][step]) == pytest.approx(expected, rel=1e-4), step


def test_calibration_is_that_of_explicit_windows(forecaster, panel):
    windows = direct(forecaster, panel, (24, 24))
    truth, quantiles = (np.stack([window[name] for window in windows]) for name in ("truth", "quantiles"))
    found = evaluate(forecaster, panel).calibration["model"]
    pit = metrics.pit_histogram(truth, quantiles, LEVELS)
    assert found.pit == pytest.approx(tuple(pit / pit.sum()))
    assert found.pit_expected == pytest.approx((0.1, 0.4, 0.4, 0.1))
    for level in range(3):
        known = ~np.isnan(truth)
        assert found.at_or_below[level] == pytest.approx((truth <= quantiles[..., level])[known].mean())


def test_the_paired_test_takes_the_mean_loss_of_each_origin_stamp(forecaster, panel, monkeypatch):
    taken = []
    monkeypatch.setattr(scores, "diebold_mariano", lambda difference, overlap: taken.append((difference, overlap)))
    found = backtest(forecaster, panel)
    assert [each.loss for each in found.comparisons] == ["mae", "mse", "quantile_loss"]
    losses = {}
    starts = [*range(24, 36), *range(24, 29)]
    for window, start in zip(direct(forecaster, panel, (24, 24)), starts, strict=True):
        truth = window["truth"]
        better = np.abs(window["quantiles"][..., 1] - truth) - np.abs(window["naive"] - truth)
        losses.setdefault(start, []).append(better[~np.isnan(truth)])
    expected = [np.concatenate(losses[start]).mean() for start in sorted(losses)]
    np.testing.assert_allclose(taken[0][0], expected, rtol=1e-4, atol=1e-6)
    assert (taken[0][1], found.num_origins) == (HORIZON, 12)
    assert found.comparisons[0].difference == pytest.approx(found.model.mae / found.seasonal_naive.mae - 1)


def test_overlap_counts_the_origins_within_one_horizon(forecaster, panel):
    data, shape = forecaster.checkpoint.data, forecaster.checkpoint.model.shape
    one = replace(panel, series=panel.series[:1])
    origins = [RollingOrigins(one, shape, data, step=step) for step in (1, 2, 4, 5, 9)]
    assert [most_overlapping(each.stamps, each.ends) for each in origins] == [5, 3, 2, 1, 1]
    # Origins 25, 30 and 35 of one series and 28 of the other: 28 lies within the horizon from 25, and 30 in that of 28.
    both = RollingOrigins(panel, shape, data, step=5)
    assert (len(both.stamps), most_overlapping(both.stamps, both.ends)) == (4, 2)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    known=st.integers(1, 40),
    step=st.integers(1, 12),
    max_origins=st.one_of(st.none(), st.integers(1, 9)),
)
@settings(deadline=None)
def test_origins_are_counted_back_from_the_newest(make_panel, forecaster, lengths, known, step, max_origins):
    panel = make_panel(tuple(lengths), channels=2, is_wide=False)
    known_until = [int(each.time[min(known, len(each)) - 1].astype("int64")) for each in panel.series]
    record = [
        replace(forecaster.checkpoint.data.series[0], name=each.name, known_until=until)
        for each, until in zip(panel.series, known_until, strict=True)
    ]
    data = replace(forecaster.checkpoint.data, series=tuple(record))
    origins = RollingOrigins(panel, forecaster.checkpoint.model.shape, data, step=step, max_origins=max_origins)
    expected = []
    for index, length in enumerate(lengths):
        rows = list(range(length - HORIZON, min(known, length) - 1, -step))[:max_origins]
        expected += [(index, row) for row in reversed(rows)]
    series, rows = origins.locate(np.arange(len(origins)))
    assert list(zip(series.tolist(), rows.tolist(), strict=True)) == expected


def test_a_step_and_a_limit_score_the_chosen_windows_only(forecaster, panel):
    windows = direct(forecaster, panel, (24, 24))
    chosen = [windows[start - 24] for start in (32, 35)] + [windows[12 + start - 24] for start in (25, 28)]
    found = backtest(forecaster, panel, step=3, max_origins=2)
    check(found, chosen)
    assert found.step == 3


def test_a_long_horizon_and_many_channels_make_small_batches(forecaster, panel, monkeypatch):
    expected = evaluate(forecaster, panel)
    monkeypatch.setattr(module, "_VALUES_PER_BATCH", 2 * HORIZON * 4)
    done = []
    actual = backtest(forecaster, panel, progress=lambda *state: done.append(state))
    assert done[0] == (4, actual.num_windows)
    assert asdict(actual.model) == pytest.approx(asdict(expected.model), rel=1e-6)


def test_every_baseline_is_scored_on_the_same_windows(forecaster, panel):
    found = backtest(forecaster, panel, baselines=("drift", "naive", "seasonal_naive"))
    assert found.forecasters == ("model", "drift", "naive", "seasonal_naive")
    alone = backtest(forecaster, panel, baselines=("naive",))
    assert found.scores["naive"] == alone.scores["naive"]
    assert alone.forecasters == ("model", "naive")
    assert found.model == alone.model
    with pytest.raises(KeyError):
        _ = alone.seasonal_naive
    assert backtest(forecaster, panel, baselines=()).comparisons == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0}, "step=0 must be at least 1"),
        ({"max_origins": 0}, "max_origins=0 must be at least 1"),
        ({"baselines": ["mean"]}, "unknown baseline 'mean'; choose from naive, seasonal_naive, drift, auto_ets"),
        ({"baselines": ["naive", "naive"]}, "named twice"),
    ],
)
def test_options_that_cannot_be_used(forecaster, panel, options, message):
    with pytest.raises(ConfigError, match=message):
        backtest(forecaster, panel, **options)


def poisoned(panel, series, origin, value):
    """The panel with every value of one series from a row on replaced."""
    values = panel.series[series].values.copy()
    values[origin:] = value
    changed = list(panel.series)
    changed[series] = replace(changed[series], values=values)
    return replace(panel, series=tuple(changed))


def forecasts_by_origin(forecaster, panel, **options):
    """What every contender forecast from each origin, in the units of the data, and what scaled its errors."""
    made = {}

    class Recording(module.ScoreSums):
        def add(self, windows, forecast):
            scale, loc = windows.scale, windows.loc
            for row, (series, origin) in enumerate(zip(windows.series, windows.origin, strict=True)):
                made.setdefault((int(series), int(origin)), []).append(
                    np.concatenate(
                        (
                            (forecast.quantiles[row].double().numpy() * scale[row][..., None]).ravel(),
                            *(np.broadcast_to(each[row], (1, 2)).ravel() for each in (scale, loc)),
                            *(each[row].ravel() for each in (windows.seasonal, windows.seasonal_squared)),
                        )
                    )
                )
            super().add(windows, forecast)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ScoreSums", Recording)
        backtest(forecaster, panel, **options)
    return {key: np.stack(value) for key, value in made.items()}


@pytest.fixture(scope="module")
def grown(panel, make_panel):
    """The panel with a series training never saw."""
    stranger = replace(make_panel((34,), channels=2, seed=5, missing=0.1).series[0], name="stranger")
    return replace(panel, series=(*panel.series, stranger))


@given(
    series=st.integers(0, 2),
    after=st.sampled_from([0, 0, 1, 4, 17]),
    value=st.sampled_from([np.nan, 1e9, -1e15]),
    step=st.integers(1, 3),
)
@settings(deadline=None, max_examples=40)
def test_no_forecast_and_no_statistic_sees_what_comes_after_its_origin(forecaster, grown, series, after, value, step):
    """Model, baselines and the scales of errors, of known series and of one never seen."""
    origin = min((CONTEXT if series == 2 else 24) + after, len(grown.series[series]) - HORIZON)
    names = ("naive", "seasonal_naive", "drift")
    clean = forecasts_by_origin(forecaster, grown, baselines=names, step=step)
    changed = forecasts_by_origin(forecaster, poisoned(grown, series, origin, value), baselines=names, step=step)
    assert set(clean) == set(changed)
    stamps = RollingOrigins(grown, forecaster.checkpoint.model.shape, forecaster.checkpoint.data, step=step).stamps
    until = np.searchsorted(stamps, grown.series[series].time[origin], side="right")
    same = [key for key in clean if key[0] != series or key[1] < until]
    assert len(same) > 0
    for key in same:
        np.testing.assert_array_equal(clean[key], changed[key])


def test_a_new_series_is_scaled_by_the_rows_before_its_first_origin(forecaster, panel, make_panel):
    """Were its future in the scale, a level shift there would shrink every error."""
    stranger = replace(make_panel((30,), channels=2, seed=5).series[0], name="stranger")
    alone = replace(panel, series=(stranger,))
    shifted = poisoned(alone, 0, 28, 1e6)
    clean, changed = evaluate(forecaster, alone), evaluate(forecaster, shifted)
    scale = np.nanstd(stranger.values[:CONTEXT], axis=0)
    for channel in range(2):
        for result in (clean, changed):
            found = result.by_series["model"][channel]
            assert found.mae_original / found.mae == pytest.approx(scale[channel], rel=1e-5)


def test_a_channel_of_a_new_series_without_a_value_before_is_not_scored(forecaster, panel, make_panel):
    stranger = replace(make_panel((30,), channels=2, seed=5).series[0], name="stranger")
    values = stranger.values.copy()
    values[:CONTEXT, 1] = np.nan
    result = evaluate(forecaster, replace(panel, series=(replace(stranger, values=values),)))
    assert result.num_values == HORIZON * result.num_windows
    assert result.model == result.by_series["model"][0]
    assert np.isnan(result.by_series["model"][1].mse)


def test_a_series_without_seasonal_error_is_left_out_of_scaled_scores(forecaster, panel):
    values = panel.series[0].values.copy()
    values[:, 0] = 7.0
    flat = replace(panel, series=(replace(panel.series[0], values=values), panel.series[1]))
    result = evaluate(forecaster, flat)
    assert np.isnan(result.by_series["model"][0].mase)
    assert np.isnan(result.by_series["model"][0].rmsse)
    assert np.isfinite(result.by_series["model"][0].mae)
    assert np.isfinite(result.model.mase)


def test_a_forecast_of_nan_is_no_perfect_one(forecaster, panel, monkeypatch):
    real = module.naive_forecast

    def broken(*args, **options):
        found = real(*args, **options)
        found.point[0, 2, 0] = np.nan
        found.quantiles[0, 2, 0] = np.nan
        return found

    expected = evaluate(forecaster, panel)
    monkeypatch.setattr(module, "naive_forecast", broken)
    found = evaluate(forecaster, panel)
    assert found.model == expected.model
    assert all(np.isnan(value) for value in asdict(found.seasonal_naive).values())
    assert np.isnan(found.calibration["seasonal_naive"].pit).all()
    assert np.isnan(found.by_step["seasonal_naive"][2].mse)
    assert found.by_step["seasonal_naive"][1] == expected.by_step["seasonal_naive"][1]
    assert all(each.diebold_mariano is None and each.bootstrap is None for each in found.comparisons)


def test_refitting_hands_over_the_rows_before_each_origin(forecaster, panel):
    seen = []

    def refit(before):
        seen.append([len(each) for each in before.series])
        return forecaster

    found = backtest(forecaster, panel, refit=refit)
    assert seen == [[start, min(start, 33)] for start in range(24, 36)]
    assert asdict(found.model) == pytest.approx(asdict(evaluate(forecaster, panel).model), rel=1e-4)


def test_a_refitted_model_is_the_one_that_is_scored(forecaster, panel, make_checkpoint):
    other = Forecaster(make_checkpoint(panel, known=24, prediction_length=HORIZON, context_length=CONTEXT, seed=9))
    found = backtest(forecaster, panel, refit=lambda before: other)
    assert asdict(found.model) == pytest.approx(asdict(evaluate(other, panel).model), rel=1e-4)
    assert found.model.mse != pytest.approx(evaluate(forecaster, panel).model.mse, rel=1e-3)


def test_a_refitted_model_needs_the_same_levels(forecaster, panel, make_checkpoint):
    other = Forecaster(make_checkpoint(panel, known=24, prediction_length=HORIZON, quantile_levels=(0.5,)))
    with pytest.raises(ConfigError, match=r"has quantile levels \[0.5\], the model \[0.1, 0.5, 0.9\]"):
        backtest(forecaster, panel, refit=lambda before: other)


def test_the_size_of_batches_is_irrelevant(forecaster, panel, monkeypatch):
    expected = evaluate(forecaster, panel)
    monkeypatch.setattr(module, "_WINDOWS_PER_BATCH", 3)
    done = []
    actual = evaluate(forecaster, panel, progress=lambda *state: done.append(state))
    assert actual.model.mse == pytest.approx(expected.model.mse, rel=1e-6)
    assert actual.model.coverage == expected.model.coverage
    assert done[0] == (3, actual.num_windows)
    assert done[-1] == (actual.num_windows, actual.num_windows)


def test_a_new_series_is_scored_as_a_whole(forecaster, panel, make_panel):
    stranger = replace(make_panel((30,), channels=2, seed=5).series[0], name="stranger")
    grown = replace(panel, series=(*panel.series, stranger))
    assert unseen_ranges(grown, forecaster.checkpoint.data) == [(24, 40), (24, 33), (0, 30)]
    check(evaluate(forecaster, grown), direct(forecaster, grown, (24, 24, CONTEXT)))


def test_rows_the_model_knew_are_never_scored(forecaster, panel):
    """Their values move the contexts, never a truth: with contexts ending before them, nothing moves."""
    expected = evaluate(forecaster, panel).num_values
    assert expected == sum(
        int((~np.isnan(series.values[origin : origin + HORIZON])).sum())
        for series in panel.series
        for origin in range(24, len(series) - HORIZON + 1)
    )
    early = replace(panel, series=tuple(replace(s, time=s.time[:24], values=s.values[:24]) for s in panel.series))
    with pytest.raises(DataError, match="no window of 5 steps lies after the rows the model was trained on"):
        evaluate(forecaster, early)


def test_a_table_without_its_first_rows_is_scored_on_the_same_windows(forecaster, panel):
    """What was known is told by the stamp, not by the number of the row."""
    later = replace(panel, series=tuple(replace(s, time=s.time[7:], values=s.values[7:]) for s in panel.series))
    assert unseen_ranges(later, forecaster.checkpoint.data) == [(17, 33), (17, 26)]
    full, cut = evaluate(forecaster, panel), evaluate(forecaster, later)
    assert cut.model.mse == pytest.approx(full.model.mse, rel=1e-6)


def test_forecasts_do_not_see_what_they_are_scored_on(forecaster, panel):
    """With every later value poisoned but for the last five, the window before those sees no poison in its context."""

    def poisoned(value):
        first = panel.series[0]
        values = first.values.copy()
        values[24:] = np.nan
        values[35:] = value
        return replace(panel, series=(Series("s0", first.time, values),))

    plain, shifted = evaluate(forecaster, poisoned(0.0)), evaluate(forecaster, poisoned(1000.0))
    assert plain.num_values == shifted.num_values
    # The context of every window that holds a truth ends at row 35 or before, so forecasts are equal and the squared
    # errors differ exactly as the truths do.
    mean_error = (shifted.model.rmse_original**2 - plain.model.rmse_original**2 - 1000.0**2) / -2000.0
    assert plain.num_values == 2 * (5 + 4 + 3 + 2 + 1)
    assert abs(mean_error) <= plain.model.mae_original + 1e-3


def test_missing_truths_only_are_refused(forecaster, panel):
    empty = replace(
        panel,
        series=tuple(
            replace(s, values=np.where(np.arange(len(s))[:, None] < 24, s.values, np.nan)) for s in panel.series
        ),
    )
    with pytest.raises(DataError, match="every value after the rows"):
        evaluate(forecaster, empty)


def test_a_model_of_points_has_no_quantile_scores(make_checkpoint, panel):
    result = evaluate(Forecaster(make_checkpoint(panel, known=24, loss="mse")), panel)
    assert (result.band, result.model.quantile_loss, result.model.coverage) == (None, None, None)
    assert result.model.mse > 0


def test_evaluating_changes_nothing(forecaster, panel):
    before = [series.values.copy() for series in panel.series]
    weights = {name: value.clone() for name, value in forecaster.checkpoint.model.state_dict().items()}
    evaluate(forecaster, panel)
    for series, values in zip(panel.series, before, strict=True):
        np.testing.assert_array_equal(series.values, values)
    assert all(torch.equal(value, weights[name]) for name, value in forecaster.checkpoint.model.state_dict().items())
