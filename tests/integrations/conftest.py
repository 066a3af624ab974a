"""Settings and series that a test can afford."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """Settings of `trellis train` for a training of a tenth of a second."""
    return {
        "max_epochs": 1,
        "num_heads": 2,
        "num_slots": 4,
        "num_layers": 1,
        "width": 8,
        "feedforward_width": 8,
        "windows_per_epoch": 8,
        "validation_windows": 4,
    }


@pytest.fixture(scope="session")
def series() -> pd.Series:
    """Sixty days with a week in them."""
    steps = np.arange(60)
    noise = np.random.default_rng(0).normal(size=60)
    index = pd.date_range("2024-01-01", periods=60, freq="D", name="date")
    return pd.Series(10 + np.sin(2 * np.pi * steps / 7) + 0.1 * noise, index=index, name="y")


@pytest.fixture(scope="session")
def covariate(series: pd.Series) -> pd.DataFrame:
    """A number known for ten days more than the series."""
    index = pd.date_range(series.index[0], periods=70, freq="D", name="date")
    return pd.DataFrame({"price": np.random.default_rng(1).normal(size=70)}, index=index)
