"""A time limit holds several validations, whatever the length of the table."""

from __future__ import annotations

import pytest

from trellis_ts import pacing
from trellis_ts.config import ExperimentConfig
from trellis_ts.forecaster import Forecaster
from trellis_ts.preparation import prepare
from trellis_ts.training import fit

SETTINGS = {"num_layers": 1, "width": 8, "num_heads": 2, "num_slots": 3, "feedforward_width": 8, "batch_size": 16}
SETTINGS |= {"context_length": 21, "prediction_length": 7, "patch_length": 7, "device": "cpu"}

pytestmark = pytest.mark.usefixtures("quiet_lightning")


def paced(panel, monkeypatch, seconds_per_step, **settings):
    monkeypatch.setattr(pacing, "_seconds_per_step", lambda _: seconds_per_step)
    return pacing.fit_to_time(prepare(panel, ExperimentConfig.of(**(SETTINGS | settings))))


def test_epochs_are_shortened_where_they_do_not_fit(make_panel, monkeypatch):
    panel = make_panel((3000,))
    preparation = paced(panel, monkeypatch, 0.1, max_time="20s", preset="balanced")
    training = preparation.config.training
    steps, forwards = training.windows_per_epoch / 16, len(preparation.validation) / 16
    assert 0.8 * 20 < 8 * 0.1 * (steps + 0.35 * forwards) <= 20 * 1.05
    assert training.validation_windows == len(preparation.validation)
    assert preparation.reasons[-1].startswith("a step takes 100 ms here: epochs of ")
    assert preparation.reasons[-1].endswith("so that 20s holds 8")


@pytest.mark.parametrize("settings", [{"max_time": "1h"}, {}, {"max_time": "1s", "windows_per_epoch": 800}])
def test_what_fits_has_no_limit_or_was_named_is_left(make_panel, monkeypatch, settings):
    preparation = prepare(make_panel((3000,)), ExperimentConfig.of(**SETTINGS, **settings))
    monkeypatch.setattr(pacing, "_seconds_per_step", lambda _: 0.1)
    assert pacing.fit_to_time(preparation) is preparation


def test_three_epochs_that_were_asked_for_stay_three(make_panel, monkeypatch):
    preparation = paced(make_panel((3000,)), monkeypatch, 0.1, max_time="6s", max_epochs=3)
    assert preparation.config.training.max_epochs == 3
    assert preparation.reasons[-1].endswith("so that 6s holds 3")


def test_a_step_is_measured_and_a_short_run_on_a_long_table_is_validated(make_panel, tmp_path):
    panel = make_panel((20_000,))
    config = ExperimentConfig.of(**SETTINGS, max_time="3s", max_epochs=50)
    preparation = pacing.fit_to_time(prepare(panel, config))
    assert preparation.config.training.windows_per_epoch < len(preparation.train) / 4
    checkpoint, summary = fit(preparation, tmp_path)
    assert (summary.stop_reason, summary.num_epochs >= 1) == (
        "time",
        True,
    )  # how many depends on the machine's other work
    assert Forecaster(checkpoint).forecast(panel).point.isfinite().all()
