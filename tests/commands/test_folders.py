"""Forecasts and scores of folders of Parquet files: the same rows as of one table, whatever happens on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from trellis_ts.datasets import partitions

SCRIPT = Path(__file__).with_name("forecast_slowly.py")
CELLS = 400


def frame(shops: int = 12, days: int = 60) -> pd.DataFrame:
    """Daily series like those of the model, two of which it knows."""
    rng = np.random.default_rng(1)
    names = ["north", "south", *(f"shop{index:02d}" for index in range(shops - 2))]
    day = pd.date_range("2023-01-01", periods=days)
    week = np.sin(2 * np.pi * np.arange(days) / 7)
    return pd.concat(
        [
            pd.DataFrame({"shop": name, "day": day, "sold": (index + 1) * (5 + week + 0.1 * rng.normal(size=days))})
            for index, name in enumerate(names)
        ],
        ignore_index=True,
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of about two series."""
    monkeypatch.setattr(partitions, "CELLS_PER_BLOCK", CELLS)


@pytest.fixture
def by_shop(folder):
    """Sorted by shop, in one file of row groups that end in the midst of a series."""
    (folder / "in").mkdir()
    frame().sort_values(["shop", "day"]).to_parquet(folder / "in" / "0.parquet", index=False, row_group_size=50)
    return folder / "in"


@pytest.fixture
def by_day(folder):
    """A file for every twenty days, each with all shops."""
    (folder / "in").mkdir()
    for number, (_, part) in enumerate(frame().groupby(frame().day.dt.dayofyear // 20)):
        part.to_parquet(folder / "in" / f"{number}.parquet", index=False)
    return folder / "in"


def rows_of(path: Path) -> pd.DataFrame:
    """All forecasts, in an order of their own."""
    return pd.read_parquet(path).sort_values(["shop", "day"]).reset_index(drop=True)


def names_in(path: Path) -> set[str]:
    return {each.name for each in path.iterdir()}


@pytest.mark.parametrize("layout", ["by_shop", "by_day"])
def test_a_folder_gives_the_rows_of_one_table(trellis, long_model, folder, request, small_blocks, layout):
    data = request.getfixturevalue(layout)
    frame().to_parquet(folder / "all.parquet", index=False)
    trellis("forecast", long_model, folder / "all.parquet", "-o", folder / "all-out.parquet")
    result = trellis("forecast", long_model, data, "-o", "out/", "--json")
    pd.testing.assert_frame_equal(rows_of(folder / "out"), rows_of(folder / "all-out.parquet"))
    assert result.data["series"] == 12
    assert result.data["rows"] == 12 * 7
    assert result.data["rows_read"] == 720
    assert result.data["partitions"] == result.data["written"] > 3
    assert "10 series the model was not trained on" in result.err
    manifest = json.loads((folder / "out" / "_trellis.json").read_text())
    assert manifest["state"] == "complete"
    assert names_in(folder / "out") == {
        "_trellis.json",
        *(f"part-{k:05d}.parquet" for k in range(manifest["partitions"])),
    }


def test_horizon_levels_and_samples_are_those_of_a_table(trellis, long_model, folder, by_shop, small_blocks):
    frame().to_parquet(folder / "all.parquet", index=False)
    options = ("--prediction-length", "10", "--quantile-levels", "0.2,0.8")
    trellis("forecast", long_model, folder / "all.parquet", "-o", folder / "all-out.parquet", *options)
    said = trellis("forecast", long_model, by_shop, "-o", "out", *options).err
    pd.testing.assert_frame_equal(rows_of(folder / "out"), rows_of(folder / "all-out.parquet"))
    assert "10 steps are beyond the trained 7" in said
    for name in ("one", "two"):
        trellis("forecast", long_model, by_shop, "-o", name, "--samples", "3")
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "one"), pd.read_parquet(folder / "two"))
    assert len(pd.read_parquet(folder / "one")) == 12 * 7 * 3


def test_a_second_run_keeps_what_is_finished_and_mends_the_rest(trellis, long_model, folder, by_shop, small_blocks):
    trellis("forecast", long_model, by_shop, "-o", "out")
    before = rows_of(folder / "out")
    first, second, third = sorted((folder / "out").glob("part-*"))[:3]
    kept = third.stat().st_mtime_ns
    first.unlink()
    second.write_bytes(second.read_bytes()[:-20])  # as a crash of the machine might leave it
    (folder / "out" / "_part-00009.parquet.1234.tmp").write_bytes(b"half")
    result = trellis("forecast", long_model, by_shop, "-o", "out", "--json")
    assert result.data["written"] == 2
    assert "were there already" in result.err
    assert third.stat().st_mtime_ns == kept
    pd.testing.assert_frame_equal(rows_of(folder / "out"), before)
    assert not list((folder / "out").glob("*.tmp"))
    assert trellis("forecast", long_model, by_shop, "-o", "out", "--json").data["written"] == 0


