"""Contestant: this package. ``trellis train --preset balanced``, then each window forecast from the rows before it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from job import LEVELS, Job, Stopwatch, read_job, read_series, rounds

from trellis_ts import Forecaster
from trellis_ts.datasets.readers import panel_from_frame
from trellis_ts.evaluation import backtest
from trellis_ts.types import Panel


def command(job: Job, folder: Path, options: list[str]) -> list[str]:
    """The command a user would give; seasons are found in the data."""
    line = [sys.executable, "-m", "trellis_ts", "train", str(folder / "table.parquet"), "-o", str(folder / "model")]
    line += ["--time", job.time, "--target", job.target, "--freq", job.freq, "--preset", "balanced"]
    line += ["--prediction-length", str(job.horizon), "--test-size", str(job.test_rows), "--overwrite", "--quiet"]
    line += ["--max-time", f"{job.budget_seconds:g}s", "--seed", str(job.seed)]
    if job.keys:
        line += ["--id", ",".join(job.keys)]
    if job.known:
        line += ["--known-covariates", *job.known]
    return [*line, *options]


def main() -> None:
    """``worker_trellis.py FOLDER [OPTION ...]``: options of ``trellis train``."""
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    job = read_job(folder)
    watch = Stopwatch()
    subprocess.run(command(job, folder, options), check=True)
    watch.is_trained()
    forecaster = Forecaster.load(folder / "model")
    series, panel = read_series(folder, job), _panel(forecaster, folder, job)
    order = {"/".join(each.key) or each.name: index for index, each in enumerate(panel.series)}
    quantiles = np.full((sum(map(len, rounds(job, series))), job.horizon, len(LEVELS)), np.nan)
    for group in rounds(job, series):
        cut = []
        for _, index, row in group:
            whole = panel.series[order[series[index].name]]
            cut.append(replace(whole, time=whole.time[:row], values=whole.values[:row]))
        found = forecaster.forecast(replace(panel, series=tuple(cut)), quantile_levels=LEVELS).quantiles
        assert found is not None
        quantiles[[place for place, *_ in group]] = found[:, :, 0].numpy()
    # The same windows again, with bands that follow what came true (`trellis evaluate --adaptive`).
    calibration = backtest(forecaster, panel, step=job.step, baselines=(), adaptive=True).calibration["model"]
    adaptive = dict(zip(map(str, calibration.bands), calibration.coverage, strict=True))
    config = forecaster.checkpoint.experiment
    details = {
        "context_length": forecaster.checkpoint.model.shape.context_length,
        "parameters": sum(each.numel() for each in forecaster.checkpoint.model.parameters()),
        "width": config.model.width,
        "num_layers": config.model.num_layers,
    }
    watch.write(folder, quantiles, options=" ".join(options), adaptive_coverage=adaptive, **details)


def _panel(forecaster: Forecaster, folder: Path, job: Job) -> Panel:
    """The table as the model reads it; the covariates of held-out rows stay, for they are known."""
    import pandas as pd

    data = forecaster.checkpoint.data
    return panel_from_frame(
        pd.read_parquet(folder / "table.parquet"),
        time=data.time_column,
        target=data.channels,
        id=data.id_column,
        freq=data.freq,
        known_covariates=job.known,
    )


if __name__ == "__main__":
    main()
