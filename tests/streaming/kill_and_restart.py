"""Runs ``trellis stream --state`` again and again, kills it at random moments, and holds each state against the input.

Not a test by itself: a process of its own that loads everything once and forks, so that a kill takes no start-up.
Arguments: model directory, table, state file, number of kills, seed. Prints the steps found after each kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

import numpy as np

from trellis_ts.__main__ import main
from trellis_ts.streaming.forecaster import StreamingForecaster


def start(model: str, table: str, state: str) -> tuple[int, int]:
    """A child that streams the table; its process id, and where its output can be read."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(os.open(table, os.O_RDONLY), 0)
        os.dup2(writing, 1)
        sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
        main(["stream", model, "--state", state, "--save-every", "7", "--steps", "1", "--quiet"])
        os._exit(0)
    os.close(writing)
    return child, reading


def prefix_states(model: str, values: np.ndarray) -> list[dict[str, np.ndarray]]:
    """What the state has to be after so many lines."""
    live = StreamingForecaster(model)
    states = [{}]
    for row in values:
        live.update([list(row[1:])], row[0])
        live.forecast()
        states.append(live._live.table.export([0]))
    return states


def run(model: str, table: str, state: str, kills: int, seed: int) -> list[int]:
    """Steps in the state after each kill."""
    rng = random.Random(seed)
    with open(table) as file:
        rows = [line.strip().split(",") for line in file][1:]
    values = np.array([[row[0], *map(float, row[1:])] for row in rows], dtype=object)
    expected, found = prefix_states(model, values), []
    for _ in range(kills):
        child, reading = start(model, table, state)
        os.read(reading, 1)  # it is on its way
        wanted = rng.randrange(1, 40_000)
        while wanted > 0 and (piece := os.read(reading, min(wanted, 4096))):
            wanted -= len(piece)
        time.sleep(rng.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.close(reading)
        os.waitpid(child, 0)
        if not os.path.exists(state):  # killed before the first was written
            found.append(0)
            continue
        live = StreamingForecaster(model)
        live.restore(state)
        steps = live.counts()["steps"] if live.series else 0
        if not steps:
            found.append(0)
            continue
        for name, array in live._live.table.export([0]).items():
            one = expected[steps][name]
            if name == "clock":  # lines sent again are counted as late
                array, one = array[:, :3], one[:, :3]
            np.testing.assert_allclose(array, one, rtol=1e-5, atol=1e-6, err_msg=f"{name} after {steps} steps")
        found.append(steps)
        if steps == len(rows):
            os.unlink(state)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(*sys.argv[1:4], kills=int(sys.argv[4]), seed=int(sys.argv[5]))))