def test_another_input_model_or_setting_is_refused_and_can_be_overwritten(
    trellis, refused, long_model, folder, by_shop, small_blocks
):
    trellis("forecast", long_model, by_shop, "-o", "out")
    command = ("forecast", long_model, by_shop, "-o", "out")
    assert "out holds forecasts of another settings" in refused(*command, "--prediction-length", "3")
    assert "out holds forecasts of another model" in refused(*command, "--no-calibration")
    changed = frame()
    changed.loc[55, "sold"] += 100  # within the context
    changed.sort_values(["shop", "day"]).to_parquet(by_shop / "0.parquet", index=False, row_group_size=50)
    assert "out holds forecasts of another input; choose another --output" in refused(*command)
    before = rows_of(folder / "out")
    trellis(*command, "--overwrite")
    assert not rows_of(folder / "out").equals(before)


def test_what_cannot_be_done_is_refused_before_the_work(refused, long_model, wide_model, folder, by_shop):
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    frame().rename(columns={"sold": "units"}).to_parquet(folder / "one.parquet")
    command = ("forecast", long_model)
    assert "holds other files than forecasts" in refused(*command, by_shop, "-o", "full", "--overwrite")
    assert "lies within DATA" in refused(*command, by_shop, "-o", by_shop / "out")
    assert "--plot goes with a table" in refused(*command, by_shop, "-o", "out", "--plot", "a.png")
    assert "--future goes with a table" in refused(*command, by_shop, "-o", "out", "--future", by_shop / "0.parquet")
    assert "--overwrite is for a folder" in refused(*command, by_shop, "-o", "out.csv", "--overwrite")
    assert "expected local or ray, got 'spark'" in refused(*command, by_shop, "-o", "out", "--engine", "spark")
    assert "add --engine ray" in refused(*command, by_shop, "-o", "out", "--address", "auto")
    assert "this is a single table" in refused(*command, folder / "one.parquet", "--engine", "ray")
    said = refused(*command, folder / "one.parquet", "-o", "out/")
    assert "there is no column 'sold'" in said
    assert "the model was trained on --time day, --id shop, --target sold" in said
    assert "there is no column" in refused("forecast", wide_model, by_shop, "-o", "out")
    assert "--adaptive follows all series together" in refused("evaluate", long_model, by_shop, "--adaptive")


def test_data_on_a_coarser_calendar_are_refused(refused, trellis, long_model, folder):
    (folder / "in").mkdir()
    weekly = frame()
    weekly["day"] = pd.Timestamp("2023-01-01") + 7 * (weekly.day - pd.Timestamp("2023-01-01"))
    weekly.to_parquet(folder / "in" / "0.parquet", index=False)
    said = trellis("forecast", long_model, "in", "-o", "out", code=2).err
    assert "the data has steps of W-SUN" in said


def test_without_ray_one_line_says_what_to_install(refused, long_model, by_shop, monkeypatch):
    monkeypatch.setattr("trellis_ts.partitioned.engines.find_spec", lambda name: None)
    said = refused("forecast", long_model, by_shop, "-o", "out", "--engine", "ray")
    assert said.endswith('--engine ray needs Ray; install it with `pip install "trellis-ts[ray]"`')


def test_stores_of_fsspec_take_the_place_of_folders(trellis, long_model, folder, by_day, small_blocks):
    trellis("forecast", long_model, by_day, "-o", "out")
    store = fsspec.filesystem("memory")
    store.put(str(by_day), "/in", recursive=True)
    result = trellis("forecast", long_model, "memory://in", "-o", "memory://out", "--json")
    assert result.data["series"] == 12
    store.get("/out", str(folder / "fetched"), recursive=True)
    pd.testing.assert_frame_equal(rows_of(folder / "fetched"), rows_of(folder / "out"))
    assert trellis("forecast", long_model, "memory://in", "-o", "memory://out", "--json").data["written"] == 0
    assert {Path(each).name[:5] for each in store.ls("/out", detail=False)} == {"part-", "_trel"}
    store.rm("/in", recursive=True)
    store.rm("/out", recursive=True)


def test_a_wide_table_in_several_files_is_one_series(trellis, wide_model, folder, make_wide):
    (folder / "in").mkdir()
    whole = make_wide()
    whole.iloc[:70].to_parquet(folder / "in" / "0.parquet", index=False)
    whole.iloc[70:].to_parquet(folder / "in" / "1.parquet", index=False)
    whole.to_parquet(folder / "all.parquet", index=False)
    trellis("forecast", wide_model, "all.parquet", "-o", "all-out.parquet")
    trellis("forecast", wide_model, "in", "-o", "out")
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "out"), pd.read_parquet(folder / "all-out.parquet"))


