"""States on disk: one file for all series, written whole or not at all, or a database with one row per series."""

from __future__ import annotations

import json
import sqlite3
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trellis_ts.errors import CheckpointError
from trellis_ts.files import reason_of, replace_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

# Version 2 keeps situations whose outcomes are not known yet; what version 1 kept serves no model of today.
STATE_VERSION = 2
_FORMAT = "trellis_ts.state"
_TABLES = {
    "model": "CREATE TABLE model (version INTEGER, fingerprint TEXT)",
    "series": "CREATE TABLE series (name TEXT PRIMARY KEY, state BLOB)",
}
# A table's own index, which SQLite makes by itself and whose definition it leaves out.
_INDEX = ("sqlite_autoindex_series_1", None)
_OTHER_MODEL = "it was written by another model; restore it with that one, or start anew"


def write_state(
    path: Path, arrays: Mapping[str, NDArray[Any]], names: Sequence[str], *, fingerprint: str, extra: Mapping[str, str]
) -> None:
    """Writes a state file in one step: after a crash at any moment there is the old one or the new one, whole.

    Raises:
        CheckpointError: the place cannot be written, or the disk is full.
    """
    metadata = {
        "format": _FORMAT,
        "version": str(STATE_VERSION),
        "fingerprint": fingerprint,
        "series": json.dumps(list(names)),
        "extra": json.dumps(dict(extra)),
    }
    try:
        replace_file(path.resolve(), save(dict(arrays), metadata=metadata))
    except OSError as error:
        raise CheckpointError(f"cannot write the state to {path}: {reason_of(error)}") from error


def read_state(path: Path, *, fingerprint: str) -> tuple[dict[str, NDArray[Any]], list[str], dict[str, str]]:
    """The arrays, the names of the series and what else was kept.

    Raises:
        CheckpointError: it is missing, damaged, of a newer version, or of another model.
    """
    if not path.is_file():
        raise CheckpointError(f"no state at {path}: there is no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(f"{path} is no state of a streaming model")
            version = int(metadata["version"])
            _check_version(path, version)
            if metadata["fingerprint"] != fingerprint:
                raise CheckpointError(f"cannot restore {path}: {_OTHER_MODEL}")
            names, extra = json.loads(metadata["series"]), json.loads(metadata["extra"])
            if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
                raise ValueError("the names of its series are no list of names")
            if len(set(names)) < len(names):
                raise ValueError("it names a series twice")
            if not isinstance(extra, dict) or not all(isinstance(each, str) for each in extra.values()):
                raise ValueError("what it keeps beside the series is no text by name")
            return {name: file.get_tensor(name) for name in file.keys()}, names, extra  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged and cannot be restored: {error}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the state at {path}: {reason_of(error)}") from error


def _check_version(path: Path, version: int) -> None:
    if version > STATE_VERSION:
        raise CheckpointError(
            f"{path} has state version {version}, this trellis reads version {STATE_VERSION}; upgrade trellis-ts"
        )
    if version < STATE_VERSION:
        raise CheckpointError(
            f"{path} has state version {version}, of an older trellis, which cannot be read any more; train the model "
            "anew and start a new state"
        )


class Store:
    """States of many series in a SQLite database; what is put in is durable after ``commit``.

    Args:
        path: of the database, made if there is none.
        fingerprint: of the model; another one's database is refused.

    Raises:
        CheckpointError: it cannot be opened, is damaged, or belongs to another model.
    """

    def __init__(self, path: Path, *, fingerprint: str) -> None:
        self.path = path
        with self._explained():
            self._database = sqlite3.connect(path)
        try:
            with self._explained():
                self._prepare(fingerprint)
        except CheckpointError:
            self._database.close()
            raise

    def _prepare(self, fingerprint: str) -> None:
        # What a file defines (views, triggers, checks) is not to be run.
        self._database.execute("PRAGMA trusted_schema=OFF")
        self._database.execute("PRAGMA cell_size_check=ON")
        defined = dict(self._database.execute("SELECT name, sql FROM sqlite_master").fetchall())
        if defined and defined != _TABLES | dict([_INDEX]):
            raise CheckpointError(f"cannot use the store {self.path}: its tables are not those of a store")
        # Readers go on during a commit, and a killed process leaves the last one whole.
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        if not defined:
            for statement in _TABLES.values():
                self._database.execute(statement)
        found = self._database.execute("SELECT version, fingerprint FROM model").fetchone()
        if found is None:
            self._database.execute("INSERT INTO model VALUES (?, ?)", (STATE_VERSION, fingerprint))
        self._database.commit()
        if found is None:
            return
        if not isinstance(found[0], int):
            raise CheckpointError(f"cannot use the store {self.path}: it is damaged")
        _check_version(self.path, found[0])
        if found[1] != fingerprint:
            raise CheckpointError(f"cannot use {self.path}: {_OTHER_MODEL}")

    def __len__(self) -> int:
        with self._explained():
            count: int = self._database.execute("SELECT COUNT(*) FROM series").fetchone()[0]
        return count

    def names(self) -> Iterator[str]:
        """Of all series, in order."""
        with self._explained():
            for (name,) in self._database.execute("SELECT name FROM series ORDER BY name"):
                if not isinstance(name, str):
                    raise CheckpointError(f"cannot use the store {self.path}: it is damaged")
                yield name

    def get(self, name: str) -> bytes | None:
        """The state of a series, None if there is none."""
        with self._explained():
            found = self._database.execute("SELECT state FROM series WHERE name = ?", (name,)).fetchone()
        if found is not None and not isinstance(found[0], bytes):
            raise CheckpointError(f"cannot use the store {self.path}: the state of series '{name}' is damaged")
        return None if found is None else found[0]

    def put(self, states: Mapping[str, bytes]) -> None:
        """Replaces states; durable after ``commit``."""
        with self._explained():
            self._database.executemany("INSERT OR REPLACE INTO series VALUES (?, ?)", states.items())

    def delete(self, names: Sequence[str] | None) -> None:
        """Removes states; all of them for None."""
        with self._explained():
            if names is None:
                self._database.execute("DELETE FROM series")
            else:
                self._database.executemany("DELETE FROM series WHERE name = ?", [(name,) for name in names])

    def commit(self) -> None:
        """Makes durable what was put and deleted, all or nothing."""
        with self._explained():
            self._database.commit()

    def close(self) -> None:
        """Gives the database back; what was not committed is lost."""
        self._database.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeError) as error:  # text in it may be no UTF-8
            raise CheckpointError(f"cannot use the store {self.path}: {error}") from error
