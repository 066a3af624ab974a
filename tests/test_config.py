"""Settings: what a file may say, what the defaults are, and what is refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import trellis_ts.config as config_module
from trellis_ts.commands.configuration import experiment_config, flat_config
from trellis_ts.commands.train import parser
from trellis_ts.config import (
    SECTIONS,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    TrainingConfig,
    WindowConfig,
    WindowShape,
)
from trellis_ts.datasets.long_horizon import benchmark_names
from trellis_ts.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def load(path, *options):
    return experiment_config(parser().parse_args(["data.csv", "--config", str(path), *options]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_packaged_file_is_an_experiment(path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    flat = flat_config(load(path))
    assert values
    assert {key: flat[key] for key in values} == values


def test_every_benchmark_has_a_file():
    assert {name.lower() for name in benchmark_names()} <= {path.stem for path in CONFIGS}


def test_an_option_overrides_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("width: 32\nquantile_levels: [0.2, 0.8]\nmax_time: 5m\ntarget: [load]\n")
    config = load(path, "--width", "48")
    assert (config.model.width, config.training.quantile_levels) == (48, (0.2, 0.8))
    assert config.training.max_time_seconds == 300
    assert config.data.target == ("load",)


def test_a_misspelt_key_is_refused_with_the_nearest(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("contxt_length: 32\n")
    with pytest.raises(ConfigError, match=r"contxt_length.*context_length"):
        load(path)


@pytest.mark.parametrize(
    "line",
    ["width: wide", "width: 1.5", "width: null", "num_layers:", "loss:", "loss: rmse", "test_size:", "dropout: [1]"],
)
def test_a_value_of_another_kind_is_refused_by_name(tmp_path, line):
    path = tmp_path / "mine.yaml"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=line.split(":")[0].replace("_", "[-_]")):
        load(path)


def test_flat_settings_read_back_the_same(tmp_path):
    config = ExperimentConfig(
        data=DataConfig(target=("a", "b"), validation_size=12),
        window=WindowConfig(context_length=96, prediction_length=24),
        model=ModelConfig(width=8, num_heads=2, linear_skip=False),
        training=TrainingConfig(max_time="90s", quantile_levels=(0.25, 0.5), weight_decay=0.0),
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(flat_config(config)))
    assert load(path) == config


def test_keys_are_unique_over_the_sections():
    keys = [each.name for section in SECTIONS.values() for each in fields(section)]
    assert len(keys) == len(set(keys))
    assert {each.name: each.type for each in fields(ExperimentConfig)} == {
        name: section.__name__ for name, section in SECTIONS.items()
    } | {"preset": "Preset | None", "named": "tuple[str, ...]"}


def test_every_field_has_a_help_text():
    shown = parser().format_help()
    for section in SECTIONS.values():
        for each in fields(section):
            assert f"--{each.name.replace('_', '-')}" in shown
    helps = {action.dest: action.help for action in parser()._actions}
    missing = [each.name for section in SECTIONS.values() for each in fields(section) if not helps.get(each.name)]
    assert missing == []


def test_defaults_stay_what_they_are():
    config = ExperimentConfig()
    assert flat_config(config) == flat_config(config) | {
        "validation_size": 0.1,
        "test_size": 0.1,
        "context_length": None,
        "prediction_length": None,
        "mixer": "trellis",
        "channel_mixing": "none",
        "forget_gate": True,
        "output_activation": "identity",
        "num_layers": 2,
        "width": 64,
        "num_heads": 4,
        "num_slots": 16,
        "write_activation": "silu",
        "read_activation": "ln_silu",
        "step_size_form": "bounded",
        "initial_memory": "zero",
        "chunk_length": 1,
        "second_order": True,
        "pooling": "flatten",
        "instance_norm": True,
        "seasonal_cycle": False,
        "linear_skip": True,
        "dropout": 0.0,
        "loss": "quantile",
        "quantile_levels": [0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975],
        "learning_rate": 1e-3,
        "batch_size": 64,
        "max_epochs": 30,
        "patience": 5,
        "max_time": None,
        "seed": 0,
        "device": "auto",
        "precision": "32",
        "num_workers": 0,
        "implementation": "auto",
    }


def test_settings_cannot_be_changed_in_place():
    for section in (DataConfig(), WindowConfig(), ModelConfig(), TrainingConfig()):
        with pytest.raises(FrozenInstanceError):
            setattr(section, fields(section)[0].name, None)
    assert replace(ModelConfig(), width=32).head_dim == 8


SHAPE = WindowShape(
    context_length=12, prediction_length=3, patch_length=4, patch_stride=2, season_length=7, num_channels=2
)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        (DataConfig(), {"validation_size": -0.1}),
        (DataConfig(), {"validation_size": 0}),
        (DataConfig(), {"validation_size": 1.5}),
        (DataConfig(), {"validation_size": float("inf")}),
        (DataConfig(), {"test_size": -1}),
        (DataConfig(), {"test_size": float("nan")}),
        (DataConfig(), {"target": ()}),
        (WindowConfig(), {"context_length": 0}),
        (WindowConfig(), {"season_length": -7}),
        (WindowConfig(), {"prediction_length": 1 << 40}),
        (SHAPE, {"patch_length": 13}),
        (SHAPE, {"patch_stride": 5}),
        (SHAPE, {"num_channels": 0}),
        (ModelConfig(), {"width": 0}),
        (ModelConfig(), {"width": 1 << 30}),
        (ModelConfig(), {"width": 30}),
        (ModelConfig(), {"num_heads": 3}),
        (ModelConfig(), {"num_slots": -1}),
        (ModelConfig(), {"num_layers": 1001}),
        (ModelConfig(), {"dropout": 1.0}),
        (ModelConfig(), {"dropout": float("nan")}),
        (ModelConfig(), {"write_epsilon": 0.0}),
        (ModelConfig(), {"write_epsilon": float("inf")}),
        (TrainingConfig(), {"quantile_levels": ()}),
        (TrainingConfig(), {"quantile_levels": (0.5, 0.1)}),
        (TrainingConfig(), {"quantile_levels": (0.5, 0.5)}),
        (TrainingConfig(), {"quantile_levels": (0.0, 0.5)}),
        (TrainingConfig(), {"quantile_levels": (0.5, 1.0)}),
        (TrainingConfig(), {"quantile_levels": (float("nan"),)}),
        (TrainingConfig(), {"learning_rate": 0.0}),
        (TrainingConfig(), {"learning_rate": float("nan")}),
        (TrainingConfig(), {"learning_rate": float("inf")}),
        (TrainingConfig(), {"weight_decay": -1.0}),
        (TrainingConfig(), {"weight_decay": float("inf")}),
        (TrainingConfig(), {"gradient_clip": 0.0}),
        (TrainingConfig(), {"num_workers": -1}),
        (TrainingConfig(), {"seed": -1}),
        (TrainingConfig(), {"seed": 1 << 32}),
        (TrainingConfig(), {"batch_size": 0}),
        (TrainingConfig(), {"max_epochs": 0}),
        (TrainingConfig(), {"patience": 0}),
        (TrainingConfig(), {"windows_per_epoch": 0}),
    ],
)
def test_what_cannot_be_is_refused_by_name(section, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))) as error:
        replace(section, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("2m", 120), ("1.5h", 5400), (" 3 M ", 180), ("0.5s", 0.5), ("1e2s", 100)],
)
def test_durations(text, seconds):
    assert TrainingConfig(max_time=text).max_time_seconds == seconds


@pytest.mark.parametrize("text", ["", " ", "90", "s", "2d", "m2", "1h30m", "-5s", "0s", "nans", "infs", "1e999h", "٣x"])
def test_nonsense_durations_are_refused(text):
    with pytest.raises(ConfigError, match="max_time="):
        TrainingConfig(max_time=text)


@given(context=st.integers(1, 200), patch=st.integers(1, 40), stride=st.integers(1, 40), horizon=st.integers(1, 5))
def test_patches_cover_the_context_and_no_more_than_needed(context, patch, stride, horizon):
    if patch > context or stride > patch:
        with pytest.raises(ConfigError):
            WindowShape(context, horizon, patch, stride, 1, 1)
        return
    shape = WindowShape(context, horizon, patch, stride, 1, 1)
    covered = (shape.num_patches - 1) * stride + patch
    assert covered >= context
    assert covered - stride < context


def test_the_two_lists_of_implementations_agree():
    from trellis_ts.kernels import dispatch

    assert config_module.Implementation.__args__ == dispatch.Implementation.__args__
    assert set(config_module.Implementation.__args__) == {"auto", *dispatch.IMPLEMENTATIONS}
