"""How fast data reach the model and forecasts leave it: windows, training's wait, and ``predict``.

    OMP_NUM_THREADS=2 python benchmarks/data_path.py          # some minutes; writes results/data_path.json and .md

Four measurements, each in a process of its own:

* windows: batches from the loader that training uses, on one core, of 1,000,000 steps of 20 channels at context 512 and
  horizon 96; and the memory the process holds at its peak, statistics of the training rows included, beyond what it
  held after its imports and a first small batch. The data are the panel's values in double precision and its stamps.
* waiting: the share of a training step spent until the next batch is there, on half-hourly demand with a past and a
  known covariate and the calendar (``vic_electricity`` of ``$TRELLIS_DATA``).
* one series: ``Forecaster.predict`` on a frame of 300 rows, and the network's forward pass on the same window by turns.
* many series: 10,000 series of 200 rows in one frame.

Where NeuralForecast is installed, its ``predict`` takes turns with ours on the same frames, with NLinear, about the
smallest network it has, and so does that network alone: what is beyond it is what the library adds. Times are the least
of several; other work on the machine lengthens them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from trellis_ts.checkpoints import Checkpoint, DataRecord, SeriesRecord, build_model
from trellis_ts.config import ExperimentConfig, ModelConfig, TrainingConfig, WindowShape
from trellis_ts.conformal import BANDS, Calibration
from trellis_ts.copula import LARGEST_LAG
from trellis_ts.datasets.readers import panel_from_frame, read_table
from trellis_ts.datasets.splits import Scaler
from trellis_ts.datasets.windows import ScaledPanel, WindowDataset
from trellis_ts.forecaster import Forecaster
from trellis_ts.loaders import WindowDataModule
from trellis_ts.losses import forecast_loss
from trellis_ts.preparation import prepare
from trellis_ts.types import Columns, Panel, Series

RESULTS = Path(__file__).parent / "results"
CONTEXT, HORIZON = 168, 24
ROUNDS = 30


def resident_bytes(field: str) -> int:
    """``VmRSS`` is what the process holds, ``VmHWM`` the most it ever held (since ``clear_refs`` was written)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def generated(steps: int, channels: int) -> Panel:
    values = np.random.default_rng(0).standard_normal((steps, channels))
    stamps = np.datetime64("2000-01-01", "ns") + np.arange(steps) * np.timedelta64(60 * 10**9, "ns")
    names = tuple(f"c{index}" for index in range(channels))
    return Panel((Series("", stamps, values),), Columns("date", None, names), "min")


def loader_of(panel: Panel, context: int, horizon: int) -> Any:
    rows = [(0, len(panel.series[0]))]
    scaled = ScaledPanel(panel, Scaler.fit(panel, rows), 1)
    windows = WindowDataset(scaled, rows, context_length=context, prediction_length=horizon, min_context=1)
    return WindowDataModule(windows, windows, TrainingConfig(batch_size=64)).train_dataloader()


def measure_windows(steps: int = 1_000_000, batches: int = 2_000) -> dict[str, Any]:
    torch.set_num_threads(1)
    for _ in loader_of(generated(2_000, 20), 512, 96):
        break
    before = resident_bytes("VmRSS")
    panel = generated(steps, 20)
    data = sum(series.values.nbytes + series.time.nbytes for series in panel.series)
    Path("/proc/self/clear_refs").write_text("5")
    seconds = []
    loader = loader_of(panel, 512, 96)
    for _ in range(3):
        batch_seconds = []
        start = time.perf_counter()
        for index, batch in enumerate(loader):
            batch_seconds.append((time.perf_counter() - start) / len(batch.context))
            if index == batches // 3:
                break
            start = time.perf_counter()
        seconds += batch_seconds[1:]
    return {
        "windows_per_second_median_batch": 1 / float(np.median(seconds)),
        "windows_per_second_best_batch": 1 / min(seconds),
        "memory_over_data": (resident_bytes("VmHWM") - before) / data,
        "data_megabytes": data / 1e6,
    }


def measure_waiting(steps: int = 60) -> dict[str, Any]:
    panel = read_table(
        Path(os.environ["TRELLIS_DATA"]) / "vic_electricity.csv.gz",
        time="Time",
        target=["Demand"],
        past_covariates=["Temperature"],
        known_covariates=["Holiday"],
    )
    result = {}
    for name, model in (("default", ModelConfig()), ("one_layer_width_32", ModelConfig(width=32, num_layers=1))):
        preparation = prepare(panel, ExperimentConfig(model=model))
        network = build_model(preparation.config, preparation.shape).train()
        optimizer = torch.optim.AdamW(network.parameters())
        batches = iter(WindowDataModule(preparation.train, preparation.validation, TrainingConfig()).train_dataloader())
        waited, total = [], []
        for _ in range(steps):
            start = time.perf_counter()
            batch = next(batches)
            waited.append(time.perf_counter() - start)
            loss = forecast_loss(network(batch), batch.future, batch.future_observed, "quantile")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total.append(time.perf_counter() - start)
        result[f"waiting_share_{name}"] = float(np.median(waited[5:]) / np.median(total[5:]))
        result[f"batch_milliseconds_{name}"] = 1e3 * float(np.median(waited[5:]))
        result[f"step_milliseconds_{name}"] = 1e3 * float(np.median(total[5:]))
    return result


