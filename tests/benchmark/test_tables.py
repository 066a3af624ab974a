"""From results to tables: seeds, look-backs chosen on validation, prefixes and single models."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from trellis_ts.benchmark.results import entries_of, of_track
from trellis_ts.benchmark.tables import write_tables
from trellis_ts.errors import ConfigError

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "long_horizon"


def result(**changes):
    made = {
        "format": "trellis_ts.benchmark",
        "dataset": "ETTh1",
        "contestant": "trellis",
        "variant": "",
        "look_back": 96,
        "horizon": 720,
        "seed": 0,
        "scores": {
            str(horizon): {"num_windows": 2881 - horizon, "mse": 0.4 + horizon / 10000, "mae": 0.4}
            for horizon in (96, 192, 336, 720)
            if horizon <= changes.get("horizon", 720)
        },
        "validation_loss": 0.5,
        "best_epoch": 3,
        "num_epochs": 6,
        "num_parameters": 1234,
        "train_seconds": 60.0,
        "train_processor_seconds": 50.0,
        "test_seconds": 2.0,
        "peak_memory_bytes": 5 * 10**8,
        "machine": {"cpu": "a processor", "cores": 2, "threads": 1, "load": 0.5, "gpu": None},
        "versions": {"torch": "2.13.0"},
        "commit": "abc1234",
        "settings": {},
    }
    made |= changes
    return made


def shifted(by, **changes):
    made = result(**changes)
    for score in made["scores"].values():
        score["mse"] += by
    return made


def test_seeds_are_summarised():
    (entry,) = entries_of([shifted(0.0, seed=0), shifted(0.02, seed=1), shifted(0.04, seed=2)])
    assert entry.seeds == (0, 1, 2)
    assert (entry.label, entry.windows[96]) == ("trellis, prefix of 720", 2785)
    assert entry.mse[96].mean == pytest.approx(0.4096 + 0.02)
    assert entry.mse[96].std == pytest.approx(0.02)
    assert entry.mse_average.mean == pytest.approx(0.4 + (96 + 192 + 336 + 720) / 40000 + 0.02)
    (single,) = entries_of([result()])
    assert single.mse[96].std is None


def test_the_free_track_is_chosen_on_validation_not_on_test():
    runs = [
        shifted(0.0, look_back=336, validation_loss=0.52),
        shifted(0.1, look_back=720, validation_loss=0.48),
        shifted(0.2, look_back=96, validation_loss=0.60),
        shifted(-0.1, look_back=512, validation_loss=0.70),
    ]
    entries = entries_of(runs)
    ((chosen, candidates),) = of_track(entries, "free")
    assert (chosen.look_back, candidates) == (720, (96, 336, 512, 720))
    ((fixed, _),) = of_track(entries, "96")
    assert fixed.look_back == 96


def test_candidates_have_equally_many_seeds():
    runs = [
        result(look_back=96, seed=0, validation_loss=0.6),
        result(look_back=96, seed=1, validation_loss=0.6),
        result(look_back=336, seed=0, validation_loss=0.5),
        result(look_back=336, seed=1, validation_loss=0.5),
        result(look_back=720, seed=0, validation_loss=0.1),
    ]
    ((chosen, candidates),) = of_track(entries_of(runs), "free")
    assert (chosen.look_back, candidates) == (336, (96, 336))
    assert of_track(entries_of(runs[:2]), "free") == []


def test_single_models_are_entries_of_their_own():
    runs = [shifted(-0.05, horizon=horizon) for horizon in (96, 192, 336)] + [result()]
    prefix, single = entries_of(runs)
    assert (prefix.label, single.label) == ("trellis, prefix of 720", "trellis, one model each")
    assert prefix.mse[96].mean == pytest.approx(0.4096)
    assert single.mse[96].mean == pytest.approx(0.3596)
    assert single.mse[720].mean == prefix.mse[720].mean
    assert len(entries_of(runs[1:])) == 1  # one horizon lacks its model


def write(folder, runs):
    folder.mkdir(exist_ok=True)
    for index, run in enumerate(runs):
        (folder / f"{index:02}.json").write_text(json.dumps(run))
    return folder


def make_runs():
    return [
        shifted(
            0.01 * seed - 0.0001 * look_back, seed=seed, look_back=look_back, contestant=contestant, dataset=dataset
        )
        for dataset in ("ETTh1", "Weather", "mine")
        for contestant in ("trellis", "attention")
        for look_back in (96, 336)
        for seed in (0, 1)
    ]


def test_the_same_results_give_the_same_bytes(tmp_path):
    runs = make_runs()
    folder = write(tmp_path / "a", runs)
    first = {path.name: path.read_bytes() for path in write_tables(folder)}
    assert {path.name: path.read_bytes() for path in write_tables(folder)} == first
    assert set(first) == {"tables.md", "error_by_look_back.png", "error_by_data_set.png"}
    random.Random(0).shuffle(runs)  # nor does it matter which was finished first
    other = {path.name: path.read_bytes() for path in write_tables(write(tmp_path / "b", runs))}
    assert other == first


def test_what_the_tables_say(tmp_path):
    write_tables(write(tmp_path / "a", make_runs()))
    text = (tmp_path / "a" / "tables.md").read_text()
    # Ours, the lowest average and Titans' figure, the latter marked.
    assert (
        "| ETTh1 | trellis, prefix of 720 | 96 | 2 | 0.429 ± 0.007 / 0.400 ± 0.000 | 0.433 / 0.428 (CycleNet/Linear) |"
        in text
    )
    assert "Titans LMM*" in text
    assert "| ETTh1 | trellis, prefix of 720 | 96 | 2,785 | 0.405 ± 0.007 / 0.400 ± 0.000 | 0.371 (TQNet) /" in text
    assert "336 of 96, 336" in text or "96 of 96, 336" in text
    assert "abc1234" in text
    for line in text.splitlines():  # every row has as many cells as its header
        if line.startswith("|---"):
            width = line.count("|")
        elif line.startswith("| ") and "width" in locals() and not line.startswith(("| data set", "| model")):
            assert line.count("|") == width, line


def test_the_recorded_tables_are_those_of_the_recorded_results(tmp_path):
    for path in RECORDED.glob("*.json"):
        shutil.copy(path, tmp_path)
    write_tables(tmp_path)
    assert (tmp_path / "tables.md").read_text() == (RECORDED / "tables.md").read_text()


def test_folders_without_results(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="holds no results"):
            write_tables(folder)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"x\.json is not the result of a benchmark"):
        write_tables(tmp_path)
