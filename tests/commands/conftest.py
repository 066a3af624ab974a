"""The command line as a user has it: arguments in, exit code and two streams out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from trellis_ts.__main__ import main

_TINY = ("--width", "8", "--num-heads", "2", "--num-layers", "1", "--num-slots", "3", "--feedforward-width", "8")
_TINY += ("--max-epochs", "1", "--quantile-levels", "0.1", "0.5", "0.9")
_LENGTHS = ("--context-length", "24", "--patch-length", "6", "--prediction-length", "6")


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The one JSON document on standard output."""
        return json.loads(self.out)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and none of the user's data sets."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "cache").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path / "data"))
    return work


@pytest.fixture
def trellis(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs one command in this process; it has to succeed unless told otherwise."""

    def run(*arguments: object, code: int = 0) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(each) for each in arguments])
        captured = capsys.readouterr()
        assert exit_.value.code == code, captured.err
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(folder: Path, trellis: Callable[..., Result]) -> Callable[..., str]:
    """Runs a command that is to be refused: exit code 2, one line, nothing written. Gives the line."""

    def run(*arguments: object, notes: int = 0) -> str:
        before = snapshot(folder)
        result = trellis(*arguments, code=2)
        assert result.out == ""
        lines = result.err.splitlines()
        assert len(lines) == notes + 1, result.err
        assert lines[-1].startswith("trellis")
        assert ": error: " in lines[-1]
        for leak in ("Traceback", "<class", "NoneType", "jsonargparse", "Parser key", "object has no"):
            assert leak not in lines[-1]
        assert snapshot(folder) == before, "something was left behind"
        return lines[-1]

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content, and every directory."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def _wide(rows: int = 120, start: str = "2024-01-01", freq: str = "h") -> pd.DataFrame:
    """A wide table with a daily rhythm, rounded so that text and number are the same."""
    rng = np.random.default_rng(5)
    angle = 2 * np.pi * np.arange(rows) / 24
    load = 10 + 3 * np.sin(angle) + rng.normal(0, 0.2, rows)
    heat = 1050 - 40 * np.cos(angle) + rng.normal(0, 2, rows)
    return pd.DataFrame(
        {"date": pd.date_range(start, periods=rows, freq=freq), "load": load.round(3), "heat": heat.round(3)}
    )


def _long(rows: int = 90) -> pd.DataFrame:
    """Two daily series of different size in a long table."""
    parts = []
    for name, size in (("north", 1.0), ("south", 20.0)):
        values = size * (5 + np.sin(2 * np.pi * np.arange(rows) / 7))
        day = pd.date_range("2023-01-01", periods=rows).strftime("%Y-%m-%d")
        parts.append(pd.DataFrame({"shop": name, "day": day, "sold": values.round(3)}))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="session")
def make_wide() -> Callable[..., pd.DataFrame]:
    """Makes a wide table."""
    return _wide


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Options of a model that trains in a second."""
    return (*_TINY, *_LENGTHS)


@pytest.fixture
def wide(folder: Path) -> Path:
    """A clean wide table."""
    path = folder / "wide.csv"
    _wide().to_csv(path, index=False)
    return path


@pytest.fixture
def long(folder: Path) -> Path:
    """A clean long table."""
    path = folder / "long.csv"
    _long().to_csv(path, index=False)
    return path


def _train(root: Path, frame: pd.DataFrame, *options: str) -> Path:
    path, model = root / "train.csv", root / "model"
    frame.to_csv(path, index=False)
    with pytest.raises(SystemExit) as exit_:
        main(["train", str(path), "-o", str(model), "--quiet", *_TINY, *options])
    assert exit_.value.code == 0
    return model


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the wide table; read only."""
    return _train(tmp_path_factory.mktemp("wide"), _wide(), *_LENGTHS)


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the long table, whose columns were named; read only."""
    lengths = ("--context-length", "14", "--patch-length", "7", "--prediction-length", "7")
    return _train(tmp_path_factory.mktemp("long"), _long(), *lengths, "--time", "day", "--id", "shop")
