"""Observations from a stream of lines: CSV with a header, or one JSON object per line."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from trellis_ts.datasets.roles import join_key
from trellis_ts.errors import DataError
from trellis_ts.files import reason_of

if TYPE_CHECKING:
    from typing import BinaryIO

    from trellis_ts.checkpoints import DataRecord

LONGEST_LINE = 1 << 20
"""Bytes; what is longer is no observation, and is not gathered in memory."""
_POLL_SECONDS = 0.2
_MISSING = {"", "na", "nan", "null", "none"}


class Observation(NamedTuple):
    """One line."""

    series: str | None
    time: str | None
    values: list[float]


class Lines(Protocol):
    """Where lines come from; each with its line break, nothing at the end."""

    offset: int
    """Bytes read so far."""

    def read(self) -> bytes: ...


class PipeLines:
    """Standard input: reads a line when it is asked for one, so that the writer waits for us."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.offset = stream, 0

    def read(self) -> bytes:
        """A line, cut where it is too long; empty at the end."""
        line = self._stream.readline(LONGEST_LINE)
        self.offset += len(line)
        return line


class FollowedLines:
    """A file that grows: waits for more at its end, and starts over when it is replaced or cut.

    Args:
        path: of the file, which may yet have to appear.
        offset: bytes to leave out, after the header line; those read before.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path, self.offset = path, offset
        self._file: BinaryIO | None = None

    def header(self) -> bytes:
        """The first line, once it is whole."""
        while True:
            try:
                with self._path.open("rb") as file:
                    line = file.readline(LONGEST_LINE)
            except FileNotFoundError:
                line = b""
            except OSError as error:
                raise DataError(f"--follow {self._path}: cannot be read ({reason_of(error)})") from None
            if line.endswith(b"\n"):
                return line
            time.sleep(_POLL_SECONDS)

    def read(self) -> bytes:
        """The next whole line; waits for it."""
        while True:
            line = self._next()
            if line.endswith(b"\n") or len(line) >= LONGEST_LINE:
                self.offset += len(line)
                return line
            if self._file is not None:  # the writer is in the middle of it
                self._file.seek(self.offset)
            time.sleep(_POLL_SECONDS)

    def _next(self) -> bytes:
        try:
            there = self._path.stat()
            if self._file is not None:
                own = os.fstat(self._file.fileno())
                if (own.st_ino, own.st_dev) != (there.st_ino, there.st_dev) or there.st_size < self.offset:
                    self._file.close()
                    self._file, self.offset = None, 0
            if self._file is None:
                self._file = self._path.open("rb")
                self.offset = min(self.offset, there.st_size) if there.st_size >= self.offset else 0
                self._file.seek(self.offset)
            return self._file.readline(LONGEST_LINE)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise DataError(f"--follow {self._path}: cannot be read ({reason_of(error)})") from None


class LineReader:
    """Turns lines into observations of the model's channels.

    The first line decides: one that begins with ``{`` is JSON, any other the header of a CSV.

    Args:
        record: the columns the model was trained on.
    """

    def __init__(self, record: DataRecord) -> None:
        self._record = record
        self._header: list[str] | None = None
        self.is_json: bool | None = None

    def begin(self, line: bytes) -> bool:
        """Looks at the first line; whether it is an observation itself.

        Raises:
            DataError: a header that lacks a channel.
        """
        text = _decoded(line)
        self.is_json = text.startswith("{")
        if self.is_json:
            return True
        self._header = [name.strip() for name in next(csv.reader([text]), [])]
        missing = [name for name in self._record.channels if name not in self._header]
        if missing:
            raise DataError(
                f"the first line has no column '{missing[0]}'; begin with a header that names "
                f"{', '.join(self._record.channels[:12])}, or send JSON objects, one per line"
            )
        if len(set(self._header)) < len(self._header):
            raise DataError("the header names a column twice")
        return False

    def parse(self, line: bytes) -> Observation:
        """One line as an observation.

        Raises:
            DataError: what is wrong with it.
        """
        if len(line) >= LONGEST_LINE:
            raise DataError(f"longer than {LONGEST_LINE:,} bytes")
        text = _decoded(line)
        fields = self._json(text) if self.is_json else self._csv(text)
        record = self._record
        values = [_number(name, fields.get(name)) for name in record.channels]
        time_ = fields.get(record.time_column)
        if time_ is not None and not isinstance(time_, str):
            raise DataError(f"{record.time_column} is {time_!r}; write dates like 2024-03-31T18:00")
        return Observation(self._series(fields), time_.strip() or None if time_ else None, values)

    def _json(self, text: str) -> dict[str, object]:
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            raise DataError("this is no JSON") from None
        if not isinstance(fields, dict):
            raise DataError("this is no JSON object")
        if not any(name in fields for name in self._record.channels):
            raise DataError(f"none of the keys {', '.join(self._record.channels[:12])} is there")
        return fields

    def _csv(self, text: str) -> dict[str, object]:
        header = self._header or []
        try:
            cells = next(csv.reader([text], strict=True), [])
        except csv.Error:
            raise DataError("the quotes do not close") from None
        if len(cells) != len(header):
            raise DataError(f"{len(cells)} cells instead of {len(header)}")
        return dict(zip(header, cells, strict=True))

    def _series(self, fields: dict[str, object]) -> str | None:
        name = self._record.id_column
        if name is None:
            return None
        if name in fields:
            found = fields[name]
            if found in (None, ""):
                raise DataError(f"{name} is empty")
            return str(found)
        parts = [fields.get(part) for part in name.split(",")]
        if None in parts:
            raise DataError(f"'{name}' is missing, which names the series")
        return join_key([str(part) for part in parts])


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise DataError("this is no UTF-8 text") from None


def _number(name: str, value: object) -> float:
    """A number; NaN where there is none."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _MISSING):
        return math.nan
    try:
        number = math.inf if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise DataError(f"{name} is {value!r}, which is no number; leave it empty where it is missing")
    return number
