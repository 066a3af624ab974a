"""Runs one cell in a process of its own and writes its result: ``python -m trellis_ts.benchmark.cell``.

The process reads the cell as one line of JSON, trains, scores and writes the file; it ends with whoever started it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from trellis_ts.benchmark.machine import describe_machine, describe_versions, find_commit, peak_memory_bytes
from trellis_ts.benchmark.plan import Cell
from trellis_ts.benchmark.scoring import HorizonScore, score_prefixes
from trellis_ts.datasets.sources import load_data
from trellis_ts.devices import resolve_device
from trellis_ts.errors import DataError, TrellisError
from trellis_ts.files import atomic_file
from trellis_ts.forecaster import Forecaster
from trellis_ts.preparation import prepare
from trellis_ts.training import fit

FORMAT = "trellis_ts.benchmark"


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains on the training rows, chooses the epoch on the validation rows, and only then reads the test rows.

    Raises:
        TrellisError: the data cannot be had or are too short, a setting is out of range, or training diverged.
    """
    config = cell.config()
    machine, commit = describe_machine(), find_commit()  # before anything of either can change
    panel = load_data(cell.dataset)
    preparation = prepare(panel, config)
    if not preparation.splits.borders[0].test[1] > preparation.splits.borders[0].test[0]:
        raise DataError(f"{panel.source} leaves no test rows")
    processor = time.process_time()
    with TemporaryDirectory(prefix="trellis-") as folder:
        checkpoint, summary = fit(preparation, Path(folder))
    processor = time.process_time() - processor
    forecaster = Forecaster(checkpoint, device=resolve_device(config.training.device))
    start = time.monotonic()
    scores = score_prefixes(forecaster, preparation.splits, cell.horizons)
    return describe_result(
        cell,
        scores,
        validation_loss=summary.validation_loss,
        best_epoch=summary.best_epoch,
        num_epochs=summary.num_epochs,
        train_windows=summary.train_windows,
        validation_windows=summary.validation_windows,
        num_parameters=summary.num_parameters,
        train_seconds=round(summary.seconds, 2),
        train_processor_seconds=round(processor, 2),
        test_seconds=round(time.monotonic() - start, 2),
        peak_memory_bytes=peak_memory_bytes(),
        machine=machine,
        versions=describe_versions(),
        commit=commit,
    )


def describe_result(cell: Cell, scores: dict[int, HorizonScore], **facts: Any) -> dict[str, Any]:
    """What a result's file holds: which cell it is, its errors, and facts about the run."""
    return {
        "format": FORMAT,
        "dataset": cell.dataset_name,
        "contestant": cell.contestant,
        "variant": cell.variant,
        "look_back": cell.look_back,
        "horizon": cell.horizon,
        "seed": cell.seed,
        "scores": {str(horizon): asdict(score) for horizon, score in scores.items()},
        **facts,
        "settings": cell.settings,
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """One JSON file, whole or not at all."""
    if not all(math.isfinite(score["mse"]) for score in result["scores"].values()):
        raise TrellisError("the forecasts are not numbers; lower learning_rate")
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def main() -> None:
    """The process: a line on standard input, a file, and a line on standard error if it went wrong."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(request["threads"])
    cell = request["cell"]
    try:
        cell = Cell(**(cell | {"horizons": tuple(cell["horizons"])}))
        write_result(Path(request["path"]), run_cell(cell))
    except TrellisError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


def _end_with_parent() -> None:
    sys.stdin.read()  # returns once the other end of the pipe is closed, however its process ended
    os._exit(1)


if __name__ == "__main__":
    main()
