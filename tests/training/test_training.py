"""Training: it learns, repeats itself bit by bit, goes on where it stopped, and says why it ended."""

from __future__ import annotations

import csv
import random
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from trellis_ts.config import DataConfig, ExperimentConfig, ModelConfig, TrainingConfig, WindowConfig
from trellis_ts.errors import CheckpointError, ConfigError, DataError, TrellisError
from trellis_ts.forecaster import Forecaster
from trellis_ts.lightning import learning_rate_factor
from trellis_ts.loaders import EpochSampler
from trellis_ts.losses import forecast_loss
from trellis_ts.preparation import prepare
from trellis_ts.recovery import read_state
from trellis_ts.training import SilentObserver, fit

CONFIG = ExperimentConfig(
    data=DataConfig(validation_size=20, test_size=20),
    window=WindowConfig(context_length=14, prediction_length=4, patch_length=7, season_length=7),
    model=ModelConfig(width=8, num_heads=2, num_slots=4, num_layers=1, feedforward_width=8),
    training=TrainingConfig(max_epochs=4, batch_size=32, learning_rate=0.01, device="cpu"),
)

pytestmark = pytest.mark.usefixtures("quiet_lightning")


def change(config=CONFIG, **settings):
    """The configuration with some training settings changed."""
    return replace(config, training=replace(config.training, **settings))


@pytest.fixture(scope="module")
def panel(make_panel):
    return make_panel((160,), noise=0.2)


class Listener(SilentObserver):
    """Remembers the reports, and asks to stop at the end of an epoch or after some steps."""

    def __init__(self, stop_epoch=None, stop_step=None):
        self.reports, self.steps, self.plan = [], 0, None
        self.stop_epoch, self.stop_step = stop_epoch, stop_step

    def started(self, *, num_epochs, steps_per_epoch, first_epoch):
        self.plan = (num_epochs, steps_per_epoch, first_epoch)

    def stepped(self):
        self.steps += 1

    def epoch_ended(self, report):
        self.reports.append(report)

    def should_stop(self):
        steps_per_epoch = self.plan[1]
        return self.steps == self.stop_step or self.steps == (self.stop_epoch or 0) * steps_per_epoch > 0


def weights(checkpoint):
    return checkpoint.model.state_dict()


def equal(one, other):
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def rows_of(directory):
    with (directory / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(panel, tmp_path_factory):
    """One uninterrupted run: its folder, checkpoint, summary and what was heard of it."""
    import warnings

    folder, listener = tmp_path_factory.mktemp("whole"), Listener()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        checkpoint, summary = fit(prepare(panel, CONFIG), folder, observer=listener)
    return folder, checkpoint, summary, listener


def validation_loss(checkpoint, preparation):
    windows = preparation.validation
    batch = windows.__getitems__(range(len(windows)))
    with torch.no_grad():
        forecast = checkpoint.model(batch)
    return float(forecast_loss(forecast, batch.future, batch.future_observed, checkpoint.experiment.training.loss))


def test_it_learns(whole):
    _, _, summary, listener = whole
    losses = [report.train_loss for report in listener.reports]
    assert losses[-1] < 0.7 * losses[0]
    assert summary.validation_loss < listener.reports[0].validation_loss


def test_the_weights_returned_are_those_of_the_best_epoch(whole, panel):
    _, checkpoint, summary, listener = whole
    losses = [report.validation_loss for report in listener.reports]
    assert summary.validation_loss == pytest.approx(min(losses))
    assert summary.best_epoch == 1 + int(np.argmin(losses))
    assert validation_loss(checkpoint, prepare(panel, CONFIG)) == pytest.approx(min(losses), rel=1e-4)
    assert not checkpoint.model.training


def test_the_best_epoch_need_not_be_the_last(panel, tmp_path):
    config = change(learning_rate=1.0, max_epochs=50, patience=2)
    listener = Listener()
    preparation = prepare(panel, config)
    checkpoint, summary = fit(preparation, tmp_path, observer=listener)
    losses = [report.validation_loss for report in listener.reports]
    assert summary.best_epoch == 1 + int(np.argmin(losses)) == len(losses) - 2
    assert validation_loss(checkpoint, preparation) == pytest.approx(min(losses), rel=1e-3)
    best = [report.is_best for report in listener.reports]
    assert best == [loss < min(losses[:index], default=np.inf) for index, loss in enumerate(losses)]


def test_the_log_has_a_row_per_epoch(whole):
    folder, _, summary, listener = whole
    rows = rows_of(folder)
    assert list(rows[0]) == ["epoch", "step", "seconds", "train_loss", "validation_loss", "learning_rate"]
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16]
    assert [float(row["validation_loss"]) for row in rows] == pytest.approx(
        [report.validation_loss for report in listener.reports], rel=1e-5
    )
    assert (summary.stop_reason, summary.num_epochs, summary.train_windows) == ("epochs", 4, 103)
    assert (listener.plan, listener.steps) == ((4, 4, 0), 16)
    assert (folder / "tensorboard").is_dir()


