"""Who takes part, in which environment, and how one is run: a process of its own, given a folder and a time."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_REQUIREMENTS = _HERE / "peers-requirements.txt"
# A contestant that has no time limit of its own is ended after this many seconds.
_LONGEST_SECONDS = 3600
_VERSIONS = ("torch", "numpy", "statsforecast", "neuralforecast", "gluonts")


@dataclass(frozen=True)
class Contestant:
    """One row of the table."""

    worker: str
    arguments: tuple[str, ...] = ()
    is_peer: bool = False
    """Whether it runs in the peers' environment."""
    has_budget: bool = True
    """Whether the time of training is limited; what has no budget takes what it needs."""


CONTESTANTS = {
    "trellis": Contestant("worker_trellis.py"),
    "seasonal_naive": Contestant("worker_naive.py", ("shortest",), has_budget=False),
    "seasonal_naive_longest": Contestant("worker_naive.py", ("longest",), has_budget=False),
    "auto_ets": Contestant("worker_statistical.py", ("auto_ets",), is_peer=True, has_budget=False),
    "mstl": Contestant("worker_statistical.py", ("mstl",), is_peer=True, has_budget=False),
    "nhits_default": Contestant("worker_neuralforecast.py", ("nhits", "default"), is_peer=True),
    "nhits_tuned": Contestant("worker_neuralforecast.py", ("nhits", "tuned"), is_peer=True),
    "patchtst_default": Contestant("worker_neuralforecast.py", ("patchtst", "default"), is_peer=True),
    "patchtst_tuned": Contestant("worker_neuralforecast.py", ("patchtst", "tuned"), is_peer=True),
    "deepar_default": Contestant("worker_gluonts.py", ("default",), is_peer=True),
    "deepar_tuned": Contestant("worker_gluonts.py", ("tuned",), is_peer=True),
}


@dataclass(frozen=True)
class Outcome:
    """How a process went."""

    is_finished: bool
    seconds: float
    peak_mib: float
    load_before: float
    load_after: float
    last_words: str


def install_line(python: Path | None) -> str:
    """What to type to have the peers."""
    folder = "peers" if python is None else str(python.parent.parent)
    return f"python3 -m venv {folder} && {folder}/bin/pip install -r {_REQUIREMENTS}"


def versions(python: Path) -> dict[str, str]:
    """Versions of the packages that matter in an environment; empty where it cannot be asked."""
    if python == Path(sys.executable):
        found = {name: _version(name) for name in _VERSIONS}
    else:
        code = (
            "import importlib.metadata as m, json\nfound = {}\n"
            f"for name in {_VERSIONS!r}:\n"
            "    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\n"
            "print(json.dumps(found))"
        )
        try:
            done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return {}
        found = json.loads(done.stdout)
    return {"python": platform.python_version(), **{name: each for name, each in found.items() if each}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def run(contestant: Contestant, arguments: list[str], folder: Path, python: Path, threads: int) -> Outcome:
    """Runs a worker in the folder; its output goes to ``output.txt`` there."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NIXTLA_ID_AS_COL": "1"}
    before, start = os.getloadavg()[0], time.monotonic()
    with (folder / "output.txt").open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [str(python), str(_HERE / contestant.worker), str(folder), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        code, usage = _wait(process, start + _LONGEST_SECONDS)
    words = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return Outcome(
        is_finished=code == 0 and (folder / "forecast.npz").exists(),
        seconds=time.monotonic() - start,
        peak_mib=usage.ru_maxrss / 1024,
        load_before=before,
        load_after=os.getloadavg()[0],
        last_words=words[-1] if words else "",
    )


def _wait(process: subprocess.Popen[Any], deadline: float) -> tuple[int, Any]:
    """Exit status and resources of a process and those it waited for; ends the process after the deadline."""
    try:
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                process.returncode = os.waitstatus_to_exitcode(status)
                return process.returncode, usage
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.2)
    except BaseException:  # interrupted: what was started must not go on alone
        os.killpg(process.pid, signal.SIGKILL)
        raise
