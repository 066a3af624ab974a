"""The state of a training: it holds everything, it is whole or not there, and nothing in it is ever executed."""

from __future__ import annotations

import errno
import math
import os
import sys
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch

from trellis_ts import recovery
from trellis_ts.config import DataConfig, ExperimentConfig, ModelConfig, TrainingConfig, WindowConfig
from trellis_ts.errors import CheckpointError, ConfigError
from trellis_ts.preparation import prepare
from trellis_ts.recovery import STATE_FILE, read_state, write_state
from trellis_ts.training import SilentObserver, fit

# Everything a state has to hold: dropout's random numbers, an average of the weights, a solved start, early stopping.
CONFIG = ExperimentConfig(
    data=DataConfig(validation_size=20, test_size=20),
    window=WindowConfig(context_length=14, prediction_length=4, patch_length=7, season_length=7),
    model=ModelConfig(width=8, num_heads=2, num_slots=4, num_layers=1, feedforward_width=8, dropout=0.2),
    training=TrainingConfig(
        max_epochs=4, batch_size=32, learning_rate=0.01, device="cpu", average_steps=5, initial_skip="ridge"
    ),
)

pytestmark = pytest.mark.usefixtures("quiet_lightning")


class Stopper(SilentObserver):
    """Asks to stop after some steps, or in the middle of its second epoch."""

    def __init__(self, step=None):
        self.left = step

    def started(self, *, num_epochs, steps_per_epoch, first_epoch):
        self.left = steps_per_epoch + 1 if self.left is None else self.left

    def stepped(self):
        self.left -= 1

    def should_stop(self):
        return self.left == 0


def equal(one, other):
    weights = other.model.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in one.model.state_dict().items())


@pytest.fixture(scope="module")
def panel(make_panel):
    return make_panel((160,), noise=0.2)


@pytest.fixture
def whole(panel, tmp_path):
    return fit(prepare(panel, CONFIG), tmp_path / "whole")


