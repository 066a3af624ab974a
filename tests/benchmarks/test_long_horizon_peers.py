"""The long-horizon peers: what a peer is given, and how what it gives back is scored."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from trellis_ts.benchmark.plan import Cell
from trellis_ts.errors import TrellisError

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "long_horizon_peers" / "__main__.py"

# Repeats the last value, and writes down what it was given.
LAST_VALUE = """
import json, sys
from pathlib import Path
import numpy as np
folder = Path(sys.argv[1])
job, rows = json.loads((folder / "job.json").read_text()), np.load(folder / "rows.npy")
origins = np.arange(job["first_origin"], job["last_origin"] + 1)
assert origins[-1] < len(rows)
np.save(folder / "forecasts.npy", np.repeat(rows[origins - 1][:, None], job["horizon"], axis=1))
facts = {"num_parameters": 0, "rows": len(rows), "first": rows[:3].tolist(), "job": job}
(folder / "facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture
def program():
    spec = importlib.util.spec_from_file_location("long_horizon_peers", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(program, make_panel, tmp_path, monkeypatch):
    """Runs the code of a worker on a panel of 100 rows."""

    def run_worker(code):
        panel = make_panel((100,), channels=2)
        monkeypatch.setattr(program, "load_data", lambda name: panel)
        worker = tmp_path / "worker.py"
        worker.write_text(code)
        monkeypatch.setattr(program, "_WORKER", worker)
        cell = Cell("ETTh1", "patchtst", "", 6, 5, (2, 5), 0, {"learning_rate": 0.1})
        return panel.series[0].values, program.run_peer(cell, Path(sys.executable), threads=1)

    return run_worker


def test_a_peers_forecasts_are_scored_on_all_test_windows(run):
    values, result = run(LAST_VALUE)
    job = result["job"]
    assert (job["train_stop"], job["validation_stop"], job["first_origin"]) == (80, 90, 90)
    standardised = (values - values[:80].mean(axis=0)) / values[:80].std(axis=0)
    np.testing.assert_allclose(result["first"], standardised[:3])
    for horizon in (2, 5):
        errors = np.concatenate(
            [
                standardised[origin : origin + horizon] - standardised[origin - 1]
                for origin in range(90, 100 - horizon + 1)
            ]
        )
        score = result["scores"][str(horizon)]
        assert score["num_windows"] == 10 - horizon + 1
        assert score["mse"] == pytest.approx(np.square(errors).mean())
        assert score["mae"] == pytest.approx(np.abs(errors).mean())
    assert (result["contestant"], result["settings"]) == ("patchtst", {"learning_rate": 0.1})
    json.dumps(result)


def test_a_peer_that_fails_says_why(run):
    with pytest.raises(TrellisError, match=r"patchtst-L6-H5-s0 failed: .*no neuralforecast"):
        run("raise ImportError('no neuralforecast')")


def test_a_peer_sees_as_many_windows_as_our_own(program):
    cell = program._cell("ETTh1", "patchtst", 1, steps=None)
    assert cell.key == "etth1-patchtst-L96-H720-s1"
    own = program.plan_for("ETTh1").at(96)
    assert cell.settings["max_steps"] * cell.settings["batch_size"] == own["max_epochs"] * own["windows_per_epoch"]
    assert program._cell("ETTh1", "dlinear", 1, steps=50).key == "etth1-dlinear+50-steps-L96-H720-s1"
