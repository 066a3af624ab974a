"""The data sets, each with its windows and horizon: what every contestant is asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from job import Job

_HERE = Path(__file__).parent


def _m4_hourly(data: Path) -> pd.DataFrame:
    frame = pd.read_csv(data / "m4_hourly_long.csv.gz", parse_dates=["ds"])
    return frame[["unique_id", "ds", "y"]]


def _vic_electricity(data: Path) -> pd.DataFrame:
    frame = pd.read_csv(data / "vic_electricity.csv.gz")
    frame["Time"] = pd.to_datetime(frame.Time, utc=True).dt.tz_localize(None)
    frame["Holiday"] = frame.Holiday.astype(float)
    return frame[["Time", "Demand", "Temperature", "Holiday"]]


def _online_retail_daily(data: Path) -> pd.DataFrame:
    frame = pd.read_csv(data / "online_retail_daily.csv.gz", parse_dates=["InvoiceDate"], dtype={"StockCode": str})
    return frame[["StockCode", "InvoiceDate", "Quantity"]]


def _generated_panel(data: Path) -> pd.DataFrame:
    """Drawn anew by the committed generator, in the folder of the run."""
    path = data / "generated_panel.parquet"
    if not path.exists():
        subprocess.run([sys.executable, str(_HERE.parent / "generated_panel.py"), str(path)], check=True)
    return pd.read_parquet(path)


CASES: dict[str, tuple[Job, Callable[[Path], pd.DataFrame]]] = {
    "m4_hourly": (
        Job(
            case="m4_hourly",
            keys=("unique_id",),
            time="ds",
            target="y",
            known=(),
            freq="h",
            seasons=(24, 168),
            horizon=48,
            test_rows=48,
            step=48,
            statistical_rows=1008,
        ),
        _m4_hourly,
    ),
    "vic_electricity": (
        Job(
            case="vic_electricity",
            keys=(),
            time="Time",
            target="Demand",
            known=("Temperature", "Holiday"),
            freq="30min",
            seasons=(48, 336),
            horizon=48,
            test_rows=8 * 336,
            step=48,
            statistical_rows=12 * 336,
        ),
        _vic_electricity,
    ),
    "online_retail_daily": (
        Job(
            case="online_retail_daily",
            keys=("StockCode",),
            time="InvoiceDate",
            target="Quantity",
            known=(),
            freq="D",
            seasons=(7,),
            horizon=14,
            test_rows=8 * 7,
            step=7,
            statistical_rows=363,
        ),
        _online_retail_daily,
    ),
    "generated_panel": (
        Job(
            case="generated_panel",
            keys=("region", "store", "product"),
            time="date",
            target="units",
            known=("promotion",),
            freq="D",
            seasons=(7,),
            horizon=28,
            test_rows=4 * 28,
            step=28,
            statistical_rows=1095,
        ),
        _generated_panel,
    ),
}
"""By name: the task, and what reads its table (columns of the keys, time, target and known covariates, in this order)
from the folder of the data."""
