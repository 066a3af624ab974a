"""Losses and gradients that are not finite: the step is left out and its window named, the best model stays."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from trellis_ts.config import DataConfig, ExperimentConfig, ModelConfig, TrainingConfig, WindowConfig
from trellis_ts.datasets.windows import WindowDataset
from trellis_ts.errors import TrellisError
from trellis_ts.lightning import ForecastModule
from trellis_ts.preparation import prepare
from trellis_ts.safety import MOST_IN_A_ROW
from trellis_ts.training import SilentObserver, fit

CONFIG = ExperimentConfig(
    data=DataConfig(validation_size=20, test_size=20),
    window=WindowConfig(context_length=14, prediction_length=4, patch_length=7, season_length=7),
    model=ModelConfig(width=8, num_heads=2, num_slots=4, num_layers=1, feedforward_width=8),
    training=TrainingConfig(max_epochs=3, batch_size=32, learning_rate=0.01, device="cpu"),
)

pytestmark = pytest.mark.usefixtures("quiet_lightning")


class Listener(SilentObserver):
    def __init__(self):
        self.lines, self.losses = [], []

    def warned(self, line):
        self.lines.append(line)

    def epoch_ended(self, report):
        self.losses.append((report.train_loss, report.validation_loss))


@pytest.fixture(scope="module")
def panel(make_panel):
    return make_panel((90, 120), noise=0.2)


@pytest.fixture
def poisoned(monkeypatch):
    """Puts a number in the place of a value, in the context of windows of series 1 whose future begins at row 40."""
    gather = WindowDataset.__getitems__

    def poison(number, *, series=1, rows=(40,)):
        def poisoned_gather(windows, indices):
            batch = gather(windows, indices)
            hit = (batch.series == series) & torch.isin(batch.origin, torch.tensor(rows))
            context = torch.where(hit[:, None, None], number, batch.context)
            return batch._replace(context=context)

        monkeypatch.setattr(WindowDataset, "__getitems__", poisoned_gather)

    return poison


def test_the_step_is_left_out_and_the_window_named(panel, tmp_path, poisoned):
    poisoned(float("nan"))
    listener = Listener()
    checkpoint, summary = fit(prepare(panel, CONFIG), tmp_path, observer=listener)
    assert (summary.stop_reason, summary.num_epochs, summary.left_out_steps) == ("epochs", 3, 3)  # once an epoch
    assert len(listener.lines) == 3
    for line in listener.lines:
        assert re.fullmatch(
            r"step \d+: the loss is not finite, so the step is left out; "
            r"not finite in its batch: windows of series 's1' at 2024-02-10T00:00:00",
            line,
        )
    assert all(np.isfinite(each).all() for each in listener.losses)
    assert all(value.isfinite().all() for value in checkpoint.model.state_dict().values())
    assert listener.losses[-1][0] < listener.losses[0][0]


def test_a_step_left_out_changes_neither_weights_nor_moments(panel, tmp_path, monkeypatch):
    before = []
    clip = ForecastModule.configure_gradient_clipping

    def watch(module, optimizer, *arguments, **options):
        if module.trainer.global_step == 1:
            module._step = module._step._replace(loss=torch.tensor(torch.inf))
        if module.trainer.global_step in (1, 2):
            state = [value.clone() for each in optimizer.state.values() for value in each.values()]
            before.append(([each.detach().clone() for each in module.model.parameters()], state))
        clip(module, optimizer, *arguments, **options)

    monkeypatch.setattr(ForecastModule, "configure_gradient_clipping", watch)
    _, summary = fit(prepare(panel, CONFIG.replace_settings(max_epochs=1)), tmp_path)
    assert summary.left_out_steps == 1
    (weights, state), (weights_after, state_after) = before
    assert len(state) > 0
    for one, other in zip(weights + state, weights_after + state_after, strict=True):
        assert torch.equal(one, other)


def test_a_gradient_that_is_not_finite_though_the_loss_is(panel, tmp_path, monkeypatch):
    step, count = ForecastModule.training_step, 0

    def steep(module, batch, index):
        nonlocal count
        count += 1
        loss = step(module, batch, index)
        if count == 3:  # zero to the half: a slope without end
            loss = loss + (next(module.model.parameters()).sum() * 0).sqrt()
        return loss

    monkeypatch.setattr(ForecastModule, "training_step", steep)
    listener = Listener()
    _, summary = fit(prepare(panel, CONFIG.replace_settings(max_epochs=1)), tmp_path, observer=listener)
    assert summary.left_out_steps == 1
    (line,) = listener.lines
    assert line.startswith("step 3: the gradient is not finite, so the step is left out; its batch: windows of series")
    assert line.endswith("and 29 more")


def test_too_many_in_a_row_end_the_training_with_the_best_epoch(panel, tmp_path, monkeypatch):
    """From the second epoch on nothing is finite; the first epoch's model is kept."""
    config = CONFIG.replace_settings(max_epochs=30, batch_size=16)
    one, _ = fit(prepare(panel, config.replace_settings(max_epochs=1)), tmp_path / "one")
    loss = ForecastModule._loss

    def breaks(module, model, batch):
        broken = module.trainer.training and module.trainer.current_epoch > 0
        return loss(module, model, batch) * (torch.nan if broken else 1.0)

    monkeypatch.setattr(ForecastModule, "_loss", breaks)
    listener = Listener()
    _, summary = fit(prepare(panel, config), tmp_path / "two", observer=listener)
    assert (summary.stop_reason, summary.left_out_steps) == ("diverged", MOST_IN_A_ROW)
    assert summary.best_epoch >= 1
    assert np.isfinite(summary.validation_loss)
    assert len(listener.lines) == MOST_IN_A_ROW
    assert one.model.state_dict().keys()


