"""A folder of Parquet files as one panel whose numbers lie in temporary files, mapped into memory.

Training reads windows here and there, so it needs all rows within reach, not in memory: the system brings in the pages
that are read and drops them when memory runs short. The files have no name, and vanish with the panel.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np

from trellis_ts.datasets.covariates import recode
from trellis_ts.datasets.partitions import ParquetFolder
from trellis_ts.datasets.readers import find_columns, panel_from_frame
from trellis_ts.datasets.spreading import spread
from trellis_ts.errors import DataError
from trellis_ts.types import Covariate, Panel, Series

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from trellis_ts.datasets.partitions import Block

_PARTS = ("time", "values", "past", "known")
_Places = tuple[tuple[int, int] | None, ...]
"""First and last row (exclusive) of each part of a series in its file; None for one it has not."""


def read_folder(address: str, *, progress: Callable[[int, int | None], None] | None = None, **options: Any) -> Panel:
    """Reads a folder of Parquet files, block by block.

    Columns that are not named are found from rows all over the files; the calendar, if not given, from the first block.

    Args:
        address: path or URL of the folder.
        progress: called with the rows read and all.
        options: as for ``trellis_ts.datasets.readers.read_table``.

    Raises:
        DataError: the folder cannot be read, or a block can be understood in more than one way.
    """
    folder = ParquetFolder(address)
    found = find_columns(folder.sample(), source=address, **options)
    options |= {"time": found.time, "target": found.channels, "id": found.id}
    keys = found.keys or (() if found.id is None else (found.id,))
    names = (found.time, *keys, *found.channels, *(each.name for each in found.covariates))
    columns = tuple(dict.fromkeys(names))
    blocks = folder.blocks(keys, columns)
    if blocks is not None:
        return _mapped(folder, blocks, options, progress)
    with TemporaryDirectory(prefix="trellis-") as directory:
        try:
            blocks = spread(folder, keys, columns, directory)
        except OSError as error:
            raise DataError(
                f"{address}: the rows of a series lie apart and are spread by series over files in {directory}, which "
                f"cannot be written ({error.strerror}); make room there, or set TMPDIR"
            ) from error
        return _mapped(folder, blocks, options, progress)


def _mapped(
    folder: ParquetFolder,
    blocks: Sequence[Block],
    options: dict[str, Any],
    progress: Callable[[int, int | None], None] | None,
) -> Panel:
    notes, done = Counter[str](), 0
    first: Panel | None = None
    series: list[tuple[str, tuple[str, ...], NDArray[np.float64] | None, _Places]] = []
    with _Store() as store:
        for block in blocks:
            table = block.read()
            panel = panel_from_frame(table, source=folder.address, **options)
            if len(blocks) == 1:
                return panel
            if first is None:
                first = panel
                options = {**options, "freq": panel.freq, "day_first": panel.day_first}
            store.code_alike(panel)
            notes.update(panel.notes)
            series += [(each.name, each.key, each.static, store.add(each)) for each in panel.series]
            done += len(table)
            if progress is not None:
                progress(done, folder.num_rows)
        if first is None:
            raise DataError(f"{folder.address}: the files hold no rows; add rows of data")
        store.map()
    told = tuple(note if times == 1 else f"{note} ({times} partitions)" for note, times in notes.items())
    return replace(
        first,
        series=tuple(store.series(name, places, static, key) for name, key, static, places in series),
        columns=replace(first.columns, covariates=store.covariates),
        notes=(*told, f"{folder.num_rows:,} rows are kept in temporary files, not in memory"),
    )


class _Store:
    """Flat files of stamps, values and covariates, one series after the other."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._files = {name: self._open.enter_context(TemporaryFile(prefix="trellis-")) for name in _PARTS}  # noqa: SIM115
        self._widths: dict[str, int] = {}
        self._arrays: dict[str, NDArray[Any]] = {}
        self._rows = dict.fromkeys(_PARTS, 0)
        self.covariates: tuple[Covariate, ...] = ()

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()  # what is mapped stays so

    def code_alike(self, panel: Panel) -> None:
        """Counts the categories of a block as in all blocks before, and new ones after those."""
        if not self.covariates:
            self.covariates = panel.columns.covariates
        merged = []
        for before, now in zip(self.covariates, panel.columns.covariates, strict=True):
            if before.categories is None or now.categories is None:
                merged.append(before)
                continue
            column = [each.name for each in panel.covariates(now.role)].index(now.name)
            categories = tuple(dict.fromkeys((*before.categories, *now.categories)))
            for each in panel.series:
                values = getattr(each, now.role)
                values[..., column] = recode(values[..., column], now.categories, categories)
            merged.append(replace(before, categories=categories))
        self.covariates = tuple(merged)

    def add(self, series: Series) -> _Places:
        """Appends a series; where each of its parts begins and ends."""
        places: list[tuple[int, int] | None] = []
        for name in _PARTS:
            values = getattr(series, name)
            if values is None:
                places.append(None)
                continue
            self._widths[name] = 1 if values.ndim == 1 else values.shape[1]
            self._files[name].write(np.ascontiguousarray(values).view(np.int64).data)
            places.append((self._rows[name], self._rows[name] + len(values)))
            self._rows[name] += len(values)
        return tuple(places)

    def map(self) -> None:
        """Maps what was written."""
        for name, rows in self._rows.items():
            if rows:
                self._files[name].flush()
                kind = "datetime64[ns]" if name == "time" else "float64"
                shape = (rows,) if name == "time" else (rows, self._widths[name])
                # Copy on write: an ordinary array to those who read it, and the file stays as it is.
                self._arrays[name] = np.asarray(np.memmap(self._files[name], kind, mode="c", shape=shape))

    def series(self, name: str, places: _Places, static: NDArray[np.float64] | None, key: tuple[str, ...]) -> Series:
        """A series whose rows are mapped."""
        time, values, past, known = (
            None if place is None else self._arrays[part][place[0] : place[1]]
            for part, place in zip(_PARTS, places, strict=True)
        )
        assert time is not None
        assert values is not None
        return Series(name, time, values, past, known, static, key)
