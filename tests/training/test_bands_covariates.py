"""Covariates and everything a forecast can be: distributions, calibrated bands, paths, scores beside baselines."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from trellis_ts.config import DataConfig, ExperimentConfig, ModelConfig, TrainingConfig, WindowConfig
from trellis_ts.conformal import calibrate
from trellis_ts.datasets.readers import panel_from_frame
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.errors import DataError
from trellis_ts.forecaster import Forecaster
from trellis_ts.frames import sample_frame
from trellis_ts.preparation import prepare
from trellis_ts.training import fit

ROWS, FUTURE, HORIZON, TEST = 150, 14, 6, 20
LOSSES = ("quantile", "mae", "student_t", "negative_binomial")
NAMES = {
    "past_covariates": ["visits", "state"],
    "known_covariates": ["promo", "price"],
    "static": ["size"],
    "id": "shop,item",
    "target": ["sold"],
}
CONFIG = ExperimentConfig(
    data=DataConfig(validation_size=30, test_size=TEST),
    window=WindowConfig(context_length=14, prediction_length=HORIZON, patch_length=7, season_length=7),
    model=ModelConfig(width=8, num_heads=2, num_slots=3, num_layers=1, feedforward_width=8, covariate_width=6),
    training=TrainingConfig(
        max_epochs=6, learning_rate=0.02, batch_size=16, device="cpu", implementation="reference", patience=20
    ),
)


def make_frame(seed: int = 0) -> pd.DataFrame:
    """Counts that a promotion multiplies by five, in three shops; the last rows are the future."""
    parts = []
    for number, (shop, item) in enumerate((("north", 1), ("north", 2), ("south", 1))):
        rng = np.random.default_rng(seed + number)
        total = ROWS + FUTURE
        promo = rng.random(total) < 0.4
        frame = pd.DataFrame(
            {
                "shop": shop,
                "item": item,
                "day": pd.date_range("2024-01-01", periods=total),
                "sold": rng.poisson((number + 1) * np.where(promo, 50, 10)).astype(float),
                "promo": np.where(promo, "yes", "no"),
                "price": rng.normal(5, 1, total),
                "visits": rng.normal(100, 10, total),
                "state": rng.choice(["calm", "busy"], total),
                "size": 10.0 * (number + 1),
            }
        )
        frame.loc[ROWS:, ["sold", "visits", "state"]] = [np.nan, np.nan, None]
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def trained(frame, loss, folder):
    """A short training, as the command does it."""
    config = replace(CONFIG, training=replace(CONFIG.training, loss=loss))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        return fit(prepare(panel_from_frame(frame, **NAMES), config), folder)[0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {loss: trained(make_frame(), loss, tmp_path_factory.mktemp(loss)) for loss in LOSSES}


@pytest.fixture(scope="module")
def panel():
    return panel_from_frame(make_frame(), **NAMES)


def with_promotion(panel, step, value):
    """The panel with another promotion at one step after the last row."""
    names = panel.covariates("known")[0].categories
    series = []
    for each in panel.series:
        known = each.known.copy()
        known[len(each) + step, 0] = names.index(value)
        series.append(replace(each, known=known))
    return replace(panel, series=tuple(series))


def poisoned(frame, rows):
    """The frame with targets and past covariates of each series' later rows turned into something else."""
    frame = frame.copy()
    position = frame.groupby(["shop", "item"]).cumcount()
    late = (position >= rows) & (position < ROWS)
    frame.loc[late, "sold"] = 1e6
    frame.loc[late, "visits"] = -1e9
    frame.loc[late, "state"] = "plague"
    return frame


