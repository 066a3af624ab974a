"""Runs cells side by side, each in a process of its own; those that have a result are left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trellis_ts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from trellis_ts.benchmark.plan import Cell

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Outcome:
    """How one cell ended: with a result, or with the reason why not."""

    cell: Cell
    result: dict[str, Any] | None
    problem: str = ""


def result_path(folder: Path, cell: Cell) -> Path:
    """Where a cell's result lies."""
    return folder / f"{cell.key}.json"


def read_result(path: Path) -> dict[str, Any]:
    """One result.

    Raises:
        ConfigError: the file is none.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == "trellis_ts.benchmark":
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path} is not the result of a benchmark; move it elsewhere, or delete it to have it run again")


def split_finished(cells: Sequence[Cell], folder: Path) -> tuple[list[Cell], list[Cell]]:
    """Cells to be run, and those that have been.

    Raises:
        ConfigError: a result was made with other settings than it would be made with now.
    """
    open_, finished = [], []
    for cell in cells:
        path = result_path(folder, cell)
        if not path.is_file():
            open_.append(cell)
            continue
        stored = read_result(path)["settings"]
        now = json.loads(json.dumps(cell.settings))
        different = sorted(key for key in {*stored, *now} if stored.get(key) != now.get(key))
        if different:
            raise ConfigError(
                f"{path} was made with another {different[0]}; give the change a name of its own with --variant, or "
                "delete the file to have it run again"
            )
        finished.append(cell)
    return open_, finished


def threads_per_job(jobs: int) -> int:
    """``OMP_NUM_THREADS`` where it is set, else an equal share of the cores this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // jobs)


def run_cells(cells: Sequence[Cell], folder: Path, *, jobs: int, ended: Callable[[Outcome], None]) -> None:
    """Runs the cells, ``jobs`` at a time, and tells of each as it ends. A cell that fails stops no other."""
    folder.mkdir(parents=True, exist_ok=True)
    threads = threads_per_job(jobs)
    waiting = deque(cells)
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Job(waiting.popleft(), folder, threads))
            still = []
            for job in running:
                outcome = job.outcome()
                if outcome is None:
                    still.append(job)
                else:
                    ended(outcome)
            running = still
            if running:
                time.sleep(_POLL_SECONDS)
    finally:
        for job in running:
            job.stop()


class _Job:
    """A process that runs one cell."""

    def __init__(self, cell: Cell, folder: Path, threads: int) -> None:
        self.cell, self._path = cell, result_path(folder, cell)
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        # -P keeps the current folder off the path: a checkout's own folders are called like other packages.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trellis_ts.benchmark.cell"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        request = {"cell": asdict(cell), "threads": threads, "path": str(self._path.absolute())}
        if self._process.stdin is None:
            raise AssertionError("the process was given a pipe")
        # The pipe stays open: its end is how the process knows that this one is gone.
        with suppress(BrokenPipeError):  # it is gone already, and its exit code will say so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def outcome(self) -> Outcome | None:
        """How it ended; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        self._close()
        if code == 0 and self._path.is_file():
            return Outcome(self.cell, read_result(self._path))
        reason = lines[-1] if lines else ("it was killed" if code < 0 else f"it ended with code {code}")
        return Outcome(self.cell, None, reason)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        self._errors.close()
        with suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
