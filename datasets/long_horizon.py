"""The long-horizon benchmarks as a table: where each comes from, how it is checked, split and read.

Rows are taken as published and in their order, never put on a regular calendar: published results count rows.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pyarrow import csv as arrow_csv  # type: ignore[import-untyped]

from trellis_ts.datasets.locations import locate
from trellis_ts.datasets.readers import read_rows
from trellis_ts.errors import DataError
from trellis_ts.types import Borders, Columns, Panel, Series

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from trellis_ts.datasets.download import Progress

HORIZONS = (96, 192, 336, 720)

_ETT_SOURCE = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small"
_LIBRARY_SOURCE = "https://huggingface.co/datasets/thuml/Time-Series-Library/resolve/main"
_MIRROR_SOURCE = "https://huggingface.co/datasets/pkr7098/time-series-forecasting-datasets/resolve/main"
_LIBRARY_HOMEPAGE = "https://huggingface.co/datasets/thuml/Time-Series-Library"
_SOLAR_HOMEPAGE = "https://github.com/laiguokun/multivariate-time-series-data"


@dataclass(frozen=True)
class BenchmarkSpec:
    """One benchmark, as the published comparisons use it."""

    name: str
    file_names: tuple[str, ...]
    """As released, found as ``.gz`` too; the first is what a download is called."""
    urls: tuple[str, ...]
    """Tried in order."""
    sha256s: tuple[str, ...]
    """Of the uncompressed file, which is about with LF and with CRLF line ends; empty where none is known."""
    homepage: str
    licence: str
    freq: str
    """Pandas offset alias of the nominal step."""
    num_channels: int
    num_rows: int
    season_length: int
    """Steps of the cycle that dominates; 1 where there is none."""
    horizons: tuple[int, ...] = HORIZONS
    split_rows: tuple[int, int, int] | None = None
    """Rows of training, validation and test, later ones being unused; None for 70 %, the rest and 20 %."""
    first_stamp: str | None = None
    """For a file of bare numbers, without header and dates: the time of its first row."""
    notes: tuple[str, ...] = ()
    """What a user should know about the content."""


def _ett(name: str, freq: str, steps_per_hour: int, sha256s: tuple[str, str]) -> BenchmarkSpec:
    month = 30 * 24 * steps_per_hour
    return BenchmarkSpec(
        name=name,
        file_names=(f"{name}.csv",),
        urls=(f"{_ETT_SOURCE}/{name}.csv", f"{_LIBRARY_SOURCE}/ETT-small/{name}.csv"),
        sha256s=sha256s,
        homepage="https://github.com/zhouhaoyi/ETDataset",
        licence="CC BY-ND 4.0: share it unmodified and with attribution",
        freq=freq,
        num_channels=7,
        num_rows=17420 * steps_per_hour,
        season_length=24 * steps_per_hour,
        split_rows=(12 * month, 4 * month, 4 * month),
    )


# Each line of checksums: with LF, then with CRLF line ends.
_SPECS = (
    _ett(
        "ETTh1",
        "h",
        1,
        (
            "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
            "aaf53becad03ad8a7e93cf96452244f423480df960d769e12d66d4a5c570ddb0",
        ),
    ),
    _ett(
        "ETTh2",
        "h",
        1,
        (
            "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
            "ae5c99b925fb8b4e77d1bd6a897b311d1167766076f3d00e14a8654de38e7468",
        ),
    ),
    _ett(
        "ETTm1",
        "15min",
        4,
        (
            "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
            "f8a9f83e816439447a4b0c523039ac618bd9b97b9e97d48d0c3f71feb1899ddc",
        ),
    ),
    _ett(
        "ETTm2",
        "15min",
        4,
        (
            "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",
            "fa470b4ffeac8f96f325abf027fe1c3cad1149560eabffc6d254abb72de21a62",
        ),
    ),
    BenchmarkSpec(
        name="Weather",
        file_names=("weather.csv",),
        urls=(f"{_LIBRARY_SOURCE}/weather/weather.csv", f"{_MIRROR_SOURCE}/weather.csv"),
        sha256s=(
            "9b2b19b13e342d9c9b9c51620d42b4be232df7fba30e7f5c4968b7c79ab138ad",
            "34ee981d07313e51da2a50bb600072c8ae4a69cb4b0651f4cb93a069d7a2ba63",
        ),
        homepage=_LIBRARY_HOMEPAGE,
        licence="none stated for the data (Max Planck Institute for Biogeochemistry, Jena)",
        freq="10min",
        num_channels=21,
        num_rows=52696,
        season_length=144,
        notes=(
            "81 readings of -9999 (in OT, 'max. PAR' and 'wv') stand for missing ones; they are kept, as in published "
            "results",
            "one stamp occurs twice and nine are missing; the rows are used one after the other, as in published "
            "results",
        ),
    ),
    BenchmarkSpec(
        name="Exchange",
        file_names=("exchange_rate.csv",),
        urls=(f"{_LIBRARY_SOURCE}/exchange_rate/exchange_rate.csv", f"{_MIRROR_SOURCE}/exchange_rate.csv"),
        sha256s=(
            "d55e7aa2641009814a18ba3279431b13f6d413b0eab195b9ff21988d8cf94e97",
            "48b4d9d3d508f5104162e85b9a6042e3557fde11aa9f2944eba8c0d0efc89842",
        ),
        homepage=_LIBRARY_HOMEPAGE,
        licence="none stated",
        freq="D",
        num_channels=8,
        num_rows=7588,
        season_length=1,
        notes=("the dates are nominal: they count days from 1990-01-01, so weekdays and months mean nothing",),
    ),
    BenchmarkSpec(
        name="ILI",
        file_names=("national_illness.csv", "illness.csv"),
        urls=(f"{_LIBRARY_SOURCE}/illness/national_illness.csv", f"{_MIRROR_SOURCE}/illness.csv"),
        sha256s=(
            "8594cecb98c6f2f9dc014eca11c4d5d1e38ad5ce6ed0592d4abe65b146fce395",
            "93601f64d2566dc796ca4305adad8b8560c2db1a1ff04543c3bd813a7263570a",
        ),
        homepage=_LIBRARY_HOMEPAGE,
        licence="none stated (US federal data: CDC ILINet)",
        freq="W-TUE",
        num_channels=7,
        num_rows=966,
        season_length=52,
        horizons=(24, 36, 48, 60),
        notes=("the dates are nominal: the row of January 2002 was measured in October 2002, and so on",),
    ),
    # The week, not the day, is the cycle of these two that published seasonal models use.
    BenchmarkSpec(
        name="Electricity",
        file_names=("electricity.csv",),
        urls=(f"{_LIBRARY_SOURCE}/electricity/electricity.csv", f"{_MIRROR_SOURCE}/electricity.csv"),
        sha256s=("7e45845d54c5219bad0ae6bc1b5316cf8ff9cead5d33fa998a5a51c2e4a497ad",),
        homepage=_LIBRARY_HOMEPAGE,
        licence="none stated for this layout (source: UCI ElectricityLoadDiagrams20112014)",
        freq="h",
        num_channels=321,
        num_rows=26304,
        season_length=168,
        notes=(
            "the dates are wrong: they say 2016 to 2019, the consumption is that of 2012 to 2014, so weekdays and "
            "holidays do not fit",
        ),
    ),
    BenchmarkSpec(
        name="Traffic",
        file_names=("traffic.csv",),
        urls=(f"{_LIBRARY_SOURCE}/traffic/traffic.csv", f"{_MIRROR_SOURCE}/traffic.csv"),
        sha256s=("cb06463d56fa17d87f47027cd9389ceae82a69eddee51cdb61480e120dab0b16",),
        homepage=_LIBRARY_HOMEPAGE,
        licence="none stated (California Department of Transportation, PeMS)",
        freq="h",
        num_channels=862,
        num_rows=17544,
        season_length=168,
        notes=("the dates begin in July 2016, while the source is described as January 2015 to December 2016",),
    ),
    # Published results read the original text file, which has neither header nor dates; CSVs of it with a date column
    # are everybody's own conversions and have no common checksum. The year and the step are the source's statement.
    BenchmarkSpec(
        name="Solar",
        file_names=("solar_AL.txt",),
        urls=(
            "https://raw.githubusercontent.com/laiguokun/multivariate-time-series-data/master/solar-energy/"
            "solar_AL.txt.gz",
        ),
        sha256s=("230327ef72d2abb387939d4a35d6fd34f1066071bc7c40ce7ecf5531a0122ac2",),
        homepage=_SOLAR_HOMEPAGE,
        licence="none stated (US National Renewable Energy Laboratory)",
        freq="10min",
        num_channels=137,
        num_rows=52560,
        season_length=144,
        first_stamp="2006-01-01",
        notes=("the file has no dates: every 10 minutes of 2006 is what its source states",),
    ),
)


def benchmark_names() -> tuple[str, ...]:
    """The names, in the order in which tables of results list them."""
    return tuple(spec.name for spec in _SPECS)


def find_benchmark(name: str) -> BenchmarkSpec | None:
    """The benchmark of this name, in any case; None if there is none."""
    return next((spec for spec in _SPECS if spec.name.lower() == name.lower()), None)


def suggest(name: str) -> str | None:
    """The benchmark whose name, or file's name, looks most like this; None if none does."""
    known = {file.partition(".")[0].lower(): spec.name for spec in _SPECS for file in spec.file_names}
    known |= {spec.name.lower(): spec.name for spec in _SPECS}
    matches = difflib.get_close_matches(name.lower(), known, n=1)
    return known[matches[0]] if matches else None


