"""Which runs a benchmark consists of, and the packaged settings and published figures."""

from __future__ import annotations

import math
from importlib.resources import files

import pytest
import yaml

from trellis_ts.benchmark.plan import cells_of, choose_names, choose_numbers, plan_for
from trellis_ts.benchmark.published import best_average, best_published, published
from trellis_ts.datasets.long_horizon import benchmark_names, find_benchmark
from trellis_ts.errors import ConfigError


def cells(dataset="ETTh1", **options):
    chosen = {"contestants": ["trellis"], "tracks": ["96"], "seeds": [0]}
    return list(cells_of(plan_for(dataset), dataset, **(chosen | options)))


@pytest.mark.parametrize("name", benchmark_names())
def test_every_benchmark_has_settings_that_can_be_used(name):
    for cell in cells(name, tracks=["96", "free"], contestants=["trellis", "gsa", "none"]):
        config = cell.config()
        assert (config.window.context_length, config.window.prediction_length) == (cell.look_back, cell.horizon)
        assert config.model.mixer == cell.contestant
        assert config.window.patch_length <= cell.look_back
        # Otherwise validation losses of two look-backs could not be compared.
        assert config.training.loss == plan_for(name).settings["loss"]


def test_one_model_serves_all_horizons_unless_asked_otherwise():
    (one,) = cells()
    assert (one.horizon, one.horizons, one.look_back) == (720, (96, 192, 336, 720), 96)
    each = cells(each_horizon=True)
    assert [(cell.horizon, cell.horizons[-1]) for cell in each] == [(96, 96), (192, 192), (336, 336), (720, 720)]
    assert each[-1] == one
    assert [cell.horizon for cell in cells("ILI")] == [60]


def test_the_tracks_share_the_run_at_96():
    looks = [cell.look_back for cell in cells(tracks=["96", "free"])]
    assert looks == [96, 336, 512, 720, 1440]
    assert [cell.look_back for cell in cells(tracks=["free"], look_backs=[48, 336])] == [48, 336]


def test_settings_depend_on_the_look_back_alone():
    short, long = cells(tracks=["free"], look_backs=[96, 336])
    assert (short.settings["patch_length"], long.settings["patch_length"]) == (12, 24)
    assert {key for key in short.settings if short.settings[key] != long.settings[key]} <= {
        "patch_length",
        "seasonal_cycle",
    }


def test_keys_are_unique():
    all_ = cells(tracks=["96", "free"], seeds=[0, 1], contestants=["trellis", "linear"], each_horizon=True)
    assert len({cell.key for cell in all_}) == len(all_) == 2 * 2 * 5 * 4
    (named,) = cells(variant="no_gate", changes={"forget_gate": False})
    assert named.key == "etth1-trellis+no_gate-L96-H720-s0"
    assert named.config().model.forget_gate is False


@pytest.mark.parametrize("name", ["seed", "mixer", "context_length", "prediction_length"])
def test_a_variant_cannot_set_what_the_benchmark_varies(name):
    with pytest.raises(ConfigError, match=f"--variant cannot set {name}"):
        cells(changes={name: 3})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("etth3", "did you mean ETTh"), ("wether", "did you mean Weather"), ("zzzz", "trellis datasets")],
)
def test_an_unknown_data_set(name, expected):
    with pytest.raises(ConfigError, match=expected):
        plan_for(name)


def test_lists_of_names_and_numbers():
    assert choose_names("--mixer", "gsa, trellis,gsa", ["trellis", "gsa"]) == ["gsa", "trellis"]
    assert choose_numbers("--seeds", "3,1", least=0) == [3, 1]
    with pytest.raises(ConfigError, match="did you mean trellis"):
        choose_names("--mixer", "trelis", ["trellis", "gsa"])
    for text in ("", ",", "x", "-1", "1.5"):
        with pytest.raises(ConfigError, match="--seeds"):
            choose_numbers("--seeds", text, least=0)


def test_published_figures_are_plausible():
    """Every figure is a pair of positive errors of a known data set, with a source and what is known of its loader."""
    assert len(published()) > 20
    for each in published():
        assert each.source
        assert each.track in ("96", "free")
        assert each.test_windows in ("all", "dropped", "unknown")
        for dataset, pair in each.average.items():
            assert find_benchmark(dataset) is not None
            assert all(0.05 < error < 3 for error in pair)
        for dataset, pairs in each.horizons.items():
            assert set(pairs) <= set(find_benchmark(dataset).horizons)
            if len(pairs) == 4:  # the printed average is that of the printed horizons, but for rounding
                mean = [math.fsum(pair[metric] for pair in pairs.values()) / 4 for metric in (0, 1)]
                assert each.average[dataset] == pytest.approx(mean, abs=3e-3), (each.name, dataset)


def test_the_best_is_no_worse_than_any_source_with_all_windows():
    for each in published():
        for dataset, pairs in each.horizons.items():
            for horizon, (mse, mae) in pairs.items():
                best = best_published(each.track, dataset, horizon)
                if each.test_windows == "all" and best is not None:
                    assert best.mse <= mse, (each.name, dataset, horizon)
                    assert best.mae <= mae, (each.name, dataset, horizon)
    assert best_average("96", "ETTh1").name == "CycleNet/Linear"
    assert best_average("free", "Exchange").average["Exchange"] == (0.28, 0.364)
    assert best_average("96", "nothing") is None


def test_titans_is_there_and_marked():
    titans = next(each for each in published() if each.name == "Titans LMM")
    assert titans.average["ETTh1"] == (0.42, 0.421)
    assert (titans.look_back, titans.label) == (None, "Titans LMM*")


def test_the_data_files_are_packaged():
    for folder in ("benchmarks", "published"):
        for path in (files("trellis_ts.configs") / folder).iterdir():
            assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
