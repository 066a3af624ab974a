"""Training starts from a linear forecast that is solved for, and never ends worse than that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trellis_ts.checkpoints import build_model
from trellis_ts.config import ExperimentConfig
from trellis_ts.errors import ConfigError
from trellis_ts.lightning import ForecastModule
from trellis_ts.linear_start import start_from_linear
from trellis_ts.loaders import WindowDataModule
from trellis_ts.preparation import prepare
from trellis_ts.training import fit

SETTINGS = {"num_layers": 1, "width": 8, "num_heads": 2, "num_slots": 3, "feedforward_width": 8, "device": "cpu"}
SETTINGS |= {"context_length": 21, "prediction_length": 7, "patch_length": 7, "max_epochs": 1, "batch_size": 16}

pytestmark = pytest.mark.usefixtures("quiet_lightning")


def started(panel, **settings):
    preparation = prepare(panel, ExperimentConfig.of(**(SETTINGS | settings)))
    model = build_model(preparation.config, preparation.shape)
    name = start_from_linear(model, preparation.train, preparation.seasons, torch.Generator().manual_seed(0))
    return model.eval(), preparation, name


def score(model, preparation):
    data = WindowDataModule(preparation.train, preparation.validation, preparation.config.training)
    return ForecastModule(model, preparation.config.training).score(data.val_dataloader())


def test_a_pure_season_is_forecast_at_once(make_panel):
    model, preparation, name = started(make_panel((200,), noise=0.0), calendar_features=False)
    assert name.endswith("the last season of 7")
    batch = preparation.validation[0]
    with torch.no_grad():
        assert (model(batch).point - batch.future).abs().max() < 0.02


@pytest.mark.parametrize("transform", ["none", "asinh"])
def test_a_walk_is_forecast_by_its_last_value(make_panel, transform):
    panel = make_panel((300,))
    panel.series[0].values[:] = torch.randn(300, 1, generator=torch.Generator().manual_seed(1)).cumsum(0).numpy()
    model, preparation, name = started(panel, calendar_features=False, transform=transform)
    assert "the last value" in name
    batch = preparation.validation[3]
    with torch.no_grad():
        drift = (model(batch).point - batch.context[:, -1:]).abs().mean()
    assert drift < 0.5 * batch.context.diff(dim=1).abs().mean() * 7


def test_quantiles_are_those_of_the_errors(make_panel):
    model, preparation, _ = started(make_panel((900,), noise=0.5), quantile_levels=(0.1, 0.5, 0.9))
    batch = preparation.train.__getitems__(list(range(len(preparation.train))))
    with torch.no_grad():
        quantiles = model(batch).quantiles
    below = (batch.future[..., None] <= quantiles).float().mean(dim=(0, 1, 2))
    assert torch.allclose(below, torch.tensor([0.1, 0.5, 0.9]), atol=0.06)


@pytest.mark.parametrize("loss", ["mae", "student_t"])
def test_other_outputs(make_panel, loss):
    panel = make_panel((300,), noise=0.3, channels=2, missing=0.1)
    model, preparation, _ = started(panel, loss=loss)
    fresh = build_model(preparation.config, preparation.shape)
    assert score(model, preparation) < score(fresh, preparation)


def test_the_start_is_kept_where_training_only_harms(make_panel, tmp_path):
    panel = make_panel((200,), noise=0.2)
    config = ExperimentConfig.of(**(SETTINGS | {"initial_skip": "ridge", "learning_rate": 3.0}))
    checkpoint, summary = fit(prepare(panel, config), tmp_path)
    assert summary.best_epoch == 0
    assert score(checkpoint.model, prepare(panel, config)) == pytest.approx(summary.validation_loss, rel=1e-5)
    again, resumed = fit(prepare(panel, config), tmp_path, resume=True)
    assert resumed.best_epoch == 0
    assert all(
        torch.equal(value, again.model.state_dict()[key]) for key, value in checkpoint.model.state_dict().items()
    )


def test_training_goes_on_from_the_start(make_panel, tmp_path):
    panel = make_panel((300,), noise=0.2)
    config = ExperimentConfig.of(**(SETTINGS | {"initial_skip": "ridge", "max_epochs": 4}))
    model, preparation, _ = started(panel)
    _, summary = fit(prepare(panel, config), tmp_path)
    assert summary.validation_loss <= score(model, preparation) + 1e-6


def test_peaks_are_transformed_and_growth_is_not(make_panel):
    """Counts with rare peaks of a hundredfold, and a season that grows by a constant share."""
    rng = np.random.default_rng(0)
    peaks, growth = make_panel((400,)), make_panel((400,))
    peaks.series[0].values[:] = rng.poisson(3, (400, 1)) * np.where(rng.random((400, 1)) < 0.05, 100, 1)
    steps = np.arange(400)[:, None]
    growth.series[0].values[:] = np.exp(steps / 60) * (2 + np.sin(2 * np.pi * steps / 7))
    for panel, expected in ((peaks, "asinh"), (growth, "none")):
        preparation = prepare(panel, ExperimentConfig.of(preset="fast", context_length=56, prediction_length=14))
        assert preparation.config.model.transform == expected
        assert any("asinh" in line for line in preparation.reasons) == (expected == "asinh")


@pytest.mark.parametrize("loss", ["mse", "huber", "student_t"])
def test_means_are_not_transformed(make_panel, loss):
    with pytest.raises(ConfigError, match=f"transform=asinh does not go with mode=window, loss={loss}"):
        prepare(make_panel((200,)), ExperimentConfig.of(transform="asinh", loss=loss))
    assert prepare(make_panel((200,)), ExperimentConfig.of(preset="fast", loss=loss)).config.model.transform == "none"


def test_what_cannot_be_solved_is_refused(make_panel):
    with pytest.raises(ConfigError, match="initial_skip=ridge needs linear_skip, instance_norm"):
        prepare(make_panel((200,)), ExperimentConfig.of(initial_skip="ridge", linear_skip=False))
