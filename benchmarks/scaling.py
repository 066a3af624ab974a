"""A hundred million rows forecast on two cores: memory, throughput, and the same through Ray with a worker killed.

    python benchmarks/scaling.py                        # 100,000 series of 1,000 steps; some 10 GB of disk
    python benchmarks/scaling.py --series 1000 -o ""    # a hundredth of it, nothing recorded

Generates hourly series into Parquet files of 1,000 series each, trains a small model on the first of them, and runs
``trellis forecast`` on all as a user would. Resident memory is that of the whole command (its largest, as the kernel
counts it; of Ray the sum over its processes, sampled). Then ``--engine ray`` with two workers, one of which is sent
SIGKILL, and both outputs compared row for row. Last, how the cost of a forecast grows with series, channels and
context, as processor time in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RESULTS = Path(__file__).with_name("results") / "scaling.json"
SERIES_PER_FILE, HORIZON, CONTEXT = 1000, 24, 168
_FAST = ("--preset", "fast", "--max-epochs", "1", "--windows-per-epoch", "2048", "--patch-length", "24", "--quiet")


def generate(folder: Path, num_series: int, num_steps: int, *, seed: int = 0) -> None:
    """Files of series with a daily and a weekly rhythm, a level of their own and noise; a seed gives the same rows."""
    folder.mkdir(parents=True)
    hours = np.datetime64("2024-01-01", "us") + np.arange(num_steps).astype("timedelta64[h]")
    angle = 2 * np.pi * np.arange(num_steps)
    for start in range(0, num_series, SERIES_PER_FILE):
        count = min(SERIES_PER_FILE, num_series - start)
        rng = np.random.default_rng([seed, start])
        level = np.exp(rng.normal(3, 1, (count, 1)))
        shape = rng.normal(0, 0.3, (count, 1)) * np.sin(angle / 24) + rng.normal(0, 0.1, (count, 1)) * np.cos(
            angle / 168
        )
        values = level * np.exp(shape + 0.1 * rng.normal(size=(count, num_steps)))
        names = pa.array([f"series-{start + index:06d}" for index in range(count)])
        table = pa.table(
            {
                "unique_id": names.take(pa.array(np.repeat(np.arange(count), num_steps))),
                "ds": pa.array(np.tile(hours, count)),
                "y": pa.array(values.ravel().round(3)),
            }
        )
        pq.write_table(table, folder / f"{start // SERIES_PER_FILE:05d}.parquet", row_group_size=1 << 17)


def trellis(*arguments: object) -> list[str]:
    """The command line of this interpreter."""
    return [sys.executable, "-m", "trellis_ts", *map(str, arguments)]


def measured(command: list[str], cwd: Path) -> dict[str, float]:
    """Wall and processor seconds of a command, and its largest resident memory in GiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return {
        "wall_seconds": time.perf_counter() - start,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "resident_gib": usage.ru_maxrss / 2**20,
    }


def processes_below(root: int) -> dict[int, str]:
    """Every process that descends from one, with its command line."""
    parents, titles = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
        except (OSError, ValueError):  # it has ended
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: titles.get(pid, "") for pid in found}


