"""A folder of forecasts, one file per block, that can be gone on with after any interruption.

A file is written under another name, moved into place when it is whole, and tells in its footer which run and block it
is of. So what bears a final name is complete, and a run goes on by writing what is missing. ``_trellis.json`` says what
the forecasts are of; another model, input or setting makes another run, which is refused.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.fs as pa_fs  # type: ignore[import-untyped]
import pyarrow.parquet as pa_parquet  # type: ignore[import-untyped]

from trellis_ts.datasets.spreading import hash_keys
from trellis_ts.datasets.stores import open_store
from trellis_ts.errors import ConfigError, DataError
from trellis_ts.files import reason_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SPREAD_FOLDER = "_spread"
_MANIFEST, _METADATA_KEY = "_trellis.json", b"trellis"


@dataclass(frozen=True)
class Part:
    """What the footer of a file says about it."""

    run: str
    """Checksum of everything the forecasts depend on."""
    block: int
    series: int
    rows_read: int
    rows_written: int


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run go. It can be sent to another process."""

    address: str
    run: str

    @property
    def spread_address(self) -> str:
        """Where the rows of an input that is not clustered by series are spread."""
        return f"{self.address.rstrip('/')}/{SPREAD_FOLDER}"

    @property
    def _spread_mark(self) -> str:
        return f"{SPREAD_FOLDER}/_complete"

    def is_spread(self) -> bool:
        """Whether the rows of this run's input are spread already, all of them."""
        filesystem, root = open_store(self.address)
        [info] = filesystem.get_file_info([f"{root}/{self._spread_mark}"])
        if info.type != pa_fs.FileType.File:
            return False
        with filesystem.open_input_stream(f"{root}/{self._spread_mark}") as stream:
            return bool(stream.read().decode("utf-8", "replace") == self.run)

    def start_spreading(self) -> None:
        """An empty folder for the spread rows."""
        filesystem, root = open_store(self.address)
        self.remove_spread()
        filesystem.create_dir(f"{root}/{SPREAD_FOLDER}")

    def finish_spreading(self) -> None:
        """Says that all rows are there."""
        _write_whole(self.address, self._spread_mark, self.run.encode())

    def remove_spread(self) -> None:
        """Makes room, once everything is forecast."""
        filesystem, root = open_store(self.address)
        [info] = filesystem.get_file_info([f"{root}/{SPREAD_FOLDER}"])
        if info.type == pa_fs.FileType.Directory:
            filesystem.delete_dir(f"{root}/{SPREAD_FOLDER}")

    def finished(self, block: int) -> Part | None:
        """What is there of a block; None where it has to be forecast."""
        filesystem, root = open_store(self.address)
        path = f"{root}/{part_name(block)}"
        [info] = filesystem.get_file_info([path])
        if info.type != pa_fs.FileType.File:
            return None
        try:
            metadata = pa_parquet.read_metadata(path, filesystem=filesystem)
            part = Part(**json.loads((metadata.metadata or {})[_METADATA_KEY]))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            return None
        is_whole = part.run == self.run and part.block == block and part.rows_written == metadata.num_rows
        return part if is_whole else None

    def all_finished(self) -> list[Part] | None:
        """What is there of a run that was completed; None where something has to be done."""
        manifest = _read_manifest(*open_store(self.address)) or {}
        if manifest.get("state") != "complete":
            return None
        parts = [self.finished(block) for block in range(int(manifest.get("partitions", 0)))]
        found = [part for part in parts if part is not None]
        return found if len(found) == len(parts) else None

    def write(self, part: Part, table: pa.Table) -> None:
        """Writes the file of a block whole or not at all.

        Raises:
            ConfigError: the disk is full, or the folder cannot be written.
        """
        filesystem, root = open_store(self.address)
        temporary = f"{root}/_{part_name(part.block)}.{uuid.uuid4().hex[:8]}.tmp"
        table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(asdict(part))})
        try:
            try:
                pa_parquet.write_table(table, temporary, filesystem=filesystem, write_page_checksum=True)
                filesystem.move(temporary, f"{root}/{part_name(part.block)}")
            except BaseException:
                _remove(filesystem, temporary)
                raise
        except OSError as error:
            raise _unwritable(self.address, error) from error

    def close(self, parts: Sequence[Part], keys: Sequence[str], expected: NDArray[np.uint64] | None) -> None:
        """Checks that every series has exactly one block of rows, and says in the manifest that all is done.

        Args:
            parts: of all blocks.
            keys: the output's columns that name the series.
            expected: hashes of the keys of the input's series; None for a single series without a name.

        Raises:
            DataError: a series is missing, or in two files, or a file has another number of rows than its series call
                for.
        """
        filesystem, root = open_store(self.address)
        if expected is not None:
            self._check(parts, keys, expected)
        manifest = _read_manifest(filesystem, root)
        if manifest is None:
            raise DataError(f"{self.address}: {_MANIFEST} has gone while forecasts were written; run again")
        manifest |= {
            "state": "complete",
            "partitions": len(parts),
            "series": sum(part.series for part in parts),
            "rows_read": sum(part.rows_read for part in parts),
            "rows": sum(part.rows_written for part in parts),
        }
        _write_whole(self.address, _MANIFEST, _as_text(manifest))
        self.remove_spread()

    def _check(self, parts: Sequence[Part], keys: Sequence[str], expected: NDArray[np.uint64]) -> None:
        filesystem, root = open_store(self.address)
        found, rows_per_series = [], set()
        for part in parts:
            name = part_name(part.block)
            table = pa_parquet.read_table(f"{root}/{name}", columns=list(keys), filesystem=filesystem)
            hashes, counts = np.unique(hash_keys(table, keys, f"{self.address}/{name}"), return_counts=True)
            rows_per_series.update(counts.tolist())
            found.append(hashes)
        hashes, times = np.unique(np.concatenate(found), return_counts=True)
        missing, added = np.setdiff1d(expected, hashes), np.setdiff1d(hashes, expected)
        for problem, number in (
            ("without a forecast", len(missing)),
            ("that the input does not hold", len(added)),
            ("in two files", int((times > 1).sum())),
        ):
            if number:
                raise DataError(
                    f"{self.address}: {number:,} series {problem}; the input has changed under way, or its files are "
                    "damaged: run again with --overwrite"
                )
        if len(rows_per_series) > 1:
            raise DataError(
                f"{self.address}: series have {min(rows_per_series)} to {max(rows_per_series)} rows of forecasts, "
                "which ought to be equally many; run again with --overwrite"
            )


