"""Contestants: statsforecast's AutoETS and MSTL, fitted anew at every origin; nothing limits their time.

    worker_statistical.py FOLDER auto_ets|mstl

Quantiles are the edges of their bands, the median their mean. A model that cannot be fitted leaves its series to
seasonal naive.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from job import LEVELS, NAME, Floats, Job, Series, Stopwatch, long_frame, read_job, read_series, rounds
from statsforecast import StatsForecast
from statsforecast.models import MSTL, AutoETS, SeasonalNaive

_BANDS = (20, 40, 60, 80, 95)


def model_of(name: str, job: Job) -> Any:
    """The model with the case's seasons."""
    if name == "auto_ets":
        return AutoETS(season_length=job.seasons[0], alias="found")
    if name == "mstl":
        return MSTL(season_length=list(job.seasons), alias="found")
    raise SystemExit(f"no statistical contestant {name}")


def forecast(model: Any, job: Job, histories: list[Series]) -> Floats:
    """Quantiles ``[series, horizon, level]`` after each history."""
    frame = long_frame(job, histories, is_filled=True)[[NAME, "ds", "y"]]
    frame[NAME] = np.repeat(np.arange(len(histories)), [len(each.time) for each in histories])
    engine = StatsForecast(
        models=[model],
        freq=job.freq,
        n_jobs=min(len(histories), os.cpu_count() or 1),
        fallback_model=SeasonalNaive(season_length=job.seasons[0]),
    )
    found = engine.forecast(df=frame, h=job.horizon, level=list(_BANDS)).sort_values([NAME, "ds"], kind="stable")
    columns = []
    for level in LEVELS:
        band = round(100 * abs(2 * level - 1))
        columns.append("found" if band == 0 else f"found-{'lo' if level < 0.5 else 'hi'}-{band}")
    return found[columns].to_numpy(np.float64).reshape(len(histories), job.horizon, len(LEVELS))


def main() -> None:
    """All windows, one origin at a time."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    job = read_job(folder)
    series, model = read_series(folder, job), model_of(name, job)
    groups = rounds(job, series)
    watch = Stopwatch()
    quantiles = np.full((sum(map(len, groups)), job.horizon, len(LEVELS)), np.nan)
    for group in groups:
        histories = []
        for _, index, row in group:
            whole = series[index].before(row)
            first = max(0, row - job.statistical_rows)
            histories.append(Series(whole.name, whole.time[first:], whole.values[first:], whole.known[first:]))
        quantiles[[place for place, *_ in group]] = forecast(model, job, histories)
    watch.write(folder, quantiles)


if __name__ == "__main__":
    main()
