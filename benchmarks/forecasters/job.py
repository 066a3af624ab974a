"""What a contestant is given and gives back: a folder with ``job.json`` and ``table.parquet``, then ``forecast.npz``.

Read in every contestant's own environment, so numpy and pandas are all it needs.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

LEVELS = (0.025, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.975)
"""Quantile levels every contestant forecasts: nine for the weighted quantile loss, the outer two for a 95 % band."""
NAME = "unique_id"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """One data set as a task."""

    case: str
    keys: tuple[str, ...]
    """Columns that name the series; none where there is one series."""
    time: str
    target: str
    known: tuple[str, ...]
    """Known covariates, all of them numbers."""
    freq: str
    seasons: tuple[int, ...]
    """Rows in a season, the shortest first: that is the one seasonal naive repeats and MASE is scaled by."""
    horizon: int
    test_rows: int
    """Rows held out at the end of every series."""
    step: int
    """Rows from one origin to the next, counted back from the last."""
    statistical_rows: int
    """Rows before an origin that statistical models are fitted on: all where a fit is quick."""
    budget_seconds: float = 0.0
    """Wall-clock of training."""
    seed: int = 0

    def origins(self, length: int) -> NDArray[np.int64]:
        """First forecast rows of a series of this length."""
        return np.arange(length - self.horizon, length - self.test_rows - 1, -self.step)[::-1]


@dataclass(frozen=True)
class Series:
    """One series of a table; ``known`` is ``[row, covariate]``."""

    name: str
    time: NDArray[np.datetime64]
    values: Floats
    known: Floats

    def before(self, row: int) -> Series:
        """The same without the rows from ``row`` on."""
        return Series(self.name, self.time[:row], self.values[:row], self.known[:row])


def write_job(folder: Path, job: Job) -> None:
    """Writes ``job.json``."""
    (folder / "job.json").write_text(json.dumps(asdict(job), indent=2) + "\n", encoding="utf-8")


def read_job(folder: Path) -> Job:
    """Reads ``job.json``."""
    values: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return Job(**{name: tuple(each) if isinstance(each, list) else each for name, each in values.items()})


def read_series(folder: Path, job: Job) -> list[Series]:
    """The table's series in the order of their names."""
    frame = pd.read_parquet(folder / "table.parquet")
    names = frame[list(job.keys)].astype(str).agg("/".join, axis=1) if job.keys else pd.Series("", index=frame.index)
    frame = frame.assign(**{NAME: names}).sort_values([NAME, job.time], kind="stable")
    return [
        Series(
            str(name),
            group[job.time].to_numpy("datetime64[ns]"),
            group[job.target].to_numpy(np.float64),
            group[list(job.known)].to_numpy(np.float64),
        )
        for name, group in frame.groupby(NAME, sort=True)
    ]


def windows(job: Job, series: list[Series]) -> list[tuple[int, int]]:
    """Series and first row of every window, in the order of the forecasts: by series, then in time."""
    return [(index, int(row)) for index, each in enumerate(series) for row in job.origins(len(each.time))]


def training_part(job: Job, series: list[Series]) -> list[Series]:
    """The rows a contestant may train on: those before the first that is held out."""
    return [each.before(len(each.time) - job.test_rows) for each in series]


def standardised(job: Job, series: list[Series]) -> list[Series]:
    """The same with known covariates of mean 0 and deviation 1 over the rows that may be trained on."""
    rows = np.concatenate([each.known for each in training_part(job, series)])
    loc, scale = rows.mean(axis=0), rows.std(axis=0)
    return [Series(each.name, each.time, each.values, (each.known - loc) / scale) for each in series]


def rounds(job: Job, series: list[Series]) -> list[list[tuple[int, int, int]]]:
    """Windows to be forecast together, at most one per series: ``(place in the result, series, first row)``.

    For libraries that forecast every series from its end.
    """
    grouped: dict[int, list[tuple[int, int, int]]] = {}
    for place, (index, row) in enumerate(windows(job, series)):
        grouped.setdefault(len(series[index].time) - row, []).append((place, index, row))
    return [grouped[back] for back in sorted(grouped, reverse=True)]


def long_frame(job: Job, chosen: list[Series], *, is_filled: bool) -> pd.DataFrame:
    """Columns ``unique_id``, ``ds``, ``y`` and the known covariates, as the Nixtla libraries read them.

    ``is_filled`` draws a line through gaps (their models know none) and says where in ``available_mask``.
    """
    frames = []
    for each in chosen:
        frame = pd.DataFrame({NAME: each.name or "series", "ds": each.time, "y": each.values})
        for column, name in enumerate(job.known):
            frame[name] = each.known[:, column]
        if is_filled:
            frame["available_mask"] = (~frame.y.isna()).astype(float)
            frame["y"] = frame.y.interpolate(limit_direction="both").fillna(0.0)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


class Stopwatch:
    """Wall-clock of training and of forecasting."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.train_seconds = 0.0

    def is_trained(self) -> None:
        """Called once training is over."""
        self.train_seconds = time.monotonic() - self._start
        self._start = time.monotonic()

    def write(self, folder: Path, quantiles: Floats, **details: Any) -> None:
        """Writes ``forecast.npz``: quantiles ``[window, horizon, level]``, rising; and what else is worth knowing."""
        notes = {
            "train_seconds": round(self.train_seconds, 1),
            "forecast_seconds": round(time.monotonic() - self._start, 1),
            **details,
        }
        np.savez(folder / "forecast.npz", quantiles=np.sort(quantiles, axis=-1), notes=json.dumps(notes))
