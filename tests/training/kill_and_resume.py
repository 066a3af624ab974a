"""Trains by the command line, kills the training at random moments, resumes it, and compares with an uninterrupted run.

Not a test by itself: a process of its own that loads everything once and forks, so that a kill takes no start-up.
Arguments: table, folder to work in, number of kills, seed. Prints what was there after each kill: the last finished
epoch, or -1 where nothing but the table was.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import trellis_ts.training  # noqa: F401  # loaded once, before the forks
from trellis_ts.__main__ import main

SETTINGS = ["--context-length", "12", "--prediction-length", "4", "--patch-length", "6", "--season-length", "6"]
SETTINGS += ["--width", "8", "--num-heads", "2", "--num-slots", "4", "--num-layers", "1", "--feedforward-width", "8"]
SETTINGS += ["--dropout", "0.2", "--max-epochs", "8", "--patience", "3", "--learning-rate", "0.03"]
SETTINGS += ["--device", "cpu", "--deterministic", "true", "--seed", "4"]


def start(arguments: list[str]) -> int:
    """A child that runs a command; its process id."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        try:
            main(arguments)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
    return child


def finish(arguments: list[str]) -> None:
    """Runs a command to its end, which has to be a good one."""
    _, status = os.waitpid(start(arguments), 0)
    assert status == 0, f"{arguments} ended with {status}"


def files_of(model: Path) -> dict[str, bytes]:
    """What a model consists of; which settings were named is another thing in a resumed run, where all are."""
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    config = json.loads(files["config.json"])
    del config["experiment"]["named"]
    return files | {"config.json": json.dumps(config).encode()}


def run(table: str, folder: Path, kills: int, seed: int) -> list[int]:
    """Last finished epoch after each kill."""
    rng, found = random.Random(seed), []
    train = ["train", table, "--quiet", *SETTINGS, "-o"]
    finish([*train, str(folder / "warm")])  # compiles what has to be
    begin = time.monotonic()
    finish([*train, str(folder / "whole")])
    seconds = time.monotonic() - begin
    expected = files_of(folder / "whole")
    while len(found) < kills:
        model = folder / "killed"
        shutil.rmtree(model, ignore_errors=True)
        child = start([*train, str(model)])
        time.sleep(rng.random() * seconds)
        if os.waitpid(child, os.WNOHANG)[0]:  # it was through already
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        log = model / "training" / "log.csv"
        found.append(len(log.read_text().splitlines()) - 1 if log.exists() else -1)
        is_begun = (model / "training" / "run.yaml").exists()
        finish(["train", table, "--quiet", "-o", str(model), "--resume"] if is_begun else [*train, str(model)])
        assert files_of(model) == expected, f"another model after epoch {found[-1]}"
        left = sorted(path.name for path in folder.iterdir() if path.name not in ("warm", "whole", "killed"))
        assert left == [], left
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
