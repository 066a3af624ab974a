"""What keeps the way of the data short: nothing is copied whole, and no series of many has a loop of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from trellis_ts.datasets import calendar, regular
from trellis_ts.datasets.readers import panel_from_frame

# Memory is the process's, so it is measured in one of its own.
PROGRAM = """
import numpy as np
from pathlib import Path
from trellis_ts.datasets.splits import Scaler
from trellis_ts.datasets.windows import ScaledPanel, WindowDataset
from trellis_ts.types import Columns, Panel, Series

def held(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def read(steps):
    values = np.random.default_rng(0).standard_normal((steps, 20))
    time = np.datetime64("2000-01-01", "ns") + np.arange(steps) * np.timedelta64(60 * 10**9, "ns")
    panel = Panel((Series("", time, values),), Columns("date", None, tuple(map(str, range(20)))), "min")
    scaled = ScaledPanel(panel, Scaler.fit(panel, [(0, steps)]), 1)
    windows = WindowDataset(scaled, [(0, steps)], context_length=64, prediction_length=8, min_context=1)
    for start in range(0, len(windows) - 8, len(windows) // 50):
        windows.__getitems__(list(range(start, start + 8)))
    return values.nbytes + time.nbytes

read(5_000)
before = held("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
data = read(400_000)
print((held("VmHWM") - before) / data)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_a_panel_is_held_once():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    if "Permission" in done.stderr:
        pytest.skip("this machine does not let a process reset its peak of memory")
    assert float(done.stdout) < 1.3, done.stderr


def long_frame(drop: int | None = None) -> pd.DataFrame:
    stamps = pd.date_range("2024-01-01", periods=30, freq="D")
    frame = pd.DataFrame(
        {
            "unique_id": np.repeat([f"s{index}" for index in range(50)], 30),
            "ds": np.tile(stamps, 50),
            "y": np.arange(1500.0),
        }
    )
    return frame if drop is None else frame.drop(index=drop)


@pytest.mark.parametrize("freq", [None, "D"])
def test_only_series_with_gaps_are_put_on_a_grid_one_by_one(monkeypatch, freq):
    calls = []
    monkeypatch.setattr(regular, "to_grid", lambda *args: calls.append(args) or calendar.to_grid(*args))
    whole = panel_from_frame(long_frame(), freq=freq)
    assert not calls
    with_gap = panel_from_frame(long_frame(drop=40), freq=freq)
    assert len(calls) == 1
    assert np.isnan(with_gap.series[1].values[10]).all()
    for one, other in zip(whole.series, with_gap.series, strict=True):
        np.testing.assert_array_equal(one.time, other.time)
        seen = ~np.isnan(other.values)
        np.testing.assert_array_equal(one.values[seen], other.values[seen])
        assert seen.sum() == 30 - (one.name == "s1")


@pytest.mark.parametrize("freq", ["h", "D", "W-MON", "MS", "QE-DEC", "B"])
def test_positions_of_many_series_are_those_of_each(freq):
    first = pd.date_range("2020-01-01", periods=40, freq=freq).to_numpy("datetime64[ns]")
    parts = [first[3:30], np.delete(first, [5, 6, 20]), first[:1]]
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    found = calendar.grid_positions(np.concatenate(parts), starts, freq)
    expected = [calendar.to_grid(part, freq)[1] for part in parts]
    np.testing.assert_array_equal(found, np.concatenate(expected))
    off = np.concatenate(parts) + np.timedelta64(1, "ns") * (np.arange(len(np.concatenate(parts))) == 7)
    assert calendar.grid_positions(off, starts, freq) is None


@pytest.mark.parametrize("timezone", [None, "Europe/Paris"])
def test_the_future_of_many_series_is_that_of_each(timezone):
    for freq in ("h", "D", "MS"):
        last = calendar.to_utc(np.array(["2024-03-01", "2024-10-01", "2025-01-01"], "datetime64[ns]"), timezone)
        together = calendar.future_grid(last, freq, 40, timezone)
        for row, stamp in zip(together, last, strict=True):
            np.testing.assert_array_equal(row, calendar.future_times(stamp, freq, 40, timezone))