def small_forecaster(num_series: int) -> Forecaster:
    """One layer of width 32 with random weights, as if trained on and calibrated for the series of ``frame_of``."""
    config = ExperimentConfig(model=ModelConfig(width=32, num_layers=1))
    model = build_model(config, WindowShape(CONTEXT, HORIZON, 12, 12, 24, 1))
    series = tuple(SeriesRecord(f"s{index}", (0.0,), (1.0,), None) for index in range(num_series))
    record = DataRecord("ds", "unique_id", ("y",), "h", None, None, series)
    offsets = tuple((0.01 * index,) * HORIZON for index in range(len(BANDS)))
    correlations = ((0.5,) * min(LARGEST_LAG, HORIZON - 1),) * HORIZON
    calibration = Calibration(BANDS, offsets, correlations, 100, 10, 1)
    return Forecaster(Checkpoint(model.eval(), config, record, calibration))


def frame_of(num_series: int, rows: int, *, as_text: bool = False) -> pd.DataFrame:
    stamps = pd.date_range("2024-01-01", periods=rows, freq="h")
    times = stamps.strftime("%Y-%m-%d %H:%M:%S").to_numpy(object) if as_text else stamps.to_numpy()
    return pd.DataFrame(
        {
            "unique_id": np.repeat(np.array([f"s{index}" for index in range(num_series)], dtype=object), rows),
            "ds": np.tile(times, num_series),
            "y": np.random.default_rng(0).standard_normal(num_series * rows),
        }
    )


def by_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least seconds of each."""
    least = dict.fromkeys(contestants, float("inf"))
    for contestant in contestants.values():
        contestant()
    for _ in range(rounds):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            contestant()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def neural_forecast(frame: pd.DataFrame) -> dict[str, Callable[[], object]]:
    """NLinear, trained for a step: forecasting the frame, and its network alone on one window; nothing where it is not
    installed."""
    if importlib.util.find_spec("neuralforecast") is None:
        return {}
    warnings.simplefilter("ignore")
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NLinear

    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = {"enable_progress_bar": False, "logger": False, "enable_model_summary": False, "accelerator": "cpu"}
    other = NeuralForecast([NLinear(h=HORIZON, input_size=CONTEXT, max_steps=1, **quiet)], freq="h")
    other.fit(frame)
    network, window = other.models[0], {"insample_y": torch.zeros(1, CONTEXT, 1)}

    def forward() -> None:
        with torch.inference_mode():
            network(window)

    return {"neuralforecast": lambda: other.predict(frame), "neuralforecast_forward": forward}


def measure_one_series() -> dict[str, Any]:
    forecaster, frame, text = small_forecaster(1), frame_of(1, 300), frame_of(1, 300, as_text=True)
    panel = panel_from_frame(frame, time="ds", target=["y"], id="unique_id", freq="h")
    window = ScaledPanel(panel, forecaster.scaler(), 24).gather(np.array([0]), np.array([300]), CONTEXT, 0)

    def forward() -> None:
        with torch.inference_mode():
            forecaster.checkpoint.model(window)

    contestants = {
        "forward": forward,
        "predict": lambda: forecaster.predict(frame),
        "predict_text_dates": lambda: forecaster.predict(text),
    }
    contestants |= neural_forecast(frame)
    least = by_turns(contestants, ROUNDS)
    result = {f"{name}_milliseconds": 1e3 * seconds for name, seconds in least.items()}
    for name in ("predict", "predict_text_dates"):
        result[f"{name}_beyond_forward_milliseconds"] = 1e3 * (least[name] - least["forward"])
    if "neuralforecast" in least:
        beyond = least["neuralforecast"] - least["neuralforecast_forward"]
        result["neuralforecast_beyond_forward_milliseconds"] = 1e3 * beyond
        result["neuralforecast_over_predict"] = least["neuralforecast"] / least["predict"]
        result["neuralforecast_over_predict_beyond_forward"] = beyond / (least["predict"] - least["forward"])
    return result


def measure_many_series(num_series: int = 10_000) -> dict[str, Any]:
    forecaster, frame = small_forecaster(num_series), frame_of(num_series, 200)
    contestants: dict[str, Callable[[], object]] = {"predict": lambda: forecaster.predict(frame)}
    contestants |= {name: each for name, each in neural_forecast(frame).items() if name == "neuralforecast"}
    least = by_turns(contestants, 2)
    result = {f"{name}_series_per_second": num_series / seconds for name, seconds in least.items()}
    if "neuralforecast" in least:
        result["neuralforecast_over_predict"] = least["neuralforecast"] / least["predict"]
    return result


MEASUREMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "windows": measure_windows,
    "waiting": measure_waiting,
    "one series": measure_one_series,
    "many series": measure_many_series,
}


def machine() -> dict[str, Any]:
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = {}
    for package in ("torch", "numpy", "pandas", "pyarrow", "numba", "neuralforecast"):
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
    }


def markdown(results: dict[str, dict[str, Any]], about: dict[str, Any]) -> str:
    lines = ["# The way of the data", "", "Written by `benchmarks/data_path.py`, whose text says what is measured.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    for name, numbers in results.items():
        lines += ["", f"## {name}", "", "| what | |", "|---|---:|"]
        lines += [f"| {key.replace('_', ' ')} | {value:,.4g} |" for key, value in numbers.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MEASUREMENTS, help="measure one thing and print it as JSON")
    only = parser.parse_args().only
    if only is not None:
        print(json.dumps(MEASUREMENTS[only]()))
        return
    about, results = machine(), {}
    for name in MEASUREMENTS:
        if name == "waiting" and "TRELLIS_DATA" not in os.environ:
            print("waiting is left out: TRELLIS_DATA names no folder")
            continue
        command = [sys.executable, __file__, "--only", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, json.dumps(results[name], indent=2), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data_path.json").write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")
    (RESULTS / "data_path.md").write_text(markdown(results, about))


if __name__ == "__main__":
    main()