def test_a_folder_is_trained_on_as_one_table_is(trellis, folder, by_day, small_blocks, tiny):
    frame().sort_values(["shop", "day"]).to_parquet(folder / "all.parquet", index=False)
    options = ("--id", "shop", "--context-length", "14", "--patch-length", "7", "--prediction-length", "7", *tiny[:14])
    results = [
        trellis("train", data, "-o", f"model-{index}", "--json", *options).data
        for index, data in enumerate(("in", "all.parquet"))
    ]
    assert results[0]["train_windows"] == results[1]["train_windows"]
    assert results[0]["num_parameters"] == results[1]["num_parameters"]
    record = json.loads((folder / "model-0" / "data.json").read_text())
    other = json.loads((folder / "model-1" / "data.json").read_text())
    assert sorted(record["series"], key=lambda each: each["name"]) == sorted(
        other["series"], key=lambda each: each["name"]
    )


# Forecasts in other batches differ by the rounding of single precision.
_ROUNDING = 1e-6


def test_scores_of_a_folder_are_those_of_one_table(trellis, long_model, folder, by_shop, small_blocks):
    frame().to_parquet(folder / "all.parquet", index=False)
    baselines = ("--baselines", "naive,seasonal_naive")
    whole = trellis("evaluate", long_model, folder / "all.parquet", "--json", *baselines).data
    parts = trellis("evaluate", long_model, by_shop, "--json", *baselines).data
    assert parts.keys() == whole.keys()
    for name in ("num_windows", "num_series", "num_values", "num_origins", "fallbacks"):
        assert parts[name] == whole[name]
    for name in ("model", "naive", "seasonal_naive"):
        assert parts[name] == pytest.approx(whole[name], rel=_ROUNDING)
        assert parts["calibration"][name]["coverage"] == pytest.approx(whole["calibration"][name]["coverage"])
    for ours, theirs in zip(parts["by_step"], whole["by_step"], strict=True):
        assert ours["model"] == pytest.approx(theirs["model"], rel=_ROUNDING)
    by_name = {each["series"]: each for each in whole["by_series"]}
    for each in parts["by_series"]:
        wanted = by_name[each["series"]]["model"]
        assert {name for name, value in wanted.items() if value is None} == {
            name for name, value in each["model"].items() if value is None
        }
        for name, value in wanted.items():
            if value is not None:
                assert each["model"][name] == pytest.approx(value, rel=_ROUNDING)
    for ours, theirs in zip(parts["comparisons"], whole["comparisons"], strict=True):
        assert ours["difference"] == pytest.approx(theirs["difference"], rel=_ROUNDING, abs=1e-8)
        assert (ours["diebold_mariano"] is None) == (theirs["diebold_mariano"] is None)
        if theirs["diebold_mariano"] is not None and abs(theirs["difference"]) > _ROUNDING:
            assert ours["diebold_mariano"]["p_value"] == pytest.approx(theirs["diebold_mariano"]["p_value"], rel=1e-3)


def _start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(CELLS), *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("layout", "wait_for"), [("by_shop", "part-00001.parquet"), ("by_day", "_spread/bucket-*")])
def test_sigkill_leaves_what_a_second_run_completes(
    trellis, long_model, folder, request, small_blocks, layout, wait_for
):
    data = request.getfixturevalue(layout)
    process = _start("forecast", long_model, data, "-o", folder / "out")
    deadline = time.monotonic() + 120
    while not list((folder / "out").glob(wait_for)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = sorted((folder / "out").glob("part-*"))
    assert json.loads((folder / "out" / "_trellis.json").read_text())["state"] == "unfinished"
    for path in left:
        assert pq.read_metadata(path).num_rows > 0  # what bears a final name is whole
    result = trellis("forecast", long_model, data, "-o", "out", "--json")
    assert result.data["written"] == result.data["partitions"] - len(left)
    assert (len(left) > 0) == (layout == "by_shop")
    trellis("forecast", long_model, data, "-o", "again")
    pd.testing.assert_frame_equal(rows_of(folder / "out"), rows_of(folder / "again"))
    assert names_in(folder / "out") == names_in(folder / "again")


def test_a_full_disk_is_said_in_one_line_and_leaves_what_is_finished(
    trellis, long_model, folder, by_shop, small_blocks, monkeypatch
):
    import pyarrow.parquet as pa_parquet

    real, written = pa_parquet.write_table, []

    def write(table, path, **options):
        if len(written) == 2:
            (folder / "out" / Path(path).name).write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        written.append(path)
        real(table, path, **options)

    monkeypatch.setattr(pa_parquet, "write_table", write)
    said = trellis("forecast", long_model, by_shop, "-o", "out", code=2).err.splitlines()[-1]
    assert "cannot write out: the disk is full; make room" in said
    assert len(names_in(folder / "out")) == 3
    monkeypatch.undo()
    monkeypatch.setattr(partitions, "CELLS_PER_BLOCK", CELLS)
    monkeypatch.chdir(folder)
    result = trellis("forecast", long_model, by_shop, "-o", folder / "out", "--json")
    assert result.data["written"] == result.data["partitions"] - 2
