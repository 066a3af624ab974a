"""Two processes that share every batch learn what one process learns, and only one of them writes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from trellis_ts.config import DataConfig, ExperimentConfig, TrainingConfig, WindowConfig
from trellis_ts.errors import ConfigError
from trellis_ts.loaders import NOT_COUNTED, EpochSampler, RankBatches, WindowDataModule
from trellis_ts.preparation import prepare

OPTIONS = ["--context-length", "14", "--prediction-length", "4", "--patch-length", "7", "--season-length", "7"]
OPTIONS += ["--width", "8", "--num-heads", "2", "--num-slots", "4", "--num-layers", "1", "--feedforward-width", "8"]
OPTIONS += ["--max-epochs", "3", "--batch-size", "9", "--device", "cpu", "--dropout", "0", "--average-steps", "4"]
OPTIONS += ["--quiet", "--deterministic", "true"]


@pytest.fixture
def table(tmp_path):
    """Two series with holes, so that windows count by what was observed of them."""
    rng, parts = np.random.default_rng(3), []
    for name, length in (("north", 90), ("south", 70)):
        values = 10 + np.sin(2 * np.pi * np.arange(length) / 7) + 0.2 * rng.normal(size=length)
        values[rng.random(length) < 0.2] = np.nan
        day = pd.date_range("2024-01-01", periods=length).strftime("%Y-%m-%d")
        parts.append(pd.DataFrame({"id": name, "day": day, "y": values.round(4)}))
    path = tmp_path / "table.csv"
    pd.concat(parts).to_csv(path, index=False)
    return path


def train(folder, table, *options, expected=0):
    command = [sys.executable, "-W", "ignore", "-m", "trellis_ts", "train", str(table), *OPTIONS, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=560, check=False
    )
    assert done.returncode == expected, done.stderr[-3000:]
    return done


def losses_of(model):
    with (model / "training" / "log.csv").open(newline="") as file:
        return [(float(row["train_loss"]), float(row["validation_loss"])) for row in csv.DictReader(file)]


def test_two_processes_equal_one(tmp_path, table):
    one = train(tmp_path, table, "-o", "one")
    two = train(tmp_path, table, "-o", "two", "--devices", "2")
    assert one.stdout.count("saved to one") == 1
    assert two.stdout.count("saved to two") == 1  # the other process says nothing
    found = losses_of(tmp_path / "two")
    assert len(found) == 3
    np.testing.assert_allclose(found, losses_of(tmp_path / "one"), rtol=1e-5)
    expected, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    calibrations = [(tmp_path / name / "calibration.json").exists() for name in ("one", "two")]
    assert calibrations == [True, True]
    train(tmp_path, table, "-o", "two", "--resume")


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_window_is_one_process_s(num_ranks):
    parts = []
    for rank in range(num_ranks):
        sampler = EpochSampler(50, seed=3, windows_per_epoch=None)
        batches = RankBatches(sampler, 7, rank=rank, num_ranks=num_ranks)
        batches.sampler.set_epoch(2)
        parts.append(list(batches))
        assert len(batches) == len(parts[-1]) == 8
    whole = EpochSampler(50, seed=3, windows_per_epoch=None)
    whole.set_epoch(2)
    order = list(whole)
    for number, pieces in enumerate(zip(*parts, strict=True)):
        assert sorted(each for piece in pieces for each in piece) == sorted(order[7 * number : 7 * number + 7])


def test_a_process_without_a_window_counts_for_nothing(make_panel):
    config = ExperimentConfig(
        data=DataConfig(validation_size=20, test_size=20),
        window=WindowConfig(context_length=14, prediction_length=4, patch_length=7, season_length=7),
        training=TrainingConfig(batch_size=8, device="cpu"),
    )
    preparation = prepare(make_panel((160,)), config)
    data = WindowDataModule(preparation.train, preparation.validation, config.training)
    batch = data.train_dataloader().dataset.__getitems__([])
    assert batch.series.tolist() == [NOT_COUNTED]
    assert not batch.future_observed.any()


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match=r"batch_size=1 is too small to be shared by 2 devices"):
        TrainingConfig(batch_size=1, devices=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "mps"], "device 'mps'"),
        (["--mode", "streaming", "--segment-length", "14"], "does not go with mode=streaming"),
    ],
)
def test_what_has_no_second_device(tmp_path, table, options, words):
    line = train(tmp_path, table, "-o", "m", "--devices", "2", *options, expected=2).stderr.splitlines()[-1]
    assert words in line
