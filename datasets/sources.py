"""One door to all data: a file, a benchmark's name, or the series shipped with a dependency."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from trellis_ts.datasets.long_horizon import benchmark_names, find_benchmark, load_benchmark
from trellis_ts.datasets.mapped import read_folder
from trellis_ts.datasets.partitions import SUFFIXES as PARQUET
from trellis_ts.datasets.readers import panel_from_frame, read_table
from trellis_ts.datasets.stores import is_url
from trellis_ts.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trellis_ts.types import Panel

DEMO_NAME = "co2"
"""Weekly atmospheric CO2 at Mauna Loa, 1958-2001, with its real gaps; it comes with statsmodels."""


def load_data(
    data: str,
    *,
    time: str | None = None,
    target: Sequence[str] | None = None,
    id: str | None = None,
    freq: str | None = None,
    day_first: bool | None = None,
    past_covariates: Sequence[str] = (),
    known_covariates: Sequence[str] = (),
    static: Sequence[str] = (),
    categorical: Sequence[str] = (),
    regularize: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Panel:
    """Reads a table or a folder of Parquet files from a path or URL, or a data set by its name.

    The column options apply to tables only, and covariates are refused elsewhere.
    ``progress(bytes_done, bytes_total)`` is called while downloading.

    Raises:
        DataError: there is no such file or name, or it cannot be read.
    """
    # A folder may be called like a data set.
    if (
        not is_url(data)
        and not Path(data).is_file()
        and (is_known(data) or (_is_name(data) and not Path(data).exists()))
    ):
        if past_covariates or known_covariates or static:
            raise DataError(f"data set '{data}' has no covariates; give the path of a table to name some")
        return load_known(data, progress=progress)
    read = read_folder if is_partitioned(data) else read_table
    return read(
        data,
        time=time,
        target=target,
        id=id,
        freq=freq,
        day_first=day_first,
        past_covariates=past_covariates,
        known_covariates=known_covariates,
        static=static,
        categorical=categorical,
        regularize=regularize,
    )


def is_partitioned(data: str) -> bool:
    """Whether this is a folder of Parquet files, here or in a store, rather than a table or the name of a data set."""
    if is_url(data):
        return True
    folder = Path(data)
    return folder.is_dir() and not is_known(data) and any(next(folder.rglob(f"*{each}"), None) for each in PARQUET)


def is_known(name: str) -> bool:
    """Whether there is a data set of this name."""
    return name.lower() == DEMO_NAME or find_benchmark(name) is not None


def load_known(name: str, *, progress: Callable[[int, int | None], None] | None = None) -> Panel:
    """Reads a data set by its name, whatever files there are.

    Raises:
        DataError: there is no such name, or it cannot be fetched.
    """
    if name.lower() == DEMO_NAME:
        return load_demo()
    if find_benchmark(name) is None:
        raise DataError(_unknown_name(name))
    return load_benchmark(name, progress=progress)


def load_demo() -> Panel:
    """The weekly CO2 series, read without a network."""
    from statsmodels.datasets import co2  # type: ignore[import-untyped]

    frame = co2.load_pandas().data
    frame.index.name = "date"
    return panel_from_frame(frame.reset_index(), source=DEMO_NAME)


def _is_name(data: str) -> bool:
    return Path(data).suffix == "" and len(Path(data).parts) == 1


def _unknown_name(data: str) -> str:
    names = [DEMO_NAME, *benchmark_names()]
    close = difflib.get_close_matches(data.lower(), [name.lower() for name in names], n=1, cutoff=0.5)
    nearest = next((f"; did you mean {name}?" for name in names if [name.lower()] == close), "")
    return f"'{data}' is neither a file nor a data set{nearest} (data sets: {', '.join(names)})"