def part_name(block: int) -> str:
    """The name of a block's file."""
    return f"part-{block:05d}.parquet"


def open_run(address: str, about: dict[str, Any], *, overwrite: bool = False) -> RunFolder:
    """The folder of a new run, or of one to go on with.

    Args:
        address: path or URL.
        about: what the forecasts depend on, by what it is called: ``model``, ``input``, ``settings``.
        overwrite: whether other forecasts may be replaced.

    Raises:
        ConfigError: the folder holds something else, or cannot be written.
    """
    run = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    folder = RunFolder(address, run)
    filesystem, root = open_store(address)
    try:
        filesystem.create_dir(root, recursive=True)
        infos = filesystem.get_file_info(pa_fs.FileSelector(root))
        manifest = _read_manifest(filesystem, root)
        strange = [info.base_name for info in infos if not _is_ours(info)]
        if strange or (manifest is None and infos):
            raise ConfigError(f"{address} holds other files than forecasts; choose another --output")
        if manifest is not None and manifest.get("run") != run and not overwrite:
            other = [name for name in about if manifest.get("about", {}).get(name) != about[name]]
            raise ConfigError(
                f"{address} holds forecasts of another {' and '.join(other) or 'version'}; choose another "
                "--output, or replace them with --overwrite"
            )
        is_kept = manifest is not None and manifest.get("run") == run and not overwrite
        for info in infos:
            if info.base_name.endswith(".tmp") or (not is_kept and info.type == pa_fs.FileType.File):
                filesystem.delete_file(info.path)
        if not is_kept:
            folder.remove_spread()
            _write_whole(address, _MANIFEST, _as_text({"state": "unfinished", "run": run, "about": about}))
    except OSError as error:
        raise _unwritable(address, error) from error
    return folder


def _is_ours(info: Any) -> bool:
    if info.type == pa_fs.FileType.Directory:
        return bool(info.base_name == SPREAD_FOLDER)
    name: str = info.base_name
    is_part = name.startswith("part-") and name.endswith(".parquet")
    return is_part or name == _MANIFEST or (name.startswith("_") and name.endswith(".tmp"))


def _read_manifest(filesystem: Any, root: str) -> dict[str, Any] | None:
    [info] = filesystem.get_file_info([f"{root}/{_MANIFEST}"])
    if info.type != pa_fs.FileType.File:
        return None
    with filesystem.open_input_stream(f"{root}/{_MANIFEST}") as stream:
        try:
            content = json.loads(stream.read())
        except ValueError:
            return {}
    return content if isinstance(content, dict) else {}


def _as_text(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _write_whole(address: str, name: str, content: bytes) -> None:
    filesystem, root = open_store(address)
    temporary = f"{root}/_{uuid.uuid4().hex[:8]}.tmp"
    try:
        with filesystem.open_output_stream(temporary) as stream:
            stream.write(content)
        filesystem.move(temporary, f"{root}/{name}")
    except OSError as error:
        _remove(filesystem, temporary)
        raise _unwritable(address, error) from error


def _remove(filesystem: Any, path: str) -> None:
    [info] = filesystem.get_file_info([path])
    if info.type == pa_fs.FileType.File:
        filesystem.delete_file(path)


def _unwritable(address: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write {address}: {reason_of(error)}; make room or choose another --output, then run again: what is "
        "finished is kept"
    )
