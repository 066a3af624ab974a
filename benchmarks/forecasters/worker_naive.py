"""Contestant: seasonal naive with the bands of docs/evaluation.md. ``worker_naive.py FOLDER SEASON_ROWS``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from job import LEVELS, Stopwatch, read_job, read_series, windows

from trellis_ts.baselines import naive_forecast

_SEASONS_READ = 10


def main() -> None:
    """Every window from the ten seasons before it."""
    folder, season = Path(sys.argv[1]), int(sys.argv[2])
    job = read_job(folder)
    series = read_series(folder, job)
    watch = Stopwatch()
    result = []
    for index, row in windows(job, series):
        values = series[index].values[max(0, row - _SEASONS_READ * season) : row]
        context = torch.from_numpy(np.nan_to_num(values))[None, :, None]
        found = naive_forecast(
            "seasonal_naive",
            context,
            torch.from_numpy(~np.isnan(values))[None, :, None],
            season_length=season,
            prediction_length=job.horizon,
            quantile_levels=LEVELS,
        ).quantiles
        assert found is not None
        result.append(found[0, :, 0].numpy())
    watch.write(folder, np.stack(result))


if __name__ == "__main__":
    main()
