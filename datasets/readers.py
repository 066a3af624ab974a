"""Tables to panels: CSV files, Parquet files and frames, however their writers left them.

What can be understood in one way only is accepted, and what was changed is said in the panel's notes; anything else is
refused with the row and the column.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import narwhals as nw
import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.csv as pa_csv  # type: ignore[import-untyped]
import pyarrow.parquet as pa_parquet  # type: ignore[import-untyped]

from trellis_ts.datasets.columns import Table, decode_names, has_decimal_commas, nearest, quote, read_numbers, shorten
from trellis_ts.datasets.covariates import CovariateNames, add_covariates, with_future
from trellis_ts.datasets.dates import UnreadableDateError, looks_like_dates, parse_dates
from trellis_ts.datasets.regular import build_panel
from trellis_ts.datasets.roles import find_roles, stamp_roles
from trellis_ts.errors import DataError
from trellis_ts.types import Columns

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from trellis_ts.datasets.roles import Roles
    from trellis_ts.types import Panel

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_TEXT_SUFFIXES, _PARQUET_SUFFIXES = (".csv", ".tsv", ".txt"), (".parquet", ".pq")
_GZIP_MAGIC, _ZIP_MAGIC = b"\x1f\x8b", b"PK\x03\x04"
# A few bytes of gzip or Parquet can stand for any amount of memory, so there is an end to both.
_LARGEST_TEXT_BYTES = 4 << 30
_PIECE_BYTES = 1 << 20
_MOST_PARQUET_CELLS = 1 << 30


def read_table(
    path: str | Path,
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
) -> Panel:
    """Read a CSV file (``.csv``, ``.tsv``, ``.txt``, also with ``.gz``) or a Parquet file.

    Args:
        path: The file.
        time: Column of times; found by name and contents if not given.
        target: Columns to forecast; if not given all that hold numbers, or the one called y, target or value where
            there is a column of ids.
        id: Column that names the series of a long table; found likewise. Several as ``store,item``.
        freq: A pandas offset alias; inferred from the times if not given.
        day_first: Whether 03/04/2024 is in April; inferred if not given.
        past_covariates: Columns known up to the last row.
        known_covariates: Columns known beyond it. A series then ends at its last value, and rows after it are the
            future of these.
        static: Columns with one value per series.
        categorical: Covariates of numbers that are categories; text and truth values always are.
        regularize: Bring stamps onto a calendar, averaging the rows of each step, instead of refusing them.

    Raises:
        DataError: the table cannot be read, or can be understood in more than one way.
    """
    covariates = _covariate_names(past_covariates, known_covariates, static, categorical)
    return _panel(_file_table(Path(path)), time, target, id, freq, day_first, covariates, regularize)


def panel_from_frame(
    frame: Any,
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
    source: str = "<frame>",
) -> Panel:
    """The same for a frame, which stays as it is; the index of a pandas frame may hold the times or the ids.

    Args:
        frame: The table, of pandas, polars, pyarrow or another library that narwhals knows.
        time: As in ``read_table``, as are the other options.
        target: Columns to forecast.
        id: Column that names the series.
        freq: A pandas offset alias.
        day_first: Order of dates that are text.
        past_covariates: Columns known up to the last row.
        known_covariates: Columns known beyond it.
        static: Columns with one value per series.
        categorical: Covariates of numbers that are categories.
        regularize: Bring stamps onto a calendar.
        source: What messages call the table.

    Raises:
        DataError: the table cannot be read, or can be understood in more than one way.
    """
    covariates = _covariate_names(past_covariates, known_covariates, static, categorical)
    return _panel(_frame_table(frame, source), time, target, id, freq, day_first, covariates, regularize)


def find_columns(
    frame: Any,
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
    source: str = "<frame>",
) -> Columns:
    """Which column is what, found from some rows of a table as ``panel_from_frame`` would find it from all.

    Raises:
        DataError: as for ``panel_from_frame``, but for what concerns the calendar.
    """
    covariates = _covariate_names(past_covariates, known_covariates, static, categorical)
    _table, roles = _roles(_frame_table(frame, source), time, target, id, day_first, covariates)
    return Columns(roles.time, roles.id, roles.channels, roles.keys, roles.covariates)


def add_future(
    panel: Panel, future: str | Path | Any, steps: int, *, day_first: bool | None = None, source: str = "<future>"
) -> Panel:
    """The panel with the known covariates after its last rows, from a second table.

    Args:
        panel: The history, whose columns of times, ids and known covariates the table has to have.
        future: Path of the table, or a frame.
        steps: How many steps after each series' last row are needed; further rows are passed over.
        day_first: Order of dates that are text; either where it is not given and the dates fit both.
        source: What messages call a frame.

    Raises:
        DataError: the table cannot be read, or lacks a column, a series or a stamp.
    """
    known = panel.covariates("known")
    if not known:
        raise DataError(
            f"{panel.source}: no covariates are known in the future, so there is nothing to read from a table of it; "
            "leave it out, or train with --known-covariates"
        )
    is_path = isinstance(future, (str, Path))
    table = _file_table(Path(future)) if is_path else _frame_table(future, source)
    _check_header(table)
    table = _drop_blank_rows(table)
    _check_rows(table)
    keys = panel.columns.keys or (() if panel.columns.id is None else (panel.columns.id,))
    names = CovariateNames(
        known=tuple(each.name for each in known),
        categorical=tuple(each.name for each in known if each.categories is not None),
    ).resolve(table)
    roles = add_covariates(table, stamp_roles(table, panel.columns.time, keys, day_first), names)
    try:
        return with_future(panel, table, roles, steps)
    except DataError:
        if roles.dates.swapped is None:
            raise
        swapped = roles._replace(dates=replace(roles.dates, stamps=roles.dates.swapped, swapped=None))
        return with_future(panel, table, swapped, steps)


def _covariate_names(
    past: Sequence[str], known: Sequence[str], static: Sequence[str], categorical: Sequence[str]
) -> CovariateNames:
    roles = [(names,) if isinstance(names, str) else tuple(names) for names in (past, known, static, categorical)]
    return CovariateNames(*roles)


def read_rows(path: str | Path) -> tuple[NDArray[np.datetime64], NDArray[np.float64], tuple[str, ...]]:
    """Stamps, values and channel names of a wide CSV file whose first column is ``date``, row for row as it stands.

    Nothing is sorted, dropped or filled in: benchmarks count rows.

    Raises:
        DataError: the file is not of that form.
    """
    file = Path(path)
    _check_file(file)
    table = _read_text(file)
    if table.names[0] != "date" or len(table.names) < 2:
        raise DataError(f"{file}: a benchmark's first column is 'date'; found columns {quote(table.names)}")
    _check_rows(table)
    try:
        stamps = parse_dates(table.columns[0], day_first=None).stamps
    except UnreadableDateError as error:
        raise DataError(f"{table.cell(error.index, 'date')} {error}") from error
    values = [read_numbers(table, name, required=True) for name in table.names[1:]]
    return stamps, np.column_stack([column for column in values if column is not None]), table.names[1:]


def _panel(
    table: Table,
    time: str | None,
    target: Sequence[str] | None,
    id: str | None,
    freq: str | None,
    day_first: bool | None,
    covariates: CovariateNames,
    regularize: bool,
) -> Panel:
    table, roles = _roles(table, time, target, id, day_first, covariates)
    return build_panel(table, roles, freq, regularize=regularize)


def _roles(
    table: Table,
    time: str | None,
    target: Sequence[str] | None,
    id: str | None,
    day_first: bool | None,
    covariates: CovariateNames,
) -> tuple[Table, Roles]:
    _check_header(table)
    table = _drop_blank_rows(table)
    _check_rows(table)
    covariates = covariates.resolve(table)
    roles = find_roles(table, time, target, id, day_first, covariates.all)
    return table, add_covariates(table, roles, covariates)


def _check_rows(table: Table) -> None:
    if not len(table):
        raise DataError(f"{table.source}: there is a header but no rows; add rows of data")


def _check_file(file: Path) -> None:
    if file.is_dir():
        inside = sorted(child.name for child in file.iterdir() if child.suffix in (*_TEXT_SUFFIXES, *_PARQUET_SUFFIXES))
        hint = f", like {file / inside[0]}" if inside else ""
        raise DataError(f"{file}: this is a folder; give one CSV or Parquet file{hint}")
    if not file.exists():
        folder = file.parent
        near = nearest(file.name, sorted(child.name for child in folder.iterdir())) if folder.is_dir() else None
        hint = f"did you mean {folder / near}?" if near else "check the path"
        raise DataError(f"{file}: there is no such file; {hint} (a benchmark goes by its bare name, like ETTh1)")
    name = file.name.lower().removesuffix(".gz")
    if not name.endswith((*_TEXT_SUFFIXES, *_PARQUET_SUFFIXES)):
        known = ", ".join((*_TEXT_SUFFIXES, ".parquet"))
        raise DataError(f"{file}: not a kind of file that is read here; save the table as one of {known}")


def _file_table(file: Path) -> Table:
    _check_file(file)
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
    return _read_parquet(file) if suffixes and suffixes[-1] in _PARQUET_SUFFIXES else _read_text(file)


def _read_parquet(file: Path) -> Table:
    try:
        parquet = pa_parquet.ParquetFile(file)
        rows, width = parquet.metadata.num_rows, parquet.metadata.num_columns
        if rows * width > _MOST_PARQUET_CELLS:
            raise DataError(
                f"{file}: {rows:,} rows of {width:,} columns are more than the {_MOST_PARQUET_CELLS:,} cells read at "
                "once; split the file"
            )
        content = parquet.read()
        content.validate(full=True)  # a forged file may hold text that is none
        decode_names(content.schema)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "unknown reason"
        raise DataError(f"{file}: not a readable Parquet file ({reason}); write it again") from error
    return _arrow_table(content, str(file))


def _arrow_table(content: Any, source: str) -> Table:
    names, columns = [], []
    for name, column in zip(content.column_names, content.columns, strict=True):
        # Pandas stores an index without a name under one that nobody chose; unless it holds times, it is a row number.
        unnamed = name.startswith("__index_level_")
        if not unnamed or pa.types.is_timestamp(column.type):
            names.append(_time_index_name(content.column_names) if unnamed else name)
            columns.append(_plain(column.combine_chunks()))
    return Table(source, tuple(names), tuple(columns))


def _time_index_name(names: list[str]) -> str:
    return "time" if "time" not in names else "index"


def _frame_table(frame: Any, source: str) -> Table:
    if not isinstance(frame, pd.DataFrame):
        try:
            content = nw.from_native(frame, eager_only=True).to_arrow()
        except (TypeError, ValueError) as error:
            hint = "give one of pandas, polars or pyarrow (collect a lazy one)"
            raise DataError(f"{source}: expected a frame, found {type(frame).__name__}; {hint}") from error
        return _arrow_table(content, source)
    index, taken = frame.index, [str(name) for name in frame.columns]
    names, columns = [], []
    for level in range(index.nlevels):
        values = index.get_level_values(level)
        times = isinstance(values, pd.DatetimeIndex | pd.PeriodIndex)
        if values.name is not None or times:
            names.append(_time_index_name(taken) if values.name is None else str(values.name))
            columns.append(_plain(_frame_column(values.to_series())))
    names += taken
    columns += [_plain(_frame_column(column)) for _, column in frame.items()]
    return Table(source, tuple(names), tuple(columns))


def _frame_column(column: pd.Series[Any]) -> Any:
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    if isinstance(column.dtype, pd.PeriodDtype):
        column = column.dt.to_timestamp()
    if column.dtype != object and column.dtype.kind != "c":
        return pa.array(column, from_pandas=True)
    if pd.api.types.infer_dtype(column, skipna=True) == "string":  # most columns of objects, and the longest
        return pa.array(column, pa.string(), from_pandas=True)
    cells = [None if missing else cell for cell, missing in zip(column, column.isna(), strict=True)]
    try:
        array = pa.array(cells)
    except (pa.ArrowException, OverflowError):
        array = None
    # Mixtures, such as codes of digits and of letters, are text: 85123 and 85123A are two ids.
    if array is None or pa.types.is_nested(array.type):
        return pa.array([None if cell is None else str(cell) for cell in cells], pa.string())
    return array


def _plain(array: Any) -> Any:
    """An Arrow array as one of the few types that columns are made of."""
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_null(kind):
        return pc.cast(array, pa.string())
    if pa.types.is_decimal(kind):
        return pc.cast(array, pa.float64(), safe=False)
    return pc.cast(array, pa.timestamp("s")) if pa.types.is_date(kind) else array


def _read_text(file: Path) -> Table:
    raw, notes = _decode(file)
    text = raw.lstrip(b"\r\n")
    num_above = raw[: len(raw) - len(text)].count(b"\n")
    header, start, delimiter = _read_header(text, file)
    if delimiter != ("\t" if ".tsv" in file.suffixes else ","):
        notes.append(f"columns are separated by {_DELIMITERS[delimiter]}")
    columns, rows = _parse_rows(text[start:], len(header), delimiter, file, num_above + 2)
    decimal_comma = delimiter != "," and has_decimal_commas(columns)
    if decimal_comma:
        notes.append("numbers are written with decimal commas")
    return _name_unnamed(Table(str(file), tuple(header), columns, rows, decimal_comma, tuple(notes)))


def _parse_rows(
    body: bytes, width: int, delimiter: str, file: Path, first: int
) -> tuple[tuple[Any, ...], NDArray[np.int64]]:
    """The columns below the header as text, and the number a spreadsheet gives each row, from ``first`` on."""
    keys = [str(i) for i in range(width)]
    rows = _spreadsheet_rows(body, first)
    misfits: list[Any] = []

    def stop_at(row: Any) -> str:
        misfits.append(row)
        return "error"

    try:
        content = pa_csv.read_csv(
            io.BytesIO(body),
            # Threads would lose the number of the row that is refused.
            read_options=pa_csv.ReadOptions(column_names=keys, use_threads=False, block_size=1 << 22),
            parse_options=pa_csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=b'"' in body, invalid_row_handler=stop_at
            ),
            convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(keys, pa.string())),
        )
    except pa.ArrowInvalid as error:
        if misfits:
            number, expected, found = misfits[0].number, misfits[0].expected_columns, misfits[0].actual_columns
            row = number + first - 1 if rows is None or number > len(rows) else rows[number - 1]
            hint = "look for a missing or extra separator, or quote text that contains one"
            raise DataError(f"{file}, row {row}: expected {expected} columns, found {found}; {hint}") from error
        if body.strip():
            raise DataError(f"{file}: not a readable table ({str(error).splitlines()[0]}); save it again") from error
        content = pa.table({key: pa.array([], pa.string()) for key in keys})
    if rows is None or len(rows) != content.num_rows:
        rows = np.arange(content.num_rows, dtype=np.int64) + first
    return tuple(_plain(column.combine_chunks()) for column in content.columns), rows


def _read_up_to(most: int, stream: io.BufferedIOBase) -> bytes:
    """What is left of a stream; ``stream.read(most)`` would first make room for all of ``most``."""
    content = io.BytesIO()
    while content.tell() < most and (piece := stream.read(min(_PIECE_BYTES, most - content.tell()))):
        content.write(piece)
    return content.getvalue()


def _decode(file: Path) -> tuple[bytes, list[str]]:
    """The file as UTF-8 without a byte-order mark, and what had to be done for it."""
    try:
        with file.open("rb") as stream:
            is_gzip = stream.read(2) == _GZIP_MAGIC
        with gzip.open(file) if is_gzip else file.open("rb") as stream:
            raw = _read_up_to(_LARGEST_TEXT_BYTES + 1, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch or write it again") from error
    if len(raw) > _LARGEST_TEXT_BYTES:
        limit = f"{_LARGEST_TEXT_BYTES >> 30} GiB"
        raise DataError(f"{file}: holds more than {limit} of text, the most that is read; save the table as Parquet")
    if raw.startswith(_ZIP_MAGIC):
        raise DataError(f"{file}: this is a workbook or zip archive, not text; save the table as CSV")
    notes = []
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raw = raw.decode("utf-16", errors="replace").encode()
        notes.append("the file is UTF-16")
    elif raw.startswith(b"\xef\xbb\xbf"):
        raw = raw[3:]
        notes.append("the file starts with a UTF-8 byte-order mark")
    else:
        try:
            raw.decode()
        except UnicodeDecodeError:
            raw = raw.decode("latin-1").encode()
            notes.append("the file is not UTF-8 and was read as Latin-1")
    if not raw.strip():
        raise DataError(f"{file}: the file is empty; it needs a header and rows")
    if b"\n" not in raw and b"\r" in raw:
        raw = raw.replace(b"\r", b"\n")
    return raw, notes


def _read_header(raw: bytes, file: Path) -> tuple[list[str], int, str]:
    """The names, where the rows begin, and the delimiter."""
    first = raw[: raw.find(b"\n") if b"\n" in raw else None].decode(errors="replace")
    counts = {delimiter: _unquoted(first).count(delimiter) for delimiter in _DELIMITERS}
    delimiter = max(counts, key=lambda candidate: counts[candidate])
    lines = io.BytesIO(raw)
    try:
        names = next(csv.reader((line.decode(errors="replace") for line in _lines(lines)), delimiter=delimiter))
    except (csv.Error, StopIteration) as error:
        raise DataError(f"{file}, row 1: the header cannot be read ({error}); write column names there") from error
    return [name.strip() for name in names], lines.tell(), delimiter


def _lines(stream: io.BytesIO) -> Iterable[bytes]:
    # readline rather than iteration, for `tell` to stay with the line that was read.
    while line := stream.readline():
        yield line


def _unquoted(line: str) -> str:
    return "".join(line.split('"')[::2])


def _spreadsheet_rows(body: bytes, first: int) -> NDArray[np.int64] | None:
    """Row numbers of the records where blank lines lie between them, which the parser passes over."""
    text = body.rstrip(b"\r\n").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b"\n\n" not in text and not text.startswith(b"\n"):
        return None
    filled = [bool(line) for line in text.split(b"\n")]
    return np.flatnonzero(filled) + first


def _name_unnamed(table: Table) -> Table:
    """Call columns without a name after their position; leave out those that are empty too."""
    names, columns = [], []
    for position, (name, column) in enumerate(zip(table.names, table.columns, strict=True), 1):
        if name or not pc.all(pc.equal(column, "")).as_py():
            names.append(name or f"column {position}")
            columns.append(column)
    return replace(table, names=tuple(names), columns=tuple(columns))


def _check_header(table: Table) -> None:
    if not table.names:
        raise DataError(f"{table.source}: there are no columns; a table needs one of times and one of numbers")
    for name, count in Counter(table.names).items():
        if count > 1:
            raise DataError(f"{table.source}: two columns are called {name!r}; rename one of them")
    dates = _names_like_dates(table.names)
    if len(dates) > 1:
        hint = "put one time per row"
        raise DataError(f"{table.source}: column names like {shorten(dates[0])} are dates, times run across; {hint}")
    if dates and table.rows is not None:
        raise DataError(f"{table.source}, row 1: {shorten(dates[0])} is a date where names should be; add a header row")


def _names_like_dates(names: Sequence[str]) -> list[str]:
    """Those that are dates, found by way of the shapes they have: thousands of sensors share a few."""
    shapes: dict[str, list[str]] = {}
    for name in names:
        if (shape := re.sub(r"\d", "0", name)) != name or "0" in name:
            shapes.setdefault(shape, []).append(name)
    return [
        name
        for alike in shapes.values()
        if looks_like_dates(pa.array(alike), numbers_too=False)
        for name in alike
        if looks_like_dates(pa.array([name]), numbers_too=False)
    ]


def _drop_blank_rows(table: Table) -> Table:
    """Leave out rows in which every cell is empty, as spreadsheets write below a table."""
    if not all(pa.types.is_string(column.type) for column in table.columns):
        return table
    blank = np.ones(len(table), dtype=bool)
    for column in table.columns:
        blank &= pc.equal(column, "").fill_null(False).to_numpy(zero_copy_only=False)
    if not blank.any():
        return table
    return table.keep(~blank, f"{int(blank.sum())} blank rows were left out")
