"""The first things a user types: help, version, a wrong command."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest

from trellis_ts.__main__ import COMMANDS
from trellis_ts.config import SECTIONS

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "pandas", "numpy", "lightning", "pyarrow", "matplotlib")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_command(trellis, option):
    result = trellis(option)
    assert all(f"\n  {command} " in result.out for command in COMMANDS)
    assert "trellis train sales.csv" in result.out
    assert result.err == ""


def test_version(trellis):
    assert trellis("--version").out == f"trellis {version('trellis-ts')}\n"


def test_without_a_command_the_help_is_shown_and_the_exit_code_tells(trellis):
    assert "commands:" in trellis(code=2).out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["Forecast", "x"], "unknown command 'Forecast'; did you mean forecast?"),
        (["zzz"], "unknown command 'zzz'; see trellis --help"),
        (["--verson"], "unknown option '--verson'; did you mean --version?"),
        (["--json", "train"], "options come after the command"),
    ],
)
def test_what_is_no_command(refused, arguments, expected):
    assert expected in refused(*arguments)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ["DATA", "--output", "--resume", "--overwrite", "--config", "--print-config", "--device"]),
        ("search", ["DATA", "--output", "--trials", "--max-time", "--preset", "--overwrite"]),
        ("forecast", ["MODEL", "DATA", "--output", "--plot", "--prediction-length", "--time", "--id", "--device"]),
        ("evaluate", ["MODEL", "DATA", "--baselines", "--step", "--by", "--output", "--target", "--freq", "--device"]),
        ("benchmark", ["--dataset", "--mixer", "--track", "--seeds", "--jobs", "--tables", "--variant", "--results"]),
        ("info", ["MODEL"]),
        ("datasets", ["list", "get", "NAME", "TRELLIS_DATA"]),
        ("demo", ["--output"]),
    ],
)
def test_help_of_a_command_names_its_options(trellis, command, options):
    text = trellis(command, "--help").out
    assert text.startswith(f"usage: trellis {command} ")
    for option in (*options, "--json", "--quiet", "--help"):
        assert option in text
    for leak in ("None", "null", "True", "False", "==SUPPRESS==", "jsonargparse", "Namespace"):
        assert leak not in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_of_training_explains_every_setting(trellis):
    text = trellis("train", "--help").out
    for section in SECTIONS.values():
        for each in fields(section):
            name = f"--{each.name.replace('_', '-')}"
            after = text.split(f"  {name} ", 1)[1].split("\n  --", 1)[0]
            assert len(after.split()) > 3, name
            assert "default:" in after, name


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT.parent)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["forecast", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = f"""
import atexit, sys
atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr))
from trellis_ts.__main__ import main
main({arguments})
"""
    result = _python("-c", code)
    assert (result.returncode, result.stderr) == (0, "[]\n")


def test_help_takes_less_than_a_quarter_of_importing_torch():
    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        assert _python(*arguments).returncode == 0
        return time.perf_counter() - start

    # The best of three, because other programs share the machine.
    assert min(seconds("-m", "trellis_ts", "--help") for _ in range(3)) < 0.25 * seconds("-c", "import torch")


@pytest.mark.parametrize("start", [["-m", "trellis_ts"], [str(ROOT / "cli.py")]], ids=["module", "launcher"])
def test_other_ways_to_start(start):
    result = _python(*start, "--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"trellis {version('trellis-ts')}\n", "")
    assert _python(*start, "trian").returncode == 2
