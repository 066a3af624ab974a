"""Blocks worked on by real Ray workers on this machine, one of them killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("ray", reason="needs the extra ray")

SCRIPT = Path(__file__).with_name("forecast_slowly.py")
CELLS = 400


def _shops(folder: Path) -> Path:
    day = pd.date_range("2023-01-01", periods=60)
    parts = [
        pd.DataFrame({"shop": f"s{shop:02d}", "day": day, "sold": shop + 1.0 + (day.dayofweek == 6) * shop})
        for shop in range(14)
    ]
    (folder / "in").mkdir()
    pd.concat(parts).to_parquet(folder / "in" / "0.parquet", index=False, row_group_size=60)
    return folder / "in"


def _run(*arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own, as Ray leaves threads and warnings behind."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(CELLS), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _workers_of(process: int) -> list[int]:
    """Processes below this one that have a task of ours in hand."""
    parents, titles = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
        except (OSError, ValueError):  # it has ended
            continue

    def is_below(pid: int) -> bool:
        while pid in parents and pid != process:
            pid = parents[pid]
        return pid == process

    return [pid for pid, title in titles.items() if title.startswith("ray::_run_block") and is_below(pid)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the workers in /proc")
def test_forecasts_of_ray_with_a_killed_worker_are_those_of_one_process(long_model, folder):
    data = _shops(folder)
    with _run("forecast", long_model, data, "-o", folder / "here") as here:
        assert here.wait(300) == 0, here.communicate()[1]
    killed = None
    with _run("forecast", long_model, data, "-o", folder / "ray", "--engine", "ray") as process:
        deadline = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < deadline:
            if killed is None and list((folder / "ray").glob("part-*")) and (workers := _workers_of(process.pid)):
                killed = workers[0]
                os.kill(killed, signal.SIGKILL)
            time.sleep(0.05)
        assert process.poll() == 0, process.communicate()[1]
    assert killed is not None
    files = sorted(each.name for each in (folder / "here").iterdir())
    assert files == sorted(each.name for each in (folder / "ray").iterdir())
    for name in files:
        if name.startswith("part-"):
            pd.testing.assert_frame_equal(
                pd.read_parquet(folder / "here" / name), pd.read_parquet(folder / "ray" / name)
            )
    # The scores, and what goes wrong in a worker.
    scores = [
        _run("evaluate", long_model, data, "--json", "--quiet", "--engine", engine).communicate(timeout=300)
        for engine in ("local", "ray")
    ]
    assert scores[0][0] == scores[1][0] != ""
    (data / "0.parquet").rename(folder / "0.parquet")
    frame = pd.read_parquet(folder / "0.parquet")
    frame.loc[frame.shop == "s07", "day"] += pd.Timedelta(hours=7)
    frame.loc[frame.index[7 * 60 + 3], "day"] += pd.Timedelta(hours=1)
    frame.to_parquet(data / "0.parquet", index=False, row_group_size=60)
    broken = _run("forecast", long_model, data, "-o", folder / "broken", "--engine", "ray")
    _, said = broken.communicate(timeout=300)
    assert broken.returncode == 2
    assert "Traceback" not in said
    assert "in series 's07'" in said.splitlines()[-1]
