"""Contestant: GluonTS's DeepAR (PyTorch), stopped after the budget. ``worker_gluonts.py FOLDER default|tuned``.

``default`` is what the library does unless told otherwise; known covariates are handed over in both. ``tuned`` is one
honest attempt: a longer context, larger batches, a step size that is halved sooner, more training windows a series.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pandas as pd
from gluonts.dataset.common import ListDataset
from gluonts.torch import DeepAREstimator
from job import LEVELS, Job, Series, Stopwatch, read_job, read_series, rounds, standardised, training_part

_PATHS = 200


class Stop(lightning.pytorch.Callback):
    """Ends training after a number of seconds and counts its steps."""

    def __init__(self, seconds: float) -> None:
        self.deadline, self.steps = time.monotonic() + seconds, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps += 1
        if time.monotonic() >= self.deadline:
            trainer.should_stop = True


def dataset(job: Job, chosen: list[Series], known_rows: list[int]) -> ListDataset:
    """Series with their known covariates up to ``known_rows``."""
    entries = []
    for each, rows in zip(chosen, known_rows, strict=True):
        entry = {"start": pd.Period(each.time[0], freq=job.freq), "target": each.values, "item_id": each.name}
        if job.known:
            entry["feat_dynamic_real"] = each.known[:rows].T
        entries.append(entry)
    return ListDataset(entries, freq=job.freq)


def estimator_of(settings: str, job: Job, stop: Stop, folder: Path) -> DeepAREstimator:
    """The estimator with the library's defaults, or better ones."""
    options: dict[str, Any] = {}
    if settings == "tuned":
        options = {
            "context_length": min(4 * job.horizon, 7 * job.seasons[0]),
            "batch_size": 64,
            "patience": 3,
            "lr": 2e-3,
        }
    return DeepAREstimator(
        freq=job.freq,
        prediction_length=job.horizon,
        num_feat_dynamic_real=len(job.known),
        num_parallel_samples=_PATHS,
        trainer_kwargs={
            "max_epochs": 100 if settings == "default" else 1000,
            "callbacks": [stop],
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
        },
        **options,
    )


def main() -> None:
    """Trains, then forecasts one origin at a time from the rows before it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    folder, settings = Path(sys.argv[1]), sys.argv[2]
    job = read_job(folder)
    lightning.pytorch.seed_everything(job.seed, verbose=False)
    series, watch = standardised(job, read_series(folder, job)), Stopwatch()
    stop, training = Stop(job.budget_seconds), training_part(job, series)
    estimator = estimator_of(settings, job, stop, folder)
    predictor = estimator.train(dataset(job, training, [len(each.time) for each in training]))
    watch.is_trained()
    groups = rounds(job, series)
    quantiles = np.full((sum(map(len, groups)), job.horizon, len(LEVELS)), np.nan)
    for group in groups:
        histories = []
        for _, index, row in group:
            whole = series[index]
            histories.append(Series(whole.name, whole.time[:row], whole.values[:row], whole.known))
        entries = dataset(job, histories, [row + job.horizon for *_, row in group])
        for (place, *_), found in zip(group, predictor.predict(entries), strict=True):
            quantiles[place] = np.stack([found.quantile(level) for level in LEVELS], axis=-1)
    watch.write(folder, quantiles, steps=stop.steps)


if __name__ == "__main__":
    main()