def test_the_same_seed_gives_the_same_bits(whole, panel, tmp_path):
    random.seed(99)
    torch.manual_seed(99)
    again, summary = fit(prepare(panel, CONFIG), tmp_path)
    assert equal(whole[1], again)
    assert summary.validation_loss == whole[2].validation_loss


def test_another_seed_gives_another_model(whole, panel, tmp_path):
    other, _ = fit(prepare(panel, change(seed=1, max_epochs=1)), tmp_path)
    assert not equal(whole[1], other)


def test_global_random_numbers_are_left_alone(panel, tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    fit(prepare(panel, change(max_epochs=1)), tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(whole, panel, tmp_path):
    first = Listener(stop_epoch=2)
    _, summary = fit(prepare(panel, CONFIG), tmp_path, observer=first)
    assert (summary.stop_reason, summary.num_epochs) == ("interrupted", 2)
    second = Listener()
    resumed, summary = fit(prepare(panel, CONFIG), tmp_path, observer=second, resume=True)
    assert (summary.stop_reason, summary.num_epochs) == ("epochs", 4)
    assert second.plan == (4, 4, 2)
    expected = [report.validation_loss for report in whole[3].reports]
    assert [report.validation_loss for report in first.reports + second.reports] == expected
    assert [report.is_best for report in first.reports + second.reports] == [
        report.is_best for report in whole[3].reports
    ]
    assert equal(whole[1], resumed)
    assert [int(row["epoch"]) for row in rows_of(tmp_path)] == [1, 2, 3, 4]


def test_a_run_goes_on_from_its_last_epoch_though_an_earlier_one_was_better(panel, tmp_path):
    preparation, listener = prepare(panel, change(learning_rate=1.0, max_epochs=50, patience=2)), Listener()
    expected, _ = fit(preparation, tmp_path / "whole", observer=listener)
    worse = next(report.epoch for report in listener.reports if not report.is_best)
    first, second = Listener(stop_epoch=worse), Listener()
    fit(preparation, tmp_path / "parts", observer=first)
    resumed, _ = fit(preparation, tmp_path / "parts", observer=second, resume=True)
    assert second.plan[2] == worse
    assert [each.validation_loss for each in first.reports + second.reports] == [
        each.validation_loss for each in listener.reports
    ]
    assert equal(expected, resumed)


def test_a_damaged_state_is_not_resumed_from(panel, tmp_path):
    fit(prepare(panel, change(max_epochs=1)), tmp_path)
    state = tmp_path / "state.safetensors"
    content = state.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    for damaged in (b"", content[: len(content) // 2], flipped, b"cos\nsystem\n(S'true'\ntR."):
        state.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged"):
            fit(prepare(panel, change(max_epochs=2)), tmp_path, resume=True)


def test_an_epoch_that_was_cut_short_is_repeated(whole, panel, tmp_path):
    _, summary = fit(prepare(panel, CONFIG), tmp_path, observer=Listener(stop_step=6))
    assert (summary.stop_reason, summary.num_epochs) == ("interrupted", 2)
    listener = Listener()
    resumed, summary = fit(prepare(panel, CONFIG), tmp_path, observer=listener, resume=True)
    assert (summary.stop_reason, summary.num_epochs, listener.plan[2]) == ("epochs", 4, 1)
    assert equal(whole[1], resumed)
    assert [int(row["epoch"]) for row in rows_of(tmp_path)] == [1, 2, 3, 4]


def test_a_run_stopped_at_its_first_step_still_gives_a_model(panel, tmp_path):
    checkpoint, summary = fit(prepare(panel, CONFIG), tmp_path, observer=Listener(stop_step=1))
    assert (summary.stop_reason, summary.num_epochs, summary.best_epoch) == ("interrupted", 1, 1)
    assert torch.isfinite(Forecaster(checkpoint).forecast(panel).point).all()


def test_resuming_nothing_is_refused(panel, tmp_path):
    with pytest.raises(ConfigError, match=r"nothing to resume: .*state\.safetensors does not exist"):
        fit(prepare(panel, CONFIG), tmp_path, resume=True)


def test_a_new_run_forgets_the_former_log(panel, tmp_path):
    for _ in range(2):
        fit(prepare(panel, change(max_epochs=1)), tmp_path)
    assert [int(row["epoch"]) for row in rows_of(tmp_path)] == [1]


def test_time_is_kept(panel, tmp_path):
    start = time.monotonic()
    checkpoint, summary = fit(prepare(panel, change(max_epochs=100_000, max_time="1s", patience=1000)), tmp_path)
    assert time.monotonic() - start < 15
    assert summary.stop_reason == "time"
    assert summary.num_epochs < 1000
    assert float(rows_of(tmp_path)[-1]["learning_rate"]) < 0.2 * CONFIG.training.learning_rate
    assert torch.isfinite(Forecaster(checkpoint).forecast(panel).point).all()


def test_patience_ends_a_run(panel, tmp_path):
    config = change(max_epochs=50, patience=2, learning_rate=1.0)
    _, summary = fit(prepare(panel, config), tmp_path)
    assert summary.stop_reason == "patience"
    assert summary.num_epochs == summary.best_epoch + 2 < 50


def test_a_diverging_run_is_an_error(panel, tmp_path, monkeypatch):
    from trellis_ts.model import ForecastModel

    forward = ForecastModel.forward

    def diverge(model, batch):
        forecast = forward(model, batch)
        return replace(forecast, point=forecast.point * torch.nan, quantiles=forecast.quantiles * torch.nan)

    monkeypatch.setattr(ForecastModel, "forward", diverge)
    with pytest.raises(TrellisError, match=r"training diverged.*--learning-rate"):
        fit(prepare(panel, CONFIG), tmp_path)


@pytest.mark.parametrize(
    "settings", [{"mixer": "attention"}, {"write_activation": "identity"}, {"instance_norm": False}]
)
def test_gaps_are_trained_around(make_panel, tmp_path, settings):
    panel = make_panel((100, 18, 60), missing=0.4)
    values = panel.series[0].values
    values[10:45] = np.nan  # longer than a context and its horizon
    config = replace(change(max_epochs=2), model=replace(CONFIG.model, **settings))
    config = replace(config, data=DataConfig(validation_size=10, test_size=5))
    checkpoint, summary = fit(prepare(panel, config), tmp_path)
    assert all(torch.isfinite(value).all() for value in weights(checkpoint).values())
    assert np.isfinite(summary.validation_loss)
    assert summary.left_out_series == 1
    assert torch.isfinite(Forecaster(checkpoint).forecast(panel).point).all()


def test_channel_mixing_needs_channels(panel):
    with pytest.raises(ConfigError, match=r"channel_mixing=trellis needs two columns or more"):
        prepare(panel, replace(CONFIG, model=replace(CONFIG.model, channel_mixing="trellis")))


def test_channel_mixing_learns_from_the_other_channel(make_panel, tmp_path):
    """One channel is noise, the other the same noise some steps later: only who reads both can tell what comes."""
    panel = make_panel((400,), channels=2)
    noise = np.random.default_rng(0).normal(size=405)
    values = np.column_stack((noise[5:], noise[:400]))
    panel = replace(panel, series=(replace(panel.series[0], values=values),))
    window = WindowConfig(context_length=8, prediction_length=3, patch_length=8)
    config = replace(change(max_epochs=25, loss="mse", learning_rate=1e-2), window=window)
    losses = {
        mixing: fit(
            prepare(
                panel, replace(config, model=replace(config.model, channel_mixing=mixing, calendar_features=False))
            ),
            tmp_path / mixing,
        )[1].validation_loss
        for mixing in ("none", "trellis")
    }
    assert losses["trellis"] < 0.75 * losses["none"], losses


@pytest.mark.parametrize("loss", ["mae", "mse", "huber"])
def test_every_loss_trains_a_model_of_points(panel, tmp_path, loss):
    listener = Listener()
    checkpoint, _ = fit(prepare(panel, change(loss=loss, max_epochs=3)), tmp_path, observer=listener)
    assert listener.reports[-1].train_loss < listener.reports[0].train_loss
    assert checkpoint.model.quantile_levels == ()


def test_half_precision_trains(panel, tmp_path):
    listener = Listener()
    checkpoint, _ = fit(prepare(panel, change(precision="bf16-mixed", max_epochs=3)), tmp_path, observer=listener)
    assert listener.reports[-1].train_loss < listener.reports[0].train_loss
    assert {value.dtype for value in weights(checkpoint).values()} == {torch.float32}


def test_the_record_says_what_was_known(whole, panel):
    record = whole[1].data
    series = panel.series[0]
    assert (record.channels, record.freq, record.time_column, record.id_column) == (("c0",), "D", "date", None)
    assert record.series[0].known_until == int(series.time[139].astype("int64"))
    assert record.series[0].loc == pytest.approx((series.values[:120].mean(),))
    assert record.series[0].scale == pytest.approx((series.values[:120].std(),))


@pytest.mark.parametrize("length", [15, 30, 41])
@pytest.mark.parametrize("factor", [1e-4, 1e6])
def test_a_series_too_short_to_train_on_has_a_scale_of_its_own(make_panel, tmp_path, length, factor):
    """Few or none of its rows are training rows, so their statistics are no scale: in whatever unit it is measured, the
    validation loss is the same and its forecasts are those of a series never seen."""
    panel = make_panel((120, length))
    small = panel.series[1]
    scaled = replace(panel, series=(panel.series[0], replace(small, values=factor * small.values)))
    losses = []
    for index, each in enumerate((panel, scaled)):
        checkpoint, summary = fit(prepare(each, change(max_epochs=1)), tmp_path / str(index))
        losses.append(summary.validation_loss)
        assert summary.left_out_series == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    forecaster = Forecaster(checkpoint)
    stranger = replace(scaled, series=(scaled.series[0], replace(scaled.series[1], name="stranger")))
    expected, actual = (forecaster.forecast(each).point[1] for each in (stranger, scaled))
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))


def test_the_prepared_windows_stay_within_their_splits(panel):
    preparation = prepare(panel, CONFIG)
    border = preparation.splits.borders[0]
    assert (border.train, border.validation, border.test) == ((0, 120), (120, 140), (140, 160))
    for windows, (start, stop) in ((preparation.train, border.train), (preparation.validation, border.validation)):
        _, origins = windows.locate(range(len(windows)))
        assert origins.min() == max(start, 14)
        assert origins.max() == stop - 4


def test_a_split_without_a_window_is_refused(make_panel):
    config = replace(CONFIG, data=DataConfig(validation_size=4, test_size=0))
    with pytest.raises((ConfigError, DataError), match="rows"):
        prepare(make_panel((15,)), config)


def test_the_sampler_draws_each_window_once_in_an_order_of_its_epoch():
    sampler = EpochSampler(50, seed=3, windows_per_epoch=None)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(second) == list(range(50))
    assert second != first
    fresh = EpochSampler(50, seed=3, windows_per_epoch=20)
    fresh.set_epoch(1)
    assert (list(fresh), len(fresh)) == (second[:20], 20)
    assert len(EpochSampler(5, seed=0, windows_per_epoch=20)) == 5


def test_the_learning_rate_warms_up_and_falls_to_zero():
    factors = [learning_rate_factor(step, 1000) for step in range(1001)]
    assert factors[0] == pytest.approx(1 / 50)
    assert np.argmax(factors) == 49
    assert all(later <= earlier for earlier, later in pairwise(factors[50:]))
    assert factors[-1] == pytest.approx(0.0)
    assert learning_rate_factor(500, 10_000, time_fraction=1.0) == pytest.approx(0.0)
    assert learning_rate_factor(0, 1) == 1.0
    assert learning_rate_factor(900, 100_000, time_fraction=0.5) == pytest.approx(0.5)


def test_an_average_of_the_weights_is_kept_and_goes_on_after_a_resumption(panel, tmp_path):
    config = change(average_steps=10)
    plain, _ = fit(prepare(panel, CONFIG), tmp_path / "plain")
    averaged, summary = fit(prepare(panel, config), tmp_path / "averaged")
    assert not equal(plain, averaged)
    state = read_state(tmp_path / "averaged" / "state.safetensors")["state_dict"]
    assert any(not torch.equal(state["average." + name], state["model." + name]) for name in weights(plain))
    # The averaged run's own weights took the same way as the plain run's.
    last = read_state(tmp_path / "plain" / "state.safetensors")["state_dict"]
    assert all(torch.equal(last["model." + name], state["model." + name]) for name in weights(plain))
    fit(prepare(panel, config), tmp_path / "cut", observer=Listener(stop_epoch=2))
    again, resumed = fit(prepare(panel, config), tmp_path / "cut", resume=True)
    assert equal(again, averaged)
    assert resumed.validation_loss == summary.validation_loss
