"""``trellis benchmark`` from start to end on a small table: killed, resumed side by side, and its tables made."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

TINY = (
    "width: 8\nnum_heads: 2\nnum_slots: 3\nnum_layers: 1\nfeedforward_width: 8\nmax_epochs: 1\nwindows_per_epoch: 64\n"
)
ARGUMENTS = ["--dataset", "wide.csv", "--horizons", "3,6", "--track", "free", "--look-backs", "24,36"]
ARGUMENTS += ["--seeds", "0,1", "--variant", "tiny.yaml", "--results", "results"]


@pytest.fixture
def table(folder, make_wide):
    make_wide(rows=200).to_csv(folder / "wide.csv", index=False)
    (folder / "tiny.yaml").write_text(TINY + "patch_length: 6\n")
    return folder


def test_killed_resumed_and_tabulated(trellis, table):
    results = table / "results"
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "trellis_ts", "benchmark", *ARGUMENTS],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not list(results.glob("*.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert 1 <= len(before) < 4
    assert len(trellis("benchmark", *ARGUMENTS, "--list", "--json").data["finished"]) == len(before)

    resumed = trellis("benchmark", *ARGUMENTS, "--jobs", "2")
    assert f"{len(before)} run{'s' if len(before) > 1 else ''} finished, {4 - len(before)} to do" in resumed.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    names = sorted(path.name for path in results.iterdir())
    assert names == [f"wide-trellis+tiny-L{look_back}-H6-s{seed}.json" for look_back in (24, 36) for seed in (0, 1)]
    for path in results.iterdir():
        run = json.loads(path.read_text())
        assert {int(horizon): score["num_windows"] for horizon, score in run["scores"].items()} == {3: 38, 6: 35}
        assert run["machine"]["threads"] >= 1
    assert trellis("benchmark", *ARGUMENTS, "--json").data["runs"]  # nothing left to run

    first = {name: (results / name).read_bytes() for name in tables(trellis)}
    assert {name: (results / name).read_bytes() for name in tables(trellis)} == first
    text = first["tables.md"].decode()
    assert "| wide | trellis (tiny), prefix of 6 |" in text
    assert "of 24, 36" in text


def tables(trellis):
    written = trellis("benchmark", "--tables", "--results", "results", "--json").data["written"]
    return [path.rpartition("/")[2] for path in written]


def test_a_run_that_fails_stops_no_other_and_is_named(trellis, table):
    """A look-back longer than the training rows."""
    arguments = [*ARGUMENTS[:-2], "--results", "results", "--seeds", "0", "--look-backs", "150,24"]
    result = trellis("benchmark", *arguments, code=2)
    assert "wide-trellis+tiny-L150-H6-s0 failed: context_length=150" in result.err.splitlines()[-1]
    assert [path.name for path in (table / "results").iterdir()] == ["wide-trellis+tiny-L24-H6-s0.json"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--dataset", "ETTh3"], "--dataset: 'ETTh3' is neither a benchmark nor a file; did you mean ETTh"),
        (["--dataset", ","], "--dataset is empty"),
        (["--mixer", "trelis"], "--mixer: there is no 'trelis'; did you mean trellis?"),
        (["--track", "97"], "--track: there is no '97'; there are 96, free"),
        (["--seeds", "a"], "--seeds: expected whole numbers from 0, separated by commas, got 'a'"),
        (["--horizons", "0"], "--horizons: expected whole numbers from 1"),
        (["--jobs", "0"], "--jobs: expected a whole number from 1, got 0"),
        (["--variant", "nothing.yaml"], "nothing.yaml: neither a file nor the name"),
        (["--variant", "seed.yaml"], "--variant cannot set seed"),
        (["--variant", "gsa.yaml", "--mixer", "gsa"], "mixer=gsa writes what its gate forgets"),
        (["--tables", "--results", "nowhere"], "nowhere holds no results; run `trellis benchmark` first"),
        (["--results", "seed.yaml"], "seed.yaml is a file; name a directory"),
        (["--job", "2"], "unknown option --job; did you mean --jobs?"),
    ],
)
def test_what_cannot_be_asked_for(refused, folder, options, expected):
    (folder / "seed.yaml").write_text("seed: 3\n")
    (folder / "gsa.yaml").write_text("forget_gate: false\n")
    assert expected in refused("benchmark", "--dataset", "ETTh1", *options)


def test_a_result_of_other_settings_is_not_taken_for_these(refused, trellis, table):
    trellis("benchmark", *ARGUMENTS, "--list")
    results = table / "results"
    results.mkdir()
    path = results / "wide-trellis+tiny-L24-H6-s0.json"
    path.write_text(json.dumps({"format": "trellis_ts.benchmark", "settings": {"width": 9}}))
    assert "was made with another" in refused("benchmark", *ARGUMENTS)
    path.write_text("{")
    assert "is not the result of a benchmark" in refused("benchmark", *ARGUMENTS)
