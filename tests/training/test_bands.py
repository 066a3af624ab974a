"""Bands and paths of trained models, from training to the frame."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from trellis_ts.config import DataConfig, ExperimentConfig, ModelConfig, TrainingConfig, WindowConfig
from trellis_ts.conformal import Calibration
from trellis_ts.errors import CheckpointError, ConfigError, DataError
from trellis_ts.evaluation import evaluate
from trellis_ts.forecaster import Forecaster
from trellis_ts.preparation import prepare
from trellis_ts.training import fit
from trellis_ts.types import Columns, Panel, Series

PHI, HORIZON = 0.8, 6
CONFIG = ExperimentConfig(
    data=DataConfig(validation_size=40, test_size=20),
    window=WindowConfig(context_length=12, prediction_length=HORIZON, patch_length=4, season_length=7),
    model=ModelConfig(width=8, num_heads=2, num_slots=3, num_layers=1, feedforward_width=8, pooling="last"),
    training=TrainingConfig(
        max_epochs=2, learning_rate=0.01, batch_size=64, device="cpu", implementation="reference", windows_per_epoch=640
    ),
)


def change(**settings):
    return replace(CONFIG, training=replace(CONFIG.training, **settings))


def panel_of(values):
    """Daily series, one per row of ``[series, time]``."""
    time = np.datetime64("2024-01-01", "ns") + np.arange(values.shape[1]) * np.timedelta64(1, "D")
    series = tuple(Series(f"s{index}", time, row[:, None]) for index, row in enumerate(values))
    return Panel(series, Columns("date", "id", ("y",)), "D")


def autoregression(num_series=40, rows=140, seed=0):
    """AR(1) with coefficient PHI and news of standard deviation 1, around a level of 50."""
    rng = np.random.default_rng(seed)
    values = np.zeros((num_series, rows))
    for step in range(1, rows):
        values[:, step] = PHI * values[:, step - 1] + rng.normal(size=num_series)
    return 50 + values


def counts(num_series=5, rows=140, seed=0):
    rng = np.random.default_rng(seed)
    return rng.poisson(3 + 2 * np.sin(2 * np.pi * np.arange(rows) / 7), (num_series, rows)).astype(float)


def trained(panel, config, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        return fit(prepare(panel, config), folder)[0]


@pytest.fixture(scope="module")
def panels():
    return {"series": panel_of(autoregression()), "counts": panel_of(counts())}


@pytest.fixture(scope="module")
def checkpoints(panels, tmp_path_factory):
    """One short training for each kind of forecast."""
    losses = {"quantile": "series", "mae": "series", "normal": "series", "student_t": "series"}
    losses["negative_binomial"] = "counts"
    return {
        loss: trained(panels[kind], change(loss=loss), tmp_path_factory.mktemp(loss)) for loss, kind in losses.items()
    }


def cut(panel, rows):
    series = tuple(Series(each.name, each.time[:rows], each.values[:rows]) for each in panel.series)
    return replace(panel, series=series)


def kinds():
    return pytest.mark.parametrize("loss", ["quantile", "mae", "normal", "student_t", "negative_binomial"])


def panel_for(panels, loss):
    return panels["counts" if loss == "negative_binomial" else "series"]


@kinds()
def test_every_model_is_calibrated_and_comes_back_from_disk(checkpoints, panels, tmp_path, loss):
    checkpoint, panel = checkpoints[loss], panel_for(panels, loss)
    assert isinstance(checkpoint.calibration, Calibration)
    forecaster = Forecaster(checkpoint)
    loaded = Forecaster.load(forecaster.save(tmp_path / "model"))
    assert loaded.checkpoint.calibration == checkpoint.calibration
    levels = (0.01, 0.1, 0.4, 0.975)
    one, other = (each.forecast(panel, quantile_levels=levels).quantiles for each in (forecaster, loaded))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # another implementation of the memory
    assert (one.diff(dim=-1) >= 0).all()


@kinds()
def test_calibration_can_be_left_out(checkpoints, panels, tmp_path, loss):
    panel = panel_for(panels, loss)
    path = Forecaster(checkpoints[loss]).save(tmp_path / "model")
    plain, calibrated = Forecaster.load(path, calibrated=False), Forecaster.load(path)
    assert torch.equal(plain.forecast(panel).point, calibrated.forecast(panel).point)
    if loss == "mae":
        with pytest.raises(ConfigError, match="points only"):
            plain.forecast(panel, quantile_levels=(0.1, 0.9))
        assert calibrated.forecast(panel).quantiles is None
        bands = calibrated.forecast(panel, quantile_levels=(0.1, 0.9)).quantiles
        assert (bands[..., 0] < bands[..., 1]).all()
    else:
        assert plain.forecast(panel).quantile_levels == CONFIG.training.quantile_levels
        assert not torch.equal(plain.forecast(panel).quantiles, calibrated.forecast(panel).quantiles)


def test_calibration_mends_the_coverage_of_a_hurried_model(panels, tmp_path):
    """One step of training leaves bands far off; calibrated ones cover the held-out rows as they say."""
    checkpoint = trained(panels["series"], change(max_epochs=1, windows_per_epoch=64, learning_rate=1e-5), tmp_path)
    plain, calibrated = (
        evaluate(Forecaster(checkpoint, calibrated=calibrated), panels["series"]).model.coverage
        for calibrated in (False, True)
    )
    assert abs(plain - 0.95) > 0.04
    assert abs(calibrated - 0.95) < 0.03


@kinds()
def test_nothing_after_the_validation_rows_is_used(checkpoints, panels, tmp_path, loss):
    panel = panel_for(panels, loss)
    known = len(panel.series[0]) - 20
    poisoned = tuple(
        Series(each.name, each.time, np.concatenate((each.values[:known], np.full((20, 1), np.nan))))
        for each in panel.series
    )
    again = trained(replace(panel, series=poisoned), change(loss=loss), tmp_path)
    assert again.calibration == checkpoints[loss].calibration


def test_counts_are_forecast_as_counts(checkpoints, panels):
    for calibrated in (True, False):
        forecaster = Forecaster(checkpoints["negative_binomial"], calibrated=calibrated)
        forecast = forecaster.forecast(panels["counts"], quantile_levels=(0.001, 0.1, 0.5, 0.9, 0.999))
        assert torch.equal(forecast.quantiles, forecast.quantiles.round())
        assert (forecast.quantiles >= 0).all()
        assert (forecast.point > 0).all()
        paths = forecaster.sample_paths(panels["counts"], num_samples=50)
        assert torch.equal(paths, paths.round())
        assert (paths >= 0).all()


@pytest.mark.parametrize(("value", "spelled"), [(2.5, "2.5"), (-1.0, "-1")])
def test_what_is_no_count_is_refused_by_name(value, spelled):
    values = counts()
    values[3, 40] = value
    with pytest.raises(DataError) as error:
        prepare(panel_of(values), change(loss="negative_binomial"))
    message = str(error.value)
    for part in ("'y' of series 's3'", f"holds {spelled} at 2024-02-10", "row 41", "--loss student_t"):
        assert part in message
    values[3, 40] = np.nan
    prepare(panel_of(values), change(loss="negative_binomial"))
    values[3, -1] = value  # in the test rows, which training does not read
    prepare(panel_of(values), change(loss="negative_binomial"))


@kinds()
def test_samples_spread_as_the_quantiles_say(checkpoints, panels, loss):
    panel = cut(panel_for(panels, loss), 100)
    panel = replace(panel, series=panel.series[:2])
    forecaster = Forecaster(checkpoints[loss])
    paths = forecaster.sample_paths(panel, num_samples=4000, seed=3)
    forecast = forecaster.forecast(panel)
    assert paths.shape == (4000, *forecast.point.shape)
    for level in (0.05, 0.25, 0.5, 0.75, 0.95):
        edge = forecast.quantile(level)
        below, upto = (paths < edge).double().mean(dim=0), (paths <= edge).double().mean(dim=0)
        error = 4 * np.sqrt(level * (1 - level) / 4000)
        # A count's edge has a probability of its own; the level lies inside it.
        assert (below <= level + error).all()
        assert (upto >= level - error).all()


def test_paths_move_as_the_series_does(panels, tmp_path):
    """AR(1): the correlation of a path's increments is what the errors of the best forecast have, within error.

    The increments of the best forecast's error e_h = PHI e_(h-1) + news; over 40 series the errors of a model of two
    epochs are close to those.
    """
    config = change(max_epochs=8, windows_per_epoch=2000)
    panel = panel_of(autoregression(num_series=60))
    forecaster = Forecaster(trained(panel, config, tmp_path))
    one = replace(panel, series=panel.series[:1])
    paths = forecaster.sample_paths(one, num_samples=8000)[:, 0, :, 0].numpy()
    increments = np.diff(paths, axis=1)
    found = [np.corrcoef(increments[:, step], increments[:, step + 1])[0, 1] for step in range(HORIZON - 2)]
    variance = np.cumsum(PHI ** (2 * np.arange(HORIZON)))
    # Increment h: (PHI - 1) e_h + news of variance 1; the next: (PHI - 1) (PHI e_h + the same news) + other news.
    expected = []
    for step in range(HORIZON - 2):
        own = (PHI - 1) ** 2 * variance[step] + 1
        nxt = (PHI - 1) ** 2 * variance[step + 1] + 1
        both = (PHI - 1) ** 2 * PHI * variance[step] + (PHI - 1)
        expected.append(both / np.sqrt(own * nxt))
    # 60 series of about 6 windows that do not overlap: a standard error of about 0.05.
    np.testing.assert_allclose(found, expected, atol=0.15)
    independent = np.corrcoef(np.diff(np.random.default_rng(0).normal(size=(8000, 3)), axis=1).T)[0, 1]
    assert independent < -0.4 < min(found)


def test_the_frame_of_samples(checkpoints, panels):
    panel = panels["series"]
    frame = pd.concat(
        pd.DataFrame({"id": each.name, "date": each.time, "y": each.values[:, 0]}) for each in panel.series
    )
    forecaster = Forecaster(checkpoints["quantile"])
    found = forecaster.sample(frame, num_samples=3, seed=5)
    assert list(found.columns) == ["id", "date", "sample", "value"]
    assert len(found) == 40 * 3 * HORIZON
    paths = forecaster.sample_paths(panel, num_samples=3, seed=5)
    for index, sample in ((0, 0), (7, 2), (39, 1)):
        rows = found[(found["id"] == f"s{index}") & (found["sample"] == sample)]
        np.testing.assert_array_equal(rows["value"], paths[sample, index, :, 0])
        np.testing.assert_array_equal(rows["date"], forecaster.predict(frame).query(f"id == 's{index}'")["date"])
    pd.testing.assert_frame_equal(found, forecaster.sample(frame, num_samples=3, seed=5))
    assert not found.equals(forecaster.sample(frame, num_samples=3, seed=6))


def test_any_level_from_the_frame(checkpoints, panels):
    panel = panels["series"]
    frame = pd.concat(
        pd.DataFrame({"id": each.name, "date": each.time, "y": each.values[:, 0]}) for each in panel.series
    )
    forecaster = Forecaster(checkpoints["quantile"])
    found = forecaster.predict(frame, quantile_levels=(0.9, 0.03, 0.5))
    assert list(found.columns) == ["id", "date", "forecast", "q0.03", "q0.5", "q0.9"]
    np.testing.assert_allclose(found["q0.9"], forecaster.predict(frame)["q0.9"], rtol=1e-12)
    np.testing.assert_array_equal(found["forecast"], found["q0.5"])
    with pytest.raises(ConfigError, match=r"quantile level 1\.5"):
        forecaster.predict(frame, quantile_levels=(0.5, 1.5))


def test_longer_horizons_have_bands_and_paths_too(checkpoints, panels):
    for loss in ("quantile", "student_t", "negative_binomial"):
        forecaster, panel = Forecaster(checkpoints[loss]), panel_for(panels, loss)
        forecast = forecaster.forecast(panel, prediction_length=2 * HORIZON + 1)
        assert forecast.quantiles.shape[1] == 2 * HORIZON + 1
        assert torch.equal(forecast.quantiles[:, :HORIZON], forecaster.forecast(panel).quantiles)
        paths = forecaster.sample_paths(panel, num_samples=4, prediction_length=2 * HORIZON + 1)
        assert paths.isfinite().all()


def test_samples_that_cannot_be_drawn_are_refused(checkpoints, panels, monkeypatch):
    panel = panels["series"]
    forecaster = Forecaster(replace(checkpoints["quantile"], calibration=None))
    with pytest.raises(ConfigError, match="holds no calibration"):
        forecaster.sample_paths(panel)
    forecaster = Forecaster(checkpoints["quantile"])
    with pytest.raises(ConfigError, match="num_samples=0"):
        forecaster.sample_paths(panel, num_samples=0)
    with pytest.raises(ConfigError, match="draw fewer"):
        forecaster.sample_paths(panel, num_samples=10_000_000)
    with pytest.raises(ConfigError, match="points only"):
        Forecaster(checkpoints["mae"], calibrated=False).sample_paths(panel)


def test_a_calibration_of_another_model_is_refused(checkpoints, tmp_path):
    other = replace(checkpoints["quantile"].calibration)
    shorter = Calibration(
        other.bands, tuple(row[:3] for row in other.offsets), tuple(row[:2] for row in other.correlations[:3]), 9, 9, 1
    )
    path = Forecaster(replace(checkpoints["quantile"], calibration=shorter)).save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="disagree on the horizon"):
        Forecaster.load(path)


def test_saving_over_a_calibrated_model_leaves_no_old_calibration(checkpoints, tmp_path):
    path = Forecaster(checkpoints["quantile"]).save(tmp_path / "model")
    assert (path / "calibration.json").is_file()
    Forecaster(replace(checkpoints["quantile"], calibration=None)).save(path)
    assert not (path / "calibration.json").exists()
    assert Forecaster.load(path).checkpoint.calibration is None


@pytest.mark.parametrize(
    ("change_text", "complaint"),
    [
        (lambda text: text.replace('"bands"', '"belts"'), "checksum"),
        (lambda text: text[:-20], "checksum"),
        (None, "is missing"),
    ],
)
def test_a_damaged_calibration_is_refused(checkpoints, tmp_path, change_text, complaint):
    path = Forecaster(checkpoints["quantile"]).save(tmp_path / "model") / "calibration.json"
    if change_text is None:
        path.unlink()
    else:
        path.write_text(change_text(path.read_text()))
    with pytest.raises(CheckpointError, match=complaint):
        Forecaster.load(path.parent)
