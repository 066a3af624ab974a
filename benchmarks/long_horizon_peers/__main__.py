"""DLinear, PatchTST and iTransformer of NeuralForecast under the protocol of ``trellis benchmark``.

    TRELLIS_DATA=~/data python benchmarks/long_horizon_peers ETTh1 --peers-python peers/bin/python

Each is trained in the peers' own environment (``benchmarks/forecasters/peers-requirements.txt``) on the same
standardised training rows, for as many steps of as many windows as the data set's own configuration sees at most, under
the same loss, and scored here by the same code on the same windows. Its result lies beside the others, and
`trellis benchmark --tables` shows it with them.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trellis_ts.benchmark.cell import describe_result, write_result
from trellis_ts.benchmark.machine import describe_machine, find_commit
from trellis_ts.benchmark.plan import FIXED_LOOK_BACK, Cell, choose_numbers, plan_for
from trellis_ts.benchmark.runner import result_path
from trellis_ts.benchmark.scoring import score_forecasts
from trellis_ts.config import ExperimentConfig
from trellis_ts.datasets.sources import load_data
from trellis_ts.errors import TrellisError
from trellis_ts.preparation import make_splits

_WORKER = Path(__file__).with_name("worker.py")
# Of the sizes their authors use on ETTh1. The learning rates are higher: steps are few.
_SETTINGS: dict[str, dict[str, Any]] = {
    "dlinear": {"learning_rate": 0.005},
    "patchtst": {
        "learning_rate": 0.001,
        "hidden_size": 16,
        "n_heads": 4,
        "encoder_layers": 3,
        "linear_hidden_size": 128,
        "dropout": 0.3,
        "fc_dropout": 0.3,
    },
    "itransformer": {
        "learning_rate": 0.0005,
        "hidden_size": 256,
        "n_heads": 8,
        "e_layers": 2,
        "d_ff": 256,
        "dropout": 0.1,
    },
}


def main() -> None:
    """Runs what has no result yet."""
    values = _arguments()
    folder = Path(values.results)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in choose_numbers("--seeds", values.seeds, least=0):
        for peer in values.peers.split(","):
            cell = _cell(values.dataset, peer, seed, steps=values.steps)
            path = result_path(folder, cell)
            if path.is_file():
                continue
            write_result(path, run_peer(cell, Path(values.peers_python), values.threads))
            print(path, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--peers-python", required=True, help="the interpreter of an environment with NeuralForecast")
    parser.add_argument("--peers", default=",".join(_SETTINGS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=None, help="instead of those of the data set's configuration")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", default="benchmarks/results/long_horizon")
    return parser.parse_args()


def _cell(dataset: str, peer: str, seed: int, *, steps: int | None) -> Cell:
    """One model for the longest horizon; its variant tells of a number of steps that is not our own."""
    plan = plan_for(dataset)
    own = plan.at(FIXED_LOOK_BACK)
    settings = _SETTINGS[peer] | {
        "batch_size": own["batch_size"],
        "max_steps": steps or own["max_epochs"] * math.ceil(own["windows_per_epoch"] / own["batch_size"]),
        "loss": own["loss"],
    }
    variant = "" if steps is None else f"{steps}-steps"
    longest = plan.horizons[-1]
    return Cell(dataset, peer, variant, FIXED_LOOK_BACK, longest, plan.horizons, seed, settings)


def run_peer(cell: Cell, python: Path, threads: int) -> dict[str, Any]:
    """Trains a peer in its environment, and scores its forecasts on every test window.

    Raises:
        TrellisError: the peer's process failed.
    """
    torch.set_num_threads(threads)
    machine, commit = describe_machine(), find_commit()
    panel = load_data(cell.dataset)
    splits = make_splits(panel, ExperimentConfig(), cell.horizon)
    scaler, (border,) = splits.scaler, splits.borders
    with TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        # Rows after the test split are no one's; the worker forecasts from every test row with enough after it.
        np.save(folder / "rows.npy", ((panel.series[0].values - scaler.loc[0]) / scaler.scale[0])[: border.test[1]])
        job = {
            "peer": cell.contestant,
            "settings": cell.settings,
            "look_back": cell.look_back,
            "horizon": cell.horizon,
            "seed": cell.seed,
            "train_stop": border.train[1],
            "validation_stop": border.validation[1],
            "first_origin": border.test[0],
            "last_origin": border.test[1] - min(cell.horizons),
            "threads": threads,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run([str(python), str(_WORKER), name], check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise TrellisError(f"{cell.key} failed: {done.stderr.strip().splitlines()[-1]}")
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        forecasts = np.load(folder / "forecasts.npy", mmap_mode="r")

        def forecast(origins: NDArray[np.int64]) -> torch.Tensor:
            return torch.from_numpy(np.array(forecasts[origins - border.test[0]]))

        scores = score_forecasts(forecast, splits, scaler, cell.horizons, longest=cell.horizon)
    return describe_result(cell, scores, machine=machine, commit=commit, **facts)


if __name__ == "__main__":
    try:
        main()
    except TrellisError as error:
        sys.exit(str(error))