def resident_gib(pid: int) -> float:
    """What a process holds now, shared pages by their share."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 2**20


def through_ray(command: list[str], cwd: Path, output: Path, num_parts: int) -> dict[str, float]:
    """Runs the command, kills one worker once a quarter of the partitions is there, and samples memory."""
    start, largest, largest_worker, killed = time.perf_counter(), 0.0, 0.0, 0
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.5)
        below = processes_below(process.pid)
        workers = [pid for pid, title in below.items() if title.startswith("ray::_run_block")]
        done = len(list(output.glob("part-*")))
        if not killed and workers and done >= max(1, num_parts // 4):
            killed = workers[0]
            os.kill(killed, signal.SIGKILL)
        largest = max(largest, sum(map(resident_gib, below)))
        largest_worker = max([largest_worker, *map(resident_gib, workers)])
    if process.returncode != 0 or not killed:
        raise SystemExit("the run through Ray failed, or no worker was killed")
    return {
        "wall_seconds": time.perf_counter() - start,
        "resident_gib_of_everything": largest,
        "resident_gib_of_a_worker": largest_worker,
        "workers_killed": 1,
    }


def differences(one: Path, other: Path) -> tuple[int, int]:
    """Rows compared, and partitions that are not equal bit for bit."""
    names = sorted(each.name for each in one.glob("part-*"))
    if names != sorted(each.name for each in other.glob("part-*")):
        raise SystemExit("the outputs have different partitions")
    rows = unequal = 0
    for name in names:
        ours, theirs = pq.read_table(one / name), pq.read_table(other / name)
        rows += len(ours)
        unequal += not ours.equals(theirs)
    return rows, unequal


def growth(work: Path) -> list[dict[str, Any]]:
    """Processor time of a forecast per series, the smallest of three, for several contexts and numbers of channels."""
    import torch

    from trellis_ts import Forecaster
    from trellis_ts.datasets.readers import panel_from_frame

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    cells = []
    for context, channels, count in [
        (96, 1, 500),
        (96, 1, 2000),
        (384, 1, 500),
        (1536, 1, 500),
        (96, 4, 500),
        (96, 16, 500),
    ]:
        hours = np.datetime64("2024-01-01", "us") + np.arange(2000).astype("timedelta64[h]")
        names = np.repeat([f"s{index:05d}" for index in range(count)], len(hours))
        columns = {f"y{channel}": rng.normal(size=count * len(hours)) for channel in range(channels)}
        table = pa.table({"id": names, "ds": np.tile(hours, count), **columns})
        model = work / f"growth-{context}-{channels}"
        if not model.exists():
            pq.write_table(table.slice(0, 20 * len(hours)), work / "growth.parquet")
            options = ("--prediction-length", HORIZON, "--context-length", context, "--target", *columns)
            subprocess.run(trellis("train", work / "growth.parquet", "-o", model, *options, *_FAST), check=True)
        forecaster = Forecaster.load(model)
        times: dict[str, list[float]] = {"reading": [], "forecasting": []}
        for _ in range(3):
            start = time.process_time()
            panel = panel_from_frame(table, time="ds", id="id", target=list(columns), freq="h")
            middle = time.process_time()
            forecaster.forecast(panel)
            times["reading"].append(middle - start)
            times["forecasting"].append(time.process_time() - middle)
        cells.append(
            {
                "context": context,
                "channels": channels,
                "series": count,
                "reading_ns_per_cell": 1e9 * min(times["reading"]) / (count * len(hours) * channels),
                "forecasting_ms_per_series": 1e3 * min(times["forecasting"]) / count,
            }
        )
    return cells


def run(num_series: int, num_steps: int, work: Path) -> dict[str, Any]:
    """Everything, in a folder that is emptied afterwards."""
    data, model = work / "data", work / "model"
    start = time.perf_counter()
    generate(data, num_series, num_steps)
    print(f"generated in {time.perf_counter() - start:.0f} s", flush=True)
    options = ("--prediction-length", HORIZON, "--context-length", CONTEXT, *_FAST)
    subprocess.run(trellis("train", data / "00000.parquet", "-o", model, *options), check=True)
    rows = num_series * num_steps
    load = os.getloadavg()[0]
    single = measured(trellis("forecast", model, data, "-o", work / "one"), work)
    single |= {
        "rows_per_second": rows / single["wall_seconds"],
        "series_per_second": num_series / single["wall_seconds"],
    }
    manifest = json.loads((work / "one" / "_trellis.json").read_text())
    print(json.dumps(single), flush=True)
    result = {
        "series": num_series,
        "steps": num_steps,
        "rows": rows,
        "input_bytes": sum(each.stat().st_size for each in data.iterdir()),
        "output_bytes": sum(each.stat().st_size for each in (work / "one").iterdir()),
        "partitions": manifest["partitions"],
        "rows_written": manifest["rows"],
        "one_process": single,
        "load_before": load,
    }
    command = trellis("forecast", model, data, "-o", work / "ray", "--engine", "ray")
    result["ray"] = through_ray(command, work, work / "ray", manifest["partitions"])
    result["ray"]["rows_per_second"] = rows / result["ray"]["wall_seconds"]
    result["ray"]["rows_compared"], result["ray"]["unequal_partitions"] = differences(work / "one", work / "ray")
    print(json.dumps(result["ray"]), flush=True)
    result["growth"] = growth(work)
    result["load_after"] = os.getloadavg()[0]
    return result


def as_text(result: dict[str, Any]) -> str:
    """The record for people."""
    one, ray = result["one_process"], result["ray"]
    lines = [
        "# A folder of many series on two cores",
        "",
        f"`python benchmarks/scaling.py --series {result['series']} --steps {result['steps']}`, on two shared x86-64 "
        f"cores, commit {result['commit']}; load {result['load_before']:.1f} before, {result['load_after']:.1f} after.",
        "",
        f"{result['series']:,} series of {result['steps']:,} steps ({result['rows']:,} rows, "
        f"{result['input_bytes'] / 1e9:.2f} GB of Parquet) gave {result['rows_written']:,} rows of forecasts "
        f"({result['output_bytes'] / 1e9:.2f} GB) in {result['partitions']} partitions.",
        "",
        "| engine | wall, s | processor, s | rows/s | series/s | resident memory |",
        "|---|---|---|---|---|---|",
        f"| one process | {one['wall_seconds']:.0f} | {one['processor_seconds']:.0f} | {one['rows_per_second']:,.0f} | "
        f"{one['series_per_second']:,.0f} | {one['resident_gib']:.2f} GiB |",
        f"| Ray, two workers, one killed | {ray['wall_seconds']:.0f} | | {ray['rows_per_second']:,.0f} | "
        f"{result['series'] / ray['wall_seconds']:,.0f} | {ray['resident_gib_of_a_worker']:.2f} GiB a worker, "
        f"{ray['resident_gib_of_everything']:.2f} GiB with Ray itself |",
        "",
        f"Row for row, {ray['rows_compared']:,} rows compared: {ray['unequal_partitions']} partitions differ.",
        "",
        "Processor time of a forecast in one thread, the least of three:",
        "",
        "| context | channels | series | reading, ns per cell | forecasting, ms per series |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {cell['context']} | {cell['channels']} | {cell['series']:,} | {cell['reading_ns_per_cell']:.0f} | "
        f"{cell['forecasting_ms_per_series']:.3f} |"
        for cell in result["growth"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs, prints and records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--series", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--work", type=Path, help="folder for the data; a temporary one unless given")
    parser.add_argument("-o", "--output", default=str(RESULTS), help="JSON file; nothing is recorded if empty")
    values = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="trellis-scaling-", dir=values.work))
    try:
        result = run(values.series, values.steps, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result["commit"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if values.output:
        Path(values.output).write_text(json.dumps(result, indent=2) + "\n")
        Path(values.output).with_suffix(".md").write_text(as_text(result))
    print(as_text(result))


if __name__ == "__main__":
    main()
