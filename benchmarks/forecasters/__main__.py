"""This package beside its peers: the same data, windows, wall-clock and scores for all.

    python benchmarks/forecasters --peers-python peers/bin/python              # everything: hours
    python benchmarks/forecasters online_retail_daily --contestants trellis,seasonal_naive,auto_ets --budget 30
    python benchmarks/forecasters --table                                      # only rewrite the table

Data sets are read from TRELLIS_DATA; the generated panel is drawn anew. Every contestant is a process of its own, in
its own environment, that trains on the rows before the first origin for at most the budget and then forecasts every
window from the rows before that window's origin; seasonal naive, AutoETS and MSTL are fitted anew at each origin and
take the time they need. A finished cell (data set, contestant, seed) is a file in the results folder and is not run
again; delete it to have it run again. The table beside the folder shows all cells.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import numpy as np
import report
from cases import CASES
from contestants import CONTESTANTS, Contestant, Outcome, install_line, run, versions
from job import Job, read_series, write_job

_HERE = Path(__file__).parent
_RESULTS = _HERE.parent / "results" / "forecasters"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/forecasters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=[], help=f"data sets: {', '.join(CASES)} (default: all)")
    parser.add_argument(
        "--contestants", default=",".join(CONTESTANTS), help="comma-separated, run in this order (default: %(default)s)"
    )
    parser.add_argument("--budget", type=float, default=180, help="seconds of training each (default: %(default)g)")
    parser.add_argument("--seed", type=int, action="append", help="seed; may be given several times (default: 0)")
    parser.add_argument("--peers-python", type=Path, help="the Python of the environment with the peers")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="folder of the cells (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of a process (default: all cores)")
    parser.add_argument("--trellis-options", default="", help="further options of `trellis train`, in one argument")
    parser.add_argument("--table", action="store_true", help="run nothing; rewrite the table from the cells")
    values = parser.parse_args()
    values.contestants = values.contestants.split(",")
    for names, known in ((values.cases, CASES), (values.contestants, CONTESTANTS)):
        for name in names:
            if name not in known:
                parser.error(f"{name} is none of {', '.join(known)}")
    return values


def main() -> None:
    """Runs what is not there yet, one cell after the other, and writes the table."""
    values = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a contestant is ended with the program
    values.results.mkdir(parents=True, exist_ok=True)
    if not values.table:
        for case in values.cases or CASES:
            for seed in values.seed or [0]:
                for name in values.contestants:
                    _cell(values, case, name, seed)
    found = cells.read_cells(values.results)
    order = {name: place for place, name in enumerate(CASES)}
    found.sort(key=lambda cell: (order.get(cell["case"], len(order)), cell["contestant"], cell["seed"]))
    path = values.results.with_suffix(".md")
    report.write(values.results, path, found, "python benchmarks/forecasters --peers-python PATH")
    print(f"wrote {path}")


def _cell(values: argparse.Namespace, case: str, name: str, seed: int) -> None:
    """Runs one cell unless it is there, and says how it went."""
    path, contestant = cells.cell_path(values.results, case, name, seed), CONTESTANTS[name]
    if path.exists():
        return
    python = values.peers_python if contestant.is_peer else Path(sys.executable)
    if contestant.is_peer and (python is None or not versions(python)):
        print(f"{case}, {name}: skipped, there is no --peers-python to run it; install with\n  {install_line(python)}")
        return
    data = Path(os.environ.get("TRELLIS_DATA", "data"))
    with tempfile.TemporaryDirectory(prefix="forecasters-") as scratch:
        folder = Path(scratch)
        job = replace(CASES[case][0], budget_seconds=values.budget, seed=seed)
        read = CASES[case][1]
        read(folder if case == "generated_panel" else data).to_parquet(folder / "table.parquet", index=False)
        write_job(folder, job)
        started = datetime.datetime.now(datetime.UTC)
        outcome = run(contestant, _arguments(contestant, job, values), folder, python, values.threads)
        cell = _described(job, name, contestant, outcome, python, started)
        if outcome.is_finished:
            with np.load(folder / "forecast.npz") as forecast:
                cell["notes"] = json.loads(str(forecast["notes"]))
                cell["scores"] = cells.scores(job, read_series(folder, job), forecast["quantiles"])
            cells.write_cell(path, cell)
            found = f"MASE {cell['scores']['mase']:.4f}, WQL {cell['scores']['weighted_quantile_loss']:.4f}"
        else:
            (values.results / f"{path.stem}.txt").write_bytes((folder / "output.txt").read_bytes())
            found = f"FAILED ({outcome.last_words}); its output is in {values.results / path.stem}.txt"
        print(f"{case}, {name}, seed {seed}: {found}, {outcome.seconds:.0f} s, {outcome.peak_mib:.0f} MiB", flush=True)


def _arguments(contestant: Contestant, job: Job, values: argparse.Namespace) -> list[str]:
    if contestant.worker == "worker_trellis.py":
        return shlex.split(values.trellis_options)
    lengths = {"shortest": str(job.seasons[0]), "longest": str(job.seasons[-1])}
    return [lengths.get(each, each) for each in contestant.arguments]


def _described(
    job: Job, name: str, contestant: Contestant, outcome: Outcome, python: Path, started: datetime.datetime
) -> dict[str, Any]:
    """Everything about a cell but its scores."""
    return {
        "case": job.case,
        "contestant": name,
        "seed": job.seed,
        "budget_seconds": job.budget_seconds,
        "has_budget": contestant.has_budget,
        "seconds": round(outcome.seconds, 1),
        "peak_mib": round(outcome.peak_mib),
        "load_before": round(outcome.load_before, 2),
        "load_after": round(outcome.load_after, 2),
        "started": started.strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} shared {platform.machine()} cores",
        "versions": versions(python),
        "job": cells.job_data(job),
    }


def _commit() -> str:
    command = ["git", "-C", str(_HERE), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found or "unknown"


if __name__ == "__main__":
    main()
