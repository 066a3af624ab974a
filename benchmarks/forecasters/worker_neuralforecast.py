"""Contestants: NeuralForecast's NHITS and PatchTST under its multi-quantile loss, stopped after the budget.

    worker_neuralforecast.py FOLDER nhits|patchtst default|tuned

``default`` is what the library does unless told otherwise, with a context of two horizons, the ratio of its own
examples. ``tuned`` is one honest attempt: a longer context, windows standardised one by one, known covariates and the
calendar where the model takes them, and a learning rate that falls over as many steps as the budget holds; how many was
measured first, within the budget. Covariates of 0 and 1 stay as they are: over a window in which one is constant,
rounding could make its deviation tiny instead of 0, and the window is divided by it.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning
from job import (
    LEVELS,
    NAME,
    Floats,
    Job,
    Series,
    Stopwatch,
    long_frame,
    read_job,
    read_series,
    rounds,
    training_part,
)
from neuralforecast import NeuralForecast
from neuralforecast.losses.pytorch import MQLoss
from neuralforecast.models import NHITS, PatchTST

_PROBED_STEPS = 12
_MOST_STEPS = 3000
_LONG = 10_000
# Rows of history handed over for a forecast, in contexts.
_CONTEXTS_READ = 2


class Stop(pytorch_lightning.Callback):
    """Ends training after a number of seconds and counts its steps."""

    def __init__(self, seconds: float) -> None:
        self.deadline, self.steps, self.times = time.monotonic() + seconds, 0, [time.monotonic()]

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps += 1
        self.times.append(time.monotonic())
        if time.monotonic() >= self.deadline:
            trainer.should_stop = True


def model_of(name: str, settings: str, job: Job, shortest: int, *, max_steps: int | None, stop: Stop) -> Any:
    """The model; ``max_steps`` None leaves the library's own number."""
    kind = {"nhits": NHITS, "patchtst": PatchTST}[name]
    shared: dict[str, Any] = {
        "h": job.horizon,
        "loss": MQLoss(quantiles=list(LEVELS)),
        "random_seed": job.seed + 1,
        "callbacks": [stop],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "accelerator": "cpu",
        "start_padding_enabled": True,
        "input_size": 2 * job.horizon,
    }
    if max_steps is not None:
        shared["max_steps"] = max_steps
    if settings == "tuned":
        context = max(4 * job.horizon, 7 * job.seasons[0], 2 * job.seasons[-1] if job.seasons[-1] <= 168 else 0)
        shared |= {
            "input_size": min(context, max(2 * job.horizon, shortest - job.horizon)),
            "scaler_type": "standard" if name == "nhits" else "identity",  # PatchTST normalises each window itself
            "learning_rate": 1e-3 if name == "nhits" else 5e-4,
            "num_lr_decays": 4,
            # A step cuts all windows of this many series before it draws some: few series make many more steps, and so
            # do windows further apart where a series is long (by a number of rows that shares no factor with a season).
            "batch_size": 8,
            "step_size": 11 if shortest > _LONG else 1,
            "windows_batch_size": 256 if name == "nhits" else 128,
        }
        if name == "nhits":
            shared["futr_exog_list"] = [*job.known, *calendar(np.array([], "datetime64[ns]"))]
        else:
            shared |= {"hidden_size": 64, "n_heads": 4, "linear_hidden_size": 128}
    elif name == "nhits" and job.known:
        shared["futr_exog_list"] = list(job.known)
    return kind(**shared)


def calendar(stamps: Any) -> dict[str, Floats]:
    """Sine and cosine of the place in day, week and year."""
    seconds = np.asarray(stamps, "datetime64[s]").astype(np.int64)
    periods = {"day": 86_400, "week": 7 * 86_400, "year": 365.25 * 86_400}
    return {
        f"{name}_{kind}": function(2 * np.pi * seconds / period)
        for name, period in periods.items()
        for kind, function in (("sine", np.sin), ("cosine", np.cos))
    }


def frame_of(job: Job, chosen: list[Series]) -> pd.DataFrame:
    """With the calendar's columns; models take those they were told of."""
    frame = long_frame(job, chosen, is_filled=True)
    return frame.assign(**calendar(frame.ds.to_numpy()))


def fit(name: str, settings: str, job: Job, series: list[Series]) -> tuple[NeuralForecast, Stop, int]:
    """Trained within the budget, with the steps it took and the steps that were planned."""
    shortest, start = min(len(each.time) for each in series), time.monotonic()
    frame, planned = frame_of(job, series), None
    if settings == "tuned":
        probe = Stop(job.budget_seconds / 4)
        short = model_of(name, settings, job, shortest, max_steps=_PROBED_STEPS, stop=probe)
        probe = trained(NeuralForecast([short], freq=job.freq), frame)
        seconds_per_step = float(np.median(np.diff(probe.times)[min(2, probe.steps - 1) :]))
        left = job.budget_seconds - (time.monotonic() - start)
        planned = int(np.clip(0.9 * left / seconds_per_step, 10, _MOST_STEPS))
    stop = Stop(job.budget_seconds - (time.monotonic() - start))
    model = model_of(name, settings, job, shortest, max_steps=planned, stop=stop)
    fitted = NeuralForecast([model], freq=job.freq)
    return fitted, trained(fitted, frame), int(model.max_steps)


def trained(forecaster: NeuralForecast, frame: pd.DataFrame) -> Stop:
    """Fits, and gives back the callback that saw it: the library works on copies of what it is given."""
    forecaster.fit(frame)
    (stop,) = (each for each in forecaster.models[0].trainer_kwargs["callbacks"] if isinstance(each, Stop))
    return stop


def main() -> None:
    """Trains, then forecasts one origin at a time from the rows before it."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    folder, name, settings = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    job = read_job(folder)
    series = read_series(folder, job)
    watch = Stopwatch()
    fitted, stop, planned = fit(name, settings, job, training_part(job, series))
    watch.is_trained()
    model = fitted.models[0]
    model.trainer_kwargs.pop("callbacks", None)
    groups = rounds(job, series)
    quantiles = np.full((sum(map(len, groups)), job.horizon, len(LEVELS)), np.nan)
    for group in groups:
        histories, futures = [], []
        for place, index, row in group:
            whole, first = series[index], max(0, row - _CONTEXTS_READ * model.input_size)
            rows, ahead = slice(first, row), slice(row, row + job.horizon)
            key = f"{place:08d}"
            histories.append(Series(key, whole.time[rows], whole.values[rows], whole.known[rows]))
            futures.append(Series(key, whole.time[ahead], np.zeros(job.horizon), whole.known[ahead]))
        future = frame_of(job, futures).drop(columns=["y", "available_mask"])
        found = fitted.predict(df=frame_of(job, histories), futr_df=future).reset_index()
        found = found.sort_values([NAME, "ds"], kind="stable")
        columns = [each for each in found.columns if each not in (NAME, "ds", "index")]
        values = found[columns].to_numpy(np.float64)
        quantiles[[place for place, *_ in group]] = values.reshape(len(group), job.horizon, len(LEVELS))
    watch.write(folder, quantiles, steps=stop.steps, planned_steps=planned, context_length=int(model.input_size))


if __name__ == "__main__":
    main()
