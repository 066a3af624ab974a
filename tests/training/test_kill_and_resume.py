"""A training killed outright at a random moment, and resumed, gives the model of one left alone: the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

PROGRAM = Path(__file__).parent / "kill_and_resume.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    rng = np.random.default_rng(0)
    time = pd.date_range("2024-01-01", periods=160, freq="h")
    values = 10 + np.sin(2 * np.pi * np.arange(160) / 6) + 0.2 * rng.normal(size=160)
    table, folder = tmp_path / "table.csv", tmp_path / "work"
    folder.mkdir()
    pd.DataFrame({"time": time, "load": values.round(4)}).to_csv(table, index=False)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), str(table), str(folder), str(kills), "1"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == kills
    assert kills < 10 or len(set(found)) > 2  # not all at the same place
