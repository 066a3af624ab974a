"""What a preset chooses: more where there is more to learn, nothing that was named, and everything explained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trellis_ts.config import ExperimentConfig
from trellis_ts.errors import ConfigError
from trellis_ts.forecaster import Forecaster
from trellis_ts.preparation import prepare
from trellis_ts.presets import PRESET_SETTINGS, DataFacts, choose_settings

FACTS = DataFacts(num_series=10, num_channels=1, num_values=10_000, num_windows=8_000, prediction_length=14)


def test_what_is_named_is_kept_and_all_else_chosen():
    settings, _ = choose_settings(FACTS, "balanced", {"width": 24, "max_time": "9s"})
    assert set(settings) == set(PRESET_SETTINGS) - {"width", "max_time"}
    assert 24 % settings["num_heads"] == 0
    assert settings["feedforward_width"] == 48


@given(
    values=st.integers(10, 10**7),
    windows=st.integers(1, 10**6),
    channels=st.integers(1, 500),
    preset=st.sampled_from(["fast", "balanced", "accurate"]),
    named=st.fixed_dictionaries(
        {},
        optional={"width": st.integers(1, 40), "num_heads": st.integers(1, 7), "batch_size": st.integers(1, 99)},
    ),
)
def test_any_facts_give_a_valid_configuration(values, windows, channels, preset, named):
    if {"width", "num_heads"} <= named.keys():
        named["width"] *= named["num_heads"]
    facts = replace(FACTS, num_values=values, num_windows=windows, num_channels=channels)
    settings, reasons = choose_settings(facts, preset, named)
    config = ExperimentConfig.of(**named, **settings)
    assert config.training.windows_per_epoch <= windows
    assert config.training.average_steps >= 1
    assert len(reasons) == 2


def test_more_data_and_more_effort_give_larger_models():
    sizes = [
        [choose_settings(replace(FACTS, num_values=values), preset, {}).settings["width"] for values in (500, 10**6)]
        for preset in ("fast", "balanced", "accurate")
    ]
    assert sizes[0] <= sizes[1] <= sizes[2]
    assert all(small < large for small, large in sizes)


def test_a_panel_is_looked_at(make_panel):
    panel = make_panel((24 * 70,), freq="h", season_length=24)
    preparation = prepare(panel, ExperimentConfig.of(preset="fast", num_slots=5))
    assert preparation.config.model.num_slots == 5
    assert preparation.shape.context_length == 192
    assert preparation.reasons[0] == "found a season of 24 steps (autocorrelation 0.98)"
    assert preparation.reasons[1].startswith("fast: 1 layer of width ")


def test_without_a_preset_nothing_is_chosen(make_panel):
    preparation = prepare(make_panel((200,)), ExperimentConfig.of())
    assert preparation.reasons == ()
    assert preparation.config.model == ExperimentConfig().model


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"there is no preset 'acurate'; did you mean accurate\?"):
        ExperimentConfig.of(preset="acurate")
    with pytest.raises(ConfigError, match="there are fast, balanced, accurate"):
        ExperimentConfig.of(preset="xyz")


@pytest.mark.parametrize("poison", [np.nan, 1e9])
def test_rows_held_out_for_the_test_move_no_choice_and_no_weight(poison):
    """Lengths, seasons, sizes, the start of the skip, steps, weights and bands are those of the rows before."""
    steps = np.arange(200)
    rng = np.random.default_rng(0)
    parts = [
        pd.DataFrame(
            {
                "shop": shop,
                "day": pd.date_range("2024-01-01", periods=200),
                "units": level + 10 * np.sin(2 * np.pi * steps / 7) + rng.normal(size=200),
            }
        )
        for shop, level in (("north", 50), ("south", 90))
    ]
    clean = pd.concat(parts, ignore_index=True)
    poisoned = clean.copy()
    poisoned.loc[poisoned.groupby("shop").cumcount() >= 170, "units"] = poison
    settings = {"id": "shop", "test_size": 30, "prediction_length": 7, "max_epochs": 1, "windows_per_epoch": 64}
    one, other = (Forecaster.fit(each, preset="fast", **settings).checkpoint for each in (clean, poisoned))
    assert one.experiment == other.experiment
    assert one.model.shape == other.model.shape
    assert one.data == other.data
    assert one.calibration == other.calibration
    weights = other.model.state_dict()
    assert all(torch.equal(each, weights[name]) for name, each in one.model.state_dict().items())