def borders(spec: BenchmarkSpec, num_rows: int) -> Borders:
    """The rows of each split in the published comparisons.

    Raises:
        DataError: ``num_rows`` are too few for them.
    """
    if spec.split_rows is not None:
        train, validation, test = spec.split_rows
    else:
        # Truncated in floating point, as in the code behind the published numbers.
        train, test = int(num_rows * 0.7), int(num_rows * 0.2)
        validation = num_rows - train - test
    stop = train + validation + test
    if stop > num_rows or min(train, validation, test) < 1:
        least = stop if spec.split_rows is not None else 5
        raise DataError(f"{spec.name} has {num_rows} rows, too few for its splits; give at least {least}")
    return Borders((0, train), (train, train + validation), (train + validation, stop))


def load_benchmark(name: str, *, allow_download: bool = True, progress: Progress | None = None) -> Panel:
    """A benchmark by name, in any case: one series, every row as published.

    Args:
        name: One of ``benchmark_names()``.
        allow_download: Whether a file that is neither in ``TRELLIS_DATA`` nor in the cache may be fetched.
        progress: Told about a download.

    Raises:
        DataError: there is no such benchmark, or its file cannot be had or is not the published one.
    """
    spec = find_benchmark(name)
    if spec is None:
        nearest = suggest(name)
        question = f"did you mean {nearest}? " if nearest else ""
        raise DataError(f"there is no benchmark {name!r}; {question}There are {', '.join(benchmark_names())}")
    return read_benchmark(spec, allow_download=allow_download, progress=progress)