@pytest.mark.parametrize("loss", LOSSES)
class TestEveryLoss:
    def test_the_promotion_moves_forecast_bands_and_paths_of_its_day(self, checkpoints, panel, loss):
        forecaster = Forecaster(checkpoints[loss])
        without, with_ = (with_promotion(panel, 2, value) for value in ("no", "yes"))
        low, high = (forecaster.forecast(each, quantile_levels=(0.1, 0.5, 0.9)) for each in (without, with_))
        assert (high.point[:, 2] > 1.5 * low.point[:, 2]).all()
        assert (high.quantiles[:, 2] > low.quantiles[:, 2]).all()
        others = [step for step in range(HORIZON) if step != 2]
        assert torch.equal(high.quantiles[:, others], low.quantiles[:, others])
        low, high = (forecaster.sample_paths(each, num_samples=200) for each in (without, with_))
        assert (high[:, :, 2].mean(dim=0) > 1.5 * low[:, :, 2].mean(dim=0)).all()
        assert torch.equal(high[:, :, others], low[:, :, others])

    def test_it_comes_back_from_disk(self, checkpoints, panel, tmp_path, loss):
        forecaster = Forecaster(checkpoints[loss])
        loaded = Forecaster.load(forecaster.save(tmp_path / "model"))
        assert loaded.checkpoint.calibration == forecaster.checkpoint.calibration
        assert loaded.checkpoint.data == forecaster.checkpoint.data
        one, other = (each.forecast(panel, quantile_levels=(0.1, 0.9)).quantiles for each in (forecaster, loaded))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # another implementation of the memory

    def test_nothing_after_the_cut_is_in_the_model(self, checkpoints, tmp_path, loss):
        """Poison in the rows held out for the test changes no scaler, no calibration and no weight."""
        again = trained(poisoned(make_frame(), ROWS - TEST), loss, tmp_path)
        checkpoint = checkpoints[loss]
        assert again.data == checkpoint.data
        assert again.calibration == checkpoint.calibration
        weights, before = again.model.state_dict(), checkpoint.model.state_dict()
        assert all(torch.equal(weights[name], before[name]) for name in before)

    @pytest.mark.parametrize("back", [HORIZON, TEST])
    def test_nothing_after_the_origin_is_in_the_forecast(self, checkpoints, panel, loss, back):
        """A window cut out of the whole table is forecast as if the table ended there, whatever comes after."""
        forecaster, origin = Forecaster(checkpoints[loss]), ROWS - back
        cut = replace(panel, series=tuple(_cut(each, origin) for each in panel.series))
        whole, earlier = (panel_from_frame(poisoned(make_frame(), rows), **NAMES) for rows in (origin, origin - 1))

        def window(source):
            scaled = ScaledPanel(source, forecaster.scaler().of(source), 7, future_length=HORIZON)
            batch = scaled.gather(np.arange(3), np.full(3, origin), 14, 0, HORIZON)
            return forecaster.roll_out(batch, HORIZON).at_levels((0.05, 0.5, 0.95))

        expected = window(cut)
        for each in (panel, whole):
            assert torch.equal(window(each).quantiles, expected.quantiles)
            assert torch.equal(window(each).point, expected.point)
        assert not torch.equal(window(earlier).point, expected.point)
        ended = replace(whole, series=tuple(_cut(each, origin) for each in whole.series))
        paths, others = (forecaster.sample_paths(each, num_samples=3, seed=1) for each in (cut, ended))
        assert torch.equal(paths, others)

    def test_scores_beside_baselines(self, checkpoints, panel, loss):
        """The baselines know no covariates: the model beats them, and they score as beside any other model."""
        names = ("naive", "seasonal_naive", "drift")
        forecaster, plain = (Forecaster(checkpoints[loss], calibrated=each) for each in (True, False))
        frame = make_frame()
        scores, uncalibrated = (each.backtest(frame, baselines=names) for each in (forecaster, plain))
        assert scores.num_windows == 3 * (TEST - HORIZON + 1)
        assert scores.model.mae < 0.7 * min(scores.scores[name].mae for name in names)
        assert scores.model.mae == pytest.approx(uncalibrated.model.mae, rel=1e-6)
        for name in names:
            assert scores.scores[name].mae == pytest.approx(uncalibrated.scores[name].mae, rel=1e-9)
        if loss != "mae":
            assert scores.model.interval_score != uncalibrated.model.interval_score
            assert scores.model.crps < 0.7 * scores.scores["seasonal_naive"].crps

    def test_a_backtest_that_refits_scores_the_same(self, checkpoints, loss):
        """Forecasts of tables cut off at each origin are those of the windows, covariates and bands included."""
        forecaster, frame = Forecaster(checkpoints[loss]), make_frame()
        again = forecaster.backtest(frame, max_origins=2, baselines=(), refit=lambda panel: forecaster)
        once = forecaster.backtest(frame, max_origins=2, baselines=())
        assert again.model.mae == pytest.approx(once.model.mae, rel=1e-5)
        if loss != "mae":
            # Calibrated quantiles of counts are rounded to counts in a forecast, and scored as they are in a window.
            tolerance = 0.02 if loss == "negative_binomial" else 1e-5
            assert again.model.crps == pytest.approx(once.model.crps, rel=tolerance)

    def test_beyond_the_trained_horizon(self, checkpoints, panel, loss):
        forecaster, length = Forecaster(checkpoints[loss]), 2 * HORIZON + 2
        before = forecaster.forecast(panel, prediction_length=length, quantile_levels=(0.1, 0.9)).quantiles
        assert before.shape[1] == length
        other = with_promotion(with_promotion(panel, length - 1, "no"), HORIZON, "yes")
        after = forecaster.forecast(other, prediction_length=length, quantile_levels=(0.1, 0.9)).quantiles
        assert torch.equal(before[:, :HORIZON], after[:, :HORIZON])
        assert not torch.equal(before, after)
        paths = forecaster.sample_paths(panel, num_samples=2, prediction_length=length)
        assert paths.shape == (2, 3, length, 1)
        with pytest.raises(DataError, match=r"known covariates .* are missing"):
            forecaster.sample_paths(panel, num_samples=2, prediction_length=FUTURE + 1)


