"""Scores: the same code for every contestant, from the package's own metrics. A finished cell is one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import LEVELS, Floats, Job, Series, windows

from trellis_ts import metrics
from trellis_ts.scores import ScoredWindows, ScoreSums
from trellis_ts.types import Forecast

_NINE = tuple(level for level in LEVELS if 0.1 <= level <= 0.9)
_OUTERMOST = (LEVELS[0], LEVELS[-1])


def scores(job: Job, series: list[Series], quantiles: Floats) -> dict[str, Any]:
    """Scores of quantiles ``[window, horizon, level]`` in data units, overall and by series.

    The point is the median. MASE and RMSSE are scaled by the seasonal naive error of all rows before the first origin;
    MSE and MAE are on the scale of those rows. Nothing measured is filled: missing truths are left out.
    """
    found = windows(job, series)
    if quantiles.shape != (len(found), job.horizon, len(LEVELS)):
        raise ValueError(f"forecasts of shape {quantiles.shape} for {len(found)} windows of {job.horizon} steps")
    if np.isnan(quantiles).any():
        raise ValueError("some forecasts are no number")
    scored = _truths(job, series, found)
    nine, outer = (_sums(job, series, scored, quantiles, levels) for levels in (_NINE, _OUTERMOST))
    overall, wide = nine.overall(), outer.overall()
    return {
        "mase": overall.mase,
        "weighted_quantile_loss": overall.weighted_quantile_loss,
        "rmsse": overall.rmsse,
        "smape": overall.smape,
        "mse": overall.mse,
        "mae": overall.mae,
        "quantile_loss": overall.quantile_loss,
        "crps": overall.crps,
        "coverage_80": overall.coverage,
        "coverage_95": wide.coverage,
        "interval_score_80": overall.interval_score,
        "interval_score_95": wide.interval_score,
        "num_windows": len(found),
        "num_values": nine.count,
        "mase_by_series": [round(each.mase, 5) for each in nine.per_item()],
    }


def _truths(job: Job, series: list[Series], found: list[tuple[int, int]]) -> ScoredWindows:
    before = [each.values[: len(each.values) - job.test_rows] for each in series]
    loc = np.array([np.nanmean(each) for each in before])
    scale = np.array([np.nanstd(each) or 1.0 for each in before])
    seasonal = np.array([metrics.seasonal_error(each, job.seasons[0]) for each in before])
    squared = np.array([metrics.seasonal_error(each, job.seasons[0], squared=True) for each in before])
    index = np.array([each for each, _ in found])
    truth = np.stack([series[each].values[row : row + job.horizon] for each, row in found])

    def per_window(values: Floats) -> Floats:
        return values[index][:, None, None]

    return ScoredWindows(
        series=index,
        origin=np.zeros(len(found), dtype=np.int64),
        truth=(truth[..., None] - per_window(loc)) / per_window(scale),
        loc=per_window(loc),
        scale=per_window(scale),
        seasonal=per_window(seasonal / scale),
        seasonal_squared=per_window(squared / scale**2),
    )


def _sums(
    job: Job, series: list[Series], scored: ScoredWindows, quantiles: Floats, levels: tuple[float, ...]
) -> ScoreSums:
    sums = ScoreSums((len(series), 1, job.horizon), 1, levels)
    standardised = (quantiles[:, :, None] - scored.loc[..., None]) / scored.scale[..., None]
    chosen = torch.from_numpy(standardised[..., [LEVELS.index(level) for level in levels]])
    sums.add(scored, Forecast(torch.from_numpy(standardised[..., LEVELS.index(0.5)]), chosen, levels))
    return sums


def cell_path(results: Path, case: str, contestant: str, seed: int) -> Path:
    """Where a cell lies."""
    return results / f"{case}-{contestant}-{seed}.json"


def write_cell(path: Path, cell: dict[str, Any]) -> None:
    """Writes a cell whole."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_cells(results: Path) -> list[dict[str, Any]]:
    """All cells of a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*-*.json"))]


def job_data(job: Job) -> dict[str, Any]:
    """The task as plain values."""
    return asdict(job)
