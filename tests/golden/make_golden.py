"""Makes the small model and the forecast that ``test_golden.py`` compares with: ``python tests/golden/make_golden.py``.

Run it only when a change of the format or of the numbers is meant; the files it writes are part of the tree.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from trellis_ts.config import DataConfig, ExperimentConfig, ModelConfig, TrainingConfig, WindowConfig
from trellis_ts.datasets.readers import read_table
from trellis_ts.forecaster import Forecaster
from trellis_ts.preparation import prepare
from trellis_ts.training import fit

HERE = Path(__file__).parent
CONFIG = ExperimentConfig(
    data=DataConfig(validation_size=14, test_size=14),
    window=WindowConfig(context_length=28, prediction_length=7, patch_length=7, season_length=7),
    model=ModelConfig(
        width=8, num_heads=2, num_slots=4, num_layers=1, feedforward_width=8, pooling="last", seasonal_cycle=True
    ),
    training=TrainingConfig(
        quantile_levels=(0.1, 0.5, 0.9), max_epochs=5, learning_rate=0.01, batch_size=16, device="cpu", seed=1
    ),
)


def make_input() -> pd.DataFrame:
    """Two shops' daily sales with a weekly rhythm, some of them missing."""
    rng = np.random.default_rng(7)
    days = pd.date_range("2023-11-01", periods=90, freq="D").strftime("%Y-%m-%d")
    pieces = []
    for name, level in (("north", 200.0), ("south", 12.0)):
        sales = level * (1 + 0.3 * np.sin(2 * np.pi * np.arange(90) / 7) + 0.05 * rng.normal(size=90))
        sales[rng.random(90) < 0.05] = np.nan
        pieces.append(pd.DataFrame({"shop": name, "day": days, "sales": sales.round(2)}))
    return pd.concat(pieces, ignore_index=True)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    make_input().to_csv(HERE / "input.csv", index=False)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, _ = fit(prepare(read_table(HERE / "input.csv"), CONFIG), Path(folder))
    # Without a calibration, so that a model from before there was one is read, too.
    Forecaster(replace(checkpoint, calibration=None)).save(HERE / "model")
    forecast = Forecaster.load(HERE / "model").predict(pd.read_csv(HERE / "input.csv"), prediction_length=10)
    forecast.to_csv(HERE / "forecast.csv", index=False)


if __name__ == "__main__":
    main()
