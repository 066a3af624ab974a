"""The comparison of forecasters: its windows, its scores, its table, and one contestant from end to end."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "forecasters"


@pytest.fixture
def program(monkeypatch):
    """Gives a module of the program, which is no part of the package."""
    monkeypatch.syspath_prepend(str(PROGRAM))
    return importlib.import_module


@pytest.fixture
def job(program):
    return program("job").Job(
        case="small",
        keys=("region", "shop"),
        time="day",
        target="sold",
        known=("promotion",),
        freq="D",
        seasons=(7, 14),
        horizon=5,
        test_rows=20,
        step=5,
        statistical_rows=100,
    )


@pytest.fixture
def folder(program, job, tmp_path):
    """Two series of different lengths, the rows out of order."""
    rng, frames = np.random.default_rng(0), []
    for region, shop, length in (("north", "b", 60), ("north", "a", 80)):
        days = pd.date_range("2024-01-01", periods=length)
        frame = pd.DataFrame({"region": region, "shop": shop, "day": days, "sold": rng.normal(10, 3, length)})
        frames.append(frame.assign(promotion=rng.integers(0, 2, length)))
    table = pd.concat(frames).sample(frac=1.0, random_state=0)
    table.loc[table.sold < 6, "sold"] = np.nan
    table.to_parquet(tmp_path / "table.parquet", index=False)
    program("job").write_job(tmp_path, job)
    return tmp_path


def test_origins_are_counted_back_from_the_last_row(job):
    assert job.origins(60).tolist() == [40, 45, 50, 55]
    assert replace(job, test_rows=12, step=3).origins(60).tolist() == [49, 52, 55]


def test_folder_holds_the_task(program, job, folder):
    module = program("job")
    assert module.read_job(folder) == job
    series = module.read_series(folder, job)
    assert [each.name for each in series] == ["north/a", "north/b"]
    assert [len(each.time) for each in series] == [80, 60]
    assert all((np.diff(each.time) > np.timedelta64(0)).all() for each in series)
    assert [len(each.values) for each in module.training_part(job, series)] == [60, 40]


def test_rounds_hold_every_window_once_and_one_per_series(program, job, folder):
    module = program("job")
    series = module.read_series(folder, job)
    groups = module.rounds(job, series)
    places = sorted(place for group in groups for place, *_ in group)
    assert places == list(range(len(module.windows(job, series))))
    assert all(len({index for _, index, _ in group}) == len(group) for group in groups)
    assert all(module.windows(job, series)[place] == (index, row) for group in groups for place, index, row in group)


def test_covariates_are_standardised_by_rows_that_may_be_trained_on(program, job, folder):
    module = program("job")
    series = module.read_series(folder, job)
    before = module.standardised(job, series)
    series[0].known[-job.test_rows :] = 1e9
    after = module.standardised(job, series)
    np.testing.assert_array_equal(before[0].known[:60], after[0].known[:60])
    np.testing.assert_array_equal(before[1].known, after[1].known)


def test_scores_are_those_of_their_formulas(program, job, folder):
    module, cells = program("job"), program("cells")
    series = module.read_series(folder, job)
    windows = module.windows(job, series)
    rng = np.random.default_rng(1)
    quantiles = np.sort(rng.normal(10, 4, (len(windows), job.horizon, len(module.LEVELS))), axis=-1)
    found = cells.scores(job, series, quantiles)
    scaled, loss, size, covered = [], 0.0, 0.0, []
    for (index, row), forecast in zip(windows, quantiles, strict=True):
        values = series[index].values
        history = values[: len(values) - job.test_rows]
        scale = np.nanmean(np.abs(history[7:] - history[:-7]))
        for truth, levels in zip(values[row : row + job.horizon], forecast, strict=True):
            if np.isnan(truth):
                continue
            scaled.append(abs(truth - levels[5]) / scale)
            size += abs(truth)
            covered.append(levels[0] <= truth <= levels[-1])
            for level, value in list(zip(module.LEVELS, levels, strict=True))[1:-1]:
                loss += 2 * max(level * (truth - value), (level - 1) * (truth - value)) / 9
    assert found["num_values"] == len(scaled) < len(windows) * job.horizon
    assert found["mase"] == pytest.approx(np.mean(scaled))
    assert found["weighted_quantile_loss"] == pytest.approx(loss / size)
    assert found["coverage_95"] == pytest.approx(np.mean(covered))


def test_forecasts_that_are_no_number_or_too_few_are_refused(program, job, folder):
    module, cells = program("job"), program("cells")
    series = module.read_series(folder, job)
    shape = (len(module.windows(job, series)), job.horizon, len(module.LEVELS))
    with pytest.raises(ValueError, match="no number"):
        cells.scores(job, series, np.full(shape, np.nan))
    with pytest.raises(ValueError, match="shape"):
        cells.scores(job, series, np.zeros((shape[0] - 1, *shape[1:])))


def test_a_contestant_runs_as_a_process_and_sees_no_future(program, job, folder):
    """Poisons every value from an origin on: forecasts from there on back stay what they were."""

    def forecasts() -> np.ndarray:
        command = [sys.executable, str(PROGRAM / "worker_naive.py"), str(folder), "7"]
        subprocess.run(command, check=True, capture_output=True)
        with np.load(folder / "forecast.npz") as file:
            assert json.loads(str(file["notes"]))["train_seconds"] >= 0
            return file["quantiles"]

    before = forecasts()
    table = pd.read_parquet(folder / "table.parquet")
    poisoned = (table.shop == "a") & (table.day >= pd.Timestamp("2024-01-01") + pd.Timedelta(days=65))
    table.loc[poisoned, "sold"] = 1e6
    table.to_parquet(folder / "table.parquet", index=False)
    after = forecasts()
    changed = (before != after).any(axis=(1, 2))
    assert before.shape == (8, 5, 11)
    assert changed.tolist() == [False, False, True, True, False, False, False, False], "origins 60, 65, 70, 75 of a"


def test_table_shows_losses_and_failures(program, job):
    report = program("report")

    def cell(name: str, mase: float) -> dict[str, object]:
        scores = dict.fromkeys([key for _, key, _ in report._COLUMNS], 0.5) | {"num_windows": 8, "num_values": 40}
        return {
            "case": "small",
            "contestant": name,
            "seed": 0,
            "budget_seconds": 9,
            "has_budget": True,
            "seconds": 10.0,
            "peak_mib": 100,
            "load_before": 0.1,
            "load_after": 2.0,
            "started": "2024-01-01 00:00",
            "commit": "abc",
            "machine": "two cores",
            "versions": {"torch": "2.0"},
            "job": {"horizon": 5, "seasons": [7], "known": []},
            "notes": {"train_seconds": 9.0},
            "scores": scores | {"mase": mase},
        }

    text = report.markdown([cell("trellis", 0.9), cell("mstl", 0.8), cell("deepar", 1.1)], "command")
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ") and "contestant" not in line]
    assert rows == ["| mstl", "| trellis", "| deepar"]
    assert "MASE of trellis (seed 0): 0.9000, not below mstl (0.8000)." in text
    assert "deepar (" not in text.split("MASE of trellis")[1].split("\n")[0]