def test_a_diverging_model_is_an_error_even_where_its_start_was_fine(panel, tmp_path, monkeypatch):
    loss = ForecastModule._loss

    def breaks(module, model, batch):
        return loss(module, model, batch) * (torch.nan if module._trainer is not None else 1.0)

    monkeypatch.setattr(ForecastModule, "_loss", breaks)
    with pytest.raises(TrellisError, match=r"training diverged.*--learning-rate"):
        fit(prepare(panel, CONFIG.replace_settings(initial_skip="ridge")), tmp_path)


def test_streaming_steps_are_left_out_too(panel, tmp_path, monkeypatch):
    from trellis_ts.lightning import StreamModule

    score, count = StreamModule._score, 0

    def breaks(module, model, segment):
        nonlocal count
        count += module.trainer.training
        loss, weight = score(module, model, segment)
        return loss * (torch.nan if count == 2 and module.trainer.training else 1.0), weight

    monkeypatch.setattr(StreamModule, "_score", breaks)
    config = replace(CONFIG, model=replace(CONFIG.model, mode="streaming"))
    config = config.replace_settings(segment_length=14, stream_length=28)
    listener = Listener()
    checkpoint, summary = fit(prepare(panel, config), tmp_path, observer=listener)
    assert summary.left_out_steps == 1
    assert "stretches of series 's" in listener.lines[0]
    assert all(value.isfinite().all() for value in checkpoint.model.state_dict().values())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_anomalies_are_traced_to_a_layer(panel, tmp_path, monkeypatch, where):
    from trellis_ts.layers import block

    forward = block.SwiGLU.forward

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(context, tensor):
            return tensor.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * torch.nan

    def broken(layer, tokens):
        output = forward(layer, tokens)
        return output * torch.inf if where == "forward" else Steep.apply(output)

    monkeypatch.setattr(block.SwiGLU, "forward", broken)
    config = CONFIG.replace_settings(detect_anomaly=True)
    expected = {
        "forward": r"the output of layer 'blocks\.0\.feedforward' \(SwiGLU\)",
        "backward": r"the gradient of 'blocks\.0\.feedforward\.down",
    }
    with pytest.raises(TrellisError, match=f"--detect-anomaly: {expected[where]}.* is the first that is not finite; "):
        fit(prepare(panel, config), tmp_path)


def test_looking_for_anomalies_changes_nothing_and_leaves_nothing(panel, tmp_path):
    plain, _ = fit(prepare(panel, CONFIG), tmp_path / "plain")
    looked, _ = fit(prepare(panel, CONFIG.replace_settings(detect_anomaly=True)), tmp_path / "looked")
    weights = looked.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.model.state_dict().items())
    assert not any(module._forward_hooks for module in looked.model.modules())
