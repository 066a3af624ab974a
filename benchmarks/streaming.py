"""What an update of a live series costs, after a hundred steps and after a million.

    OMP_NUM_THREADS=1 python benchmarks/streaming.py             # some minutes
    OMP_NUM_THREADS=1 python benchmarks/streaming.py --quick     # contexts up to 10,000

A model of the default size with random weights: what is computed does not depend on them. Two processes share the two
cores for the figures of many updates a second, as a service would. Writes ``results/streaming.json``, ``.md`` and
``streaming_latency.png`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot

from trellis_ts.causal import CausalModel
from trellis_ts.checkpoints import Checkpoint, DataRecord, SeriesRecord
from trellis_ts.config import ExperimentConfig, ModelConfig, TrainingConfig, WindowShape
from trellis_ts.streaming.forecaster import StreamingForecaster

RESULTS = Path(__file__).parent / "results"
CONTEXTS = (100, 1_000, 10_000, 100_000, 1_000_000)
SHAPE = WindowShape(
    context_length=512, prediction_length=96, patch_length=32, patch_stride=32, season_length=96, num_channels=1
)
SERIES = 1_000


def make_live(**options: Any) -> StreamingForecaster:
    """A forecaster of the default size."""
    config = ExperimentConfig(model=ModelConfig(mode="streaming", num_heads=2), training=TrainingConfig())
    torch.manual_seed(0)
    model = CausalModel(config.model, SHAPE, config.training.quantile_levels).eval()
    record = DataRecord("time", None, ("y",), "15min", None, None, (SeriesRecord("", (0.0,), (1.0,), None),))
    return StreamingForecaster(Checkpoint(model, config, record), **options)


def latencies(live: StreamingForecaster, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of one update with the forecast after it, each: of the clock, and of the processor."""
    values, clock, processor = rng.normal(size=count), np.empty(count), np.empty(count)
    for index in range(count):
        begun, own = time.perf_counter(), time.thread_time()
        live.update(values[index])
        live.forecast()
        clock[index], processor[index] = time.perf_counter() - begun, time.thread_time() - own
    return clock, processor


def along(contexts: tuple[int, ...], count: int) -> list[dict[str, float]]:
    """The cost of an update at each context, and the memory of the process."""
    live, rng, rows = make_live(), np.random.default_rng(0), []
    latencies(live, rng, 100)
    seen = 100
    for context in contexts:
        while seen < context:
            piece = min(50_000, context - seen)
            live.update(rng.normal(size=piece).cumsum() * 0.01)
            seen += piece
        clock, processor = latencies(live, rng, count)
        seen += count
        row: dict[str, float] = {"context": context, "fastest_us": 1e6 * float(clock.min())}
        for name, found in (("clock", clock), ("processor", processor)):
            for share in (50, 99):
                row[f"{name}_p{share}_us"] = 1e6 * float(np.quantile(found, share / 100))
        row["state_bytes"] = live.bytes_per_series
        row["process_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append(row)
        print(row, flush=True)
    return rows


def one_by_one(seconds: float) -> tuple[int, float, float]:
    """Updates of a single series with a forecast each, the time they took and the processor's share of it."""
    live, rng, done = make_live(), np.random.default_rng(0), 0
    latencies(live, rng, 200)
    begun, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - begun < seconds:
        latencies(live, rng, 100)
        done += 100
    return done, time.perf_counter() - begun, time.process_time() - cpu


def many_series(seconds: float, has_forecast: bool) -> tuple[int, float, float]:
    """Series updated, with a forecast each or without; as ``one_by_one``."""
    live, rng, done = make_live(), np.random.default_rng(0), 0
    names = [f"s{index}" for index in range(SERIES)]
    for _ in range(2):
        live.update(rng.normal(size=(SERIES, 20, 1)), series=names)
    live.forecast(names)
    begun, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - begun < seconds:
        live.update(rng.normal(size=SERIES), series=names)
        if has_forecast:
            live.forecast(names)
        done += SERIES
    return done, time.perf_counter() - begun, time.process_time() - cpu


def on_two_cores(work: Any, *arguments: Any) -> tuple[float, float]:
    """What two processes do in a second, and would do if no one else used the two cores."""
    with ProcessPoolExecutor(2) as pool:
        found = [each.result() for each in [pool.submit(work, *arguments) for _ in range(2)]]
    return sum(done / took for done, took, _ in found), sum(done / cpu for done, _, cpu in found)


def picture(rows: list[dict[str, float]]) -> None:
    """Cost against context, in processor time: the clock shows what else the machine does."""
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    contexts = [row["context"] for row in rows]
    for share, label in ((50, "median"), (99, "99th percentile")):
        axes.plot(contexts, [row[f"processor_p{share}_us"] for row in rows], marker="o", label=label)
    axes.set(xscale="log", xlabel="steps seen before", ylabel="processor µs per update with forecast", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "streaming_latency.png", dpi=150)


def write(result: dict[str, Any]) -> None:
    """The record as JSON and Markdown."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "streaming.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = ["# Live series: cost of an update with a forecast", ""]
    lines += [f"{result['machine']}; load average {result['load']:.1f}. Microseconds.", ""]
    titles = ("steps seen before", "processor, median", "processor, 99th percentile", "clock, fastest", "clock, median")
    titles += ("clock, 99th percentile", "state, bytes", "process, MiB")
    lines += [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    keys = ("context", "processor_p50_us", "processor_p99_us", "fastest_us", "clock_p50_us", "clock_p99_us")
    keys += ("state_bytes", "process_mib")
    lines += [f"| {' | '.join(f'{row[key]:,.0f}' for key in keys)} |" for row in result["along"]]
    lines += ["", "| two processes on two cores | a second | a second of processor time on each |", "|---|---|---|"]
    lines += [f"| {name} | {found:,.0f} | {alone:,.0f} |" for name, (found, alone) in result["rates"].items()]
    (RESULTS / "streaming.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """All measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="contexts up to 10,000 and short runs")
    quick = parser.parse_args().quick
    load = os.getloadavg()[0]
    rows = along(CONTEXTS[:3] if quick else CONTEXTS, 300 if quick else 1000)
    seconds = 2.0 if quick else 6.0
    rates = {
        "updates of a single series, a forecast after each": on_two_cores(one_by_one, seconds),
        f"updates of {SERIES:,} series at once": on_two_cores(many_series, seconds, False),
        f"updates of {SERIES:,} series at once, a forecast after each": on_two_cores(many_series, seconds, True),
    }
    print(rates, flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    machine = f"{os.cpu_count()} shared {platform.machine()} cores, torch {torch.__version__}, commit {commit.strip()}"
    write({"machine": machine, "load": load, "along": rows, "rates": rates})
    picture(rows)


if __name__ == "__main__":
    main()
