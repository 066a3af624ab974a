"""Models and histories for live series."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trellis_ts.conformal import Calibration
from trellis_ts.streaming.forecaster import StreamingForecaster
from trellis_ts.types import Columns, Panel, Series

SIZES = {"mode": "streaming", "context_length": 14, "prediction_length": 5, "patch_length": 4, "patch_stride": 4}
SIZES |= {"num_slots": 8, "width": 16, "num_heads": 2, "num_layers": 2}
START = np.datetime64("2024-03-01T05", "ns")
HOUR = np.timedelta64(1, "h")


def make_values(length, *, channels=2, missing=0.15, seed=0, level=40.0):
    rng = np.random.default_rng(seed)
    values = level + 3 * rng.normal(size=(length, channels)).cumsum(axis=0)
    values[rng.random(values.shape) < missing] = np.nan
    return values


def as_panel(values, name="a", start=START):
    columns = Columns("ds", "id", tuple(f"y{index}" for index in range(values.shape[1])))
    return Panel((Series(name, start + np.arange(len(values)) * HOUR, values),), columns, "h")


def make_calibration(horizon=5):
    offsets = tuple(tuple(0.1 * (band + 1) * (step + 1) for step in range(horizon)) for band in range(2))
    correlations = tuple((0.5,) * min(8, horizon - 1) for _ in range(horizon))
    return Calibration((0.5, 0.8), offsets, correlations, 100, 20, 1)


@pytest.fixture(scope="session", name="make_values")
def values_fixture():
    """``[step, channel]``: a random walk with holes."""
    return make_values


@pytest.fixture(scope="session", name="as_panel")
def panel_fixture():
    """A panel of one series, by default called "a" and starting at 05:00."""
    return as_panel


@pytest.fixture(scope="session")
def make_live(make_checkpoint):
    """A streaming model of random weights that knows the series "a", and a live forecaster on it."""

    def make(*, channels=2, calibrated=False, levels=(0.1, 0.25, 0.5, 0.75, 0.9), options=None, **settings):
        panel = as_panel(make_values(60, channels=channels))
        checkpoint = make_checkpoint(panel, quantile_levels=levels, **(SIZES | settings))
        if calibrated:
            checkpoint = replace(checkpoint, calibration=make_calibration())
        return StreamingForecaster(checkpoint, **(options or {}))

    return make