def test_a_state_is_read_as_it_was_written(tmp_path):
    state = {
        "weights": OrderedDict(a=torch.randn(3, 2), b=torch.tensor(7), empty=torch.zeros(0, 3)),
        "by_number": {0: {"step": torch.tensor(4.0), "half": torch.randn(2).bfloat16()}, 1: None},
        "pair": (0.9, 0.999),
        "list": [1, True, "text", -math.inf, 1e-300, [(), {}]],
        "seed": (1 << 62) + 1,
        "view": torch.arange(12.0).reshape(3, 4).T,
    }
    write_state(tmp_path / "state", state)
    found = read_state(tmp_path / "state")
    assert str(found) == str({**state, "weights": dict(state["weights"])})
    assert isinstance(found["pair"], tuple)
    assert torch.equal(found["weights"]["a"], state["weights"]["a"])
    assert found["by_number"][0]["half"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_what_would_have_to_be_pickled_is_not_written(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a Stopper"):
        write_state(tmp_path / "state", {"callback": Stopper(1)})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "state", ['{"reduce": ["os.system", "true"]}', '{"tensor": "9"}', "[" * 5000, "3", '{"dict": 3}', '{"dict": [[1]]}']
)
def test_a_forged_state_is_refused(tmp_path, state):
    from safetensors.torch import save_file

    metadata = {"format": "trellis_ts.training", "version": "1", "state": state, "sha256": recovery._digest(state, {})}
    save_file({}, tmp_path / "state", metadata)
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(tmp_path / "state")
    save_file({}, tmp_path / "state", metadata | {"version": "2"})
    with pytest.raises(CheckpointError, match="newer trellis"):
        read_state(tmp_path / "state")


@pytest.mark.parametrize("stop", [4, 6, 8, 15])  # at the end of an epoch, and within one
def test_wherever_it_was_stopped_a_run_ends_the_same(whole, panel, tmp_path, stop):
    fit(prepare(panel, CONFIG), tmp_path / "cut", observer=Stopper(stop))
    resumed, summary = fit(prepare(panel, CONFIG), tmp_path / "cut", resume=True)
    assert equal(whole[0], resumed)
    assert resumed.calibration == whole[0].calibration
    assert replace(summary, seconds=0) == replace(whole[1], seconds=0)


def test_a_streaming_model_ends_the_same(panel, tmp_path):
    config = replace(CONFIG, model=replace(CONFIG.model, mode="streaming"))
    config = config.replace_settings(initial_skip="zero", patch_length=7, segment_length=14, stream_length=28)
    expected, _ = fit(prepare(panel, config), tmp_path / "whole")
    fit(prepare(panel, config), tmp_path / "cut", observer=Stopper())
    resumed, _ = fit(prepare(panel, config), tmp_path / "cut", resume=True)
    assert equal(expected, resumed)


def test_a_run_whose_patience_had_run_out_takes_no_step_more(panel, tmp_path):
    config = CONFIG.replace_settings(learning_rate=1.0, max_epochs=50, patience=2)
    expected, before = fit(prepare(panel, config), tmp_path)
    assert before.stop_reason == "patience"
    observer = Stopper(-1)
    resumed, summary = fit(prepare(panel, config), tmp_path, observer=observer, resume=True)
    assert observer.left == -1
    assert replace(summary, seconds=0) == replace(before, seconds=0)
    assert equal(expected, resumed)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_a_full_disk_leaves_the_state_before(whole, panel, tmp_path, monkeypatch, epoch):
    from trellis_ts import files

    folder, fsync, count = tmp_path / "full", os.fsync, 0

    def full(descriptor):
        nonlocal count
        is_state = STATE_FILE in os.readlink(f"/proc/self/fd/{descriptor}")
        count += is_state
        if is_state and count == epoch:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(descriptor)

    with monkeypatch.context() as context:
        context.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            fit(prepare(panel, CONFIG), folder)
    assert not list(folder.glob(".*"))
    if epoch == 1:
        assert not (folder / STATE_FILE).exists()
        with pytest.raises(ConfigError, match="nothing to resume"):
            fit(prepare(panel, CONFIG), folder, resume=True)
        return
    resumed, _ = fit(prepare(panel, CONFIG), folder, resume=True)
    assert equal(whole[0], resumed)


def test_what_a_killed_run_left_half_written_is_cleared_away(whole, panel, tmp_path):
    fit(prepare(panel, CONFIG), tmp_path / "cut", observer=Stopper(8))
    (tmp_path / "cut" / f".{STATE_FILE}.x7a").write_bytes(b"half of it")
    with (tmp_path / "cut" / "log.csv").open("a") as file:
        file.write("3,12,0.10,9.9,9.9,0.001\n4,1")  # an epoch whose state was never written, and half a line
    resumed, _ = fit(prepare(panel, CONFIG), tmp_path / "cut", resume=True)
    assert equal(whole[0], resumed)
    assert not list((tmp_path / "cut").glob(".*"))
    rows = (tmp_path / "cut" / "log.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3", "4"]
    assert "9.9" not in "".join(rows)


def test_deterministic_operations_are_asked_for_and_given_back(panel, tmp_path):
    seen = []

    class Watch(SilentObserver):
        def stepped(self):
            seen.append(torch.are_deterministic_algorithms_enabled())

    config = CONFIG.replace_settings(deterministic=True, max_epochs=1)
    one, _ = fit(prepare(panel, config), tmp_path / "one", observer=Watch())
    other, _ = fit(prepare(panel, config), tmp_path / "other")
    assert seen == [True] * len(seen) != []
    assert not torch.are_deterministic_algorithms_enabled()
    assert equal(one, other)


def test_no_clock_decides_where_bits_are_to_repeat(panel):
    with pytest.raises(ConfigError, match=r"lets no clock decide, so max_time=1h"):
        CONFIG.replace_settings(deterministic=True, max_time="1h")
    chosen = prepare(panel, ExperimentConfig.of(preset="fast", deterministic=True)).config.training
    assert (chosen.deterministic, chosen.max_time) == (True, None)


def test_no_pickle_is_read_or_written(panel, tmp_path, monkeypatch):
    import pickle

    def refuse(*_, **__):
        raise AssertionError("a pickle")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    fit(prepare(panel, CONFIG), tmp_path, observer=Stopper(6))
    fit(prepare(panel, CONFIG), tmp_path, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"log.csv", "tensorboard", STATE_FILE}