def read_benchmark(spec: BenchmarkSpec, *, allow_download: bool = True, progress: Progress | None = None) -> Panel:
    """The benchmark that a spec describes; see ``load_benchmark``."""
    path = locate(
        spec.file_names,
        urls=spec.urls,
        sha256s=spec.sha256s,
        homepage=spec.homepage,
        allow_download=allow_download,
        progress=progress,
    )
    if spec.first_stamp is None:
        times, values, channels = read_rows(path)
    else:
        times, values, channels = _read_bare(path, spec.first_stamp, spec.freq)
    if values.shape != (spec.num_rows, spec.num_channels):
        raise DataError(
            f"{path} has {values.shape[0]} rows and {values.shape[1]} channels, where {spec.name} has {spec.num_rows} "
            f"and {spec.num_channels}; remove it and get {spec.file_names[0]} from {spec.homepage}"
        )
    unverified = () if spec.sha256s else (f"no checksum of {spec.file_names[0]} is known: the file was not verified",)
    return Panel(
        series=(Series(name="", time=times, values=values),),
        columns=Columns(time="date", id=None, channels=channels),
        freq=spec.freq,
        notes=spec.notes + unverified,
        source=str(path),
        dataset=spec.name,
    )


def _read_bare(
    path: Path, first_stamp: str, freq: str
) -> tuple[NDArray[np.datetime64], NDArray[np.float64], tuple[str, ...]]:
    """A file of comma-separated numbers only: its stamps are counted from the first one."""
    try:
        # Unlike the fast pandas parser, this one rounds every number correctly.
        table = arrow_csv.read_csv(path, read_options=arrow_csv.ReadOptions(autogenerate_column_names=True))
        columns = [column.cast("float64").to_numpy() for column in table.columns]
    except (ValueError, OSError) as error:  # what pyarrow raises for bad cells and rows is a ValueError
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a table of comma-separated numbers without header ({reason})") from error
    values = np.column_stack(columns).astype(np.float64)
    times = pd.date_range(first_stamp, periods=len(values), freq=freq).to_numpy().astype("datetime64[ns]")
    return times, values, tuple(str(index) for index in range(values.shape[1]))