def _cut(series, rows):
    return replace(series, time=series.time[:rows], values=series.values[:rows], past=series.past[:rows])


def test_the_calibration_is_that_of_forecasts_with_covariates(checkpoints, panel):
    """Bands are scored with the covariates of their windows: with others they are far wider."""
    checkpoint = checkpoints["quantile"]
    preparation = prepare(panel, checkpoint.experiment)
    again = calibrate(checkpoint.model, preparation.validation, device=torch.device("cpu"))
    assert again == checkpoint.calibration
    turned = tuple(
        replace(each, known=np.column_stack((1 - each.known[:, 0], each.known[:, 1]))) for each in panel.series
    )
    other = prepare(replace(panel, series=turned), checkpoint.experiment)
    wrong = calibrate(checkpoint.model, other.validation, device=torch.device("cpu"))
    assert np.mean(wrong.offsets) > np.mean(again.offsets) + 0.5  # standard deviations of the training rows


class TestFrames:
    def test_a_future_of_its_own_gives_the_same_paths(self, checkpoints):
        forecaster, frame = Forecaster(checkpoints["student_t"]), make_frame()
        history, future = frame[frame["sold"].notna()], frame[frame["sold"].isna()]
        future = future[["shop", "item", "day", "promo", "price"]].sample(frac=1, random_state=0)
        before = [each.copy(deep=True) for each in (history, future)]
        for length in (None, 10):
            expected = forecaster.sample(frame, num_samples=4, seed=2, prediction_length=length)
            found = forecaster.sample(history, future, num_samples=4, seed=2, prediction_length=length)
            pd.testing.assert_frame_equal(found, expected)
            assert list(found.columns) == ["shop", "item", "day", "sample", "value"]
            assert len(found) == 3 * 4 * (length or HORIZON)
        for one, other in zip((history, future), before, strict=True):
            pd.testing.assert_frame_equal(one, other)
        with pytest.raises(DataError, match=r"missing from 2024-05-30 on of series 'north/1'"):
            forecaster.sample(history)

    def test_paths_are_where_their_series_is(self, checkpoints, panel):
        forecaster = Forecaster(checkpoints["quantile"])
        found = forecaster.sample(make_frame(), num_samples=3, seed=5)
        paths = forecaster.sample_paths(panel, num_samples=3, seed=5)
        for index, (shop, item) in enumerate((("north", "1"), ("north", "2"), ("south", "1"))):
            for sample in range(3):
                rows = found[(found["shop"] == shop) & (found["item"] == item) & (found["sample"] == sample)]
                np.testing.assert_array_equal(rows["value"], paths[sample, index, :, 0])

    @pytest.mark.parametrize("library", ["pyarrow", "polars"])
    def test_paths_come_in_a_frame_of_the_same_library(self, checkpoints, library):
        module = pytest.importorskip(library)
        forecaster, frame = Forecaster(checkpoints["quantile"]), make_frame()
        expected = forecaster.sample(frame, num_samples=2)
        native = module.Table.from_pandas(frame) if library == "pyarrow" else module.DataFrame(frame.to_dict("list"))
        found = forecaster.sample(native, num_samples=2)
        assert type(found) is type(native)
        columns = found.to_pydict() if library == "pyarrow" else found.to_dict(as_series=False)
        assert list(columns) == list(expected.columns)
        assert columns["value"] == expected["value"].tolist()
        assert columns["sample"] == expected["sample"].tolist()

    @pytest.mark.parametrize("taken", ["sample", "value"])
    def test_columns_of_the_table_keep_their_names(self, checkpoints, panel, taken):
        paths = Forecaster(checkpoints["quantile"]).sample_paths(panel, num_samples=2)
        frame = sample_frame(replace(panel, columns=replace(panel.columns, time=taken)), paths)
        ours = [f"{name}_" if name == taken else name for name in ("sample", "value")]
        assert list(frame.columns) == ["shop", "item", taken, *ours]
        assert frame[taken].dtype.kind == "M"
