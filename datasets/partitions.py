"""Folders of Parquet files, read in blocks of whole series so that memory holds one block at a time.

Where the files lie clustered by series is told by the statistics of their row groups: a block is then a range of keys,
read from the row groups that reach into it. Where they do not, ``trellis_ts.datasets.spreading`` rewrites the rows into
files that do.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.dataset as pa_dataset  # type: ignore[import-untyped]
import pyarrow.fs as pa_fs  # type: ignore[import-untyped]

from trellis_ts.datasets.columns import Table, decode_names, quote
from trellis_ts.datasets.stores import open_store
from trellis_ts.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CELLS_PER_BLOCK = 1 << 22
"""Cells of a block, about: a hundred bytes each on the way from the file to a panel."""
# Of a single series, or of a wide table, which cannot be cut: as many as are read of one file.
_MOST_CELLS = 1 << 30
SUFFIXES = (".parquet", ".pq")
# Reading row groups twice because two blocks reach into them is cheaper than rewriting all rows, up to here.
_MOST_READ_TWICE = 1.5
_LARGEST_BLOCK = 2


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of one folder that hold some series whole: everything of the row groups named, or a range of keys in them.

    It can be sent to another process, which needs nothing but the files.
    """

    number: int
    address: str
    """Of the folder."""
    fragments: tuple[Any, ...]
    """Files of Arrow's, each with the row groups to read."""
    schema: Any
    columns: tuple[str, ...]
    """Columns to read."""
    key: str | None = None
    """Column of the range; None where all rows are meant."""
    above: Any = None
    """Exclusive; None for no bound."""
    up_to: Any = None
    """Inclusive; None for no bound."""

    def read(self) -> Any:
        """The rows as an Arrow table, in the order of the files.

        Raises:
            DataError: a file cannot be read any more, or the block is larger than can be held.
        """
        condition = None
        if self.above is not None:
            condition = pa_dataset.field(self.key) > self.above
        if self.up_to is not None:
            upper = pa_dataset.field(self.key) <= self.up_to
            condition = upper if condition is None else condition & upper
        with readable(self.address):
            # With several threads, row groups may come in any order, and series with them.
            table = pa.concat_tables(
                fragment.to_table(schema=self.schema, columns=list(self.columns), filter=condition, use_threads=False)
                for fragment in self.fragments
            )
        if table.num_rows * table.num_columns > _MOST_CELLS:
            raise DataError(
                f"{self.address}: {table.num_rows:,} rows belong to series that cannot be told apart further; the most "
                f"that are read at once are {_MOST_CELLS:,} cells"
            )
        return table


class _Group(NamedTuple):
    """One row group, with the bounds of its keys."""

    file: int
    """Which of the folder's files."""
    number: int
    """Which of the file's row groups."""
    rows: int
    low: Any
    high: Any


class ParquetFolder:
    """The Parquet files below a folder, or a single one; hidden files (``.``, ``_``) are passed over.

    Folders named ``column=value`` are columns. Files may differ in the order of columns and in the width of numbers.

    Args:
        address: path or URL.

    Raises:
        DataError: there is no such folder, nothing in it is read here, or files have other columns than the first.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.filesystem, self._root = open_store(address)
        self._infos = self._list()
        with readable(address):
            options = pa_dataset.FileSystemFactoryOptions(
                partition_base_dir=self._root, partitioning=pa_dataset.HivePartitioning.discover()
            )
            factory = pa_dataset.FileSystemDatasetFactory(
                self.filesystem, [info.path for info in self._infos], pa_dataset.ParquetFileFormat(), options
            )
            first = factory.finish()
            schemas = [fragment.physical_schema for fragment in first.get_fragments()]
            for schema in schemas:
                decode_names(schema)
        self._check_alike(schemas)
        try:
            self.schema = pa.unify_schemas([first.schema, *schemas], promote_options="permissive").remove_metadata()
        except pa.ArrowException as error:
            raise DataError(f"{address}: its files do not fit together ({error}); write them alike") from error
        self.dataset = factory.finish(self.schema)

    def _list(self) -> list[Any]:
        with readable(self.address):
            [info] = self.filesystem.get_file_info([self._root])
            if info.type == pa_fs.FileType.File:
                self._root = self._root.rsplit("/", 1)[0]
                return [info]
            if info.type == pa_fs.FileType.NotFound:
                raise DataError(f"{self.address}: there is no such file or folder; check the path")
            infos = self.filesystem.get_file_info(pa_fs.FileSelector(self._root, recursive=True))
        infos = [info for info in infos if info.type == pa_fs.FileType.File and self._is_read(self._below(info.path))]
        if not infos:
            raise DataError(f"{self.address}: no Parquet files lie in this folder; give one that holds some")
        return sorted(infos, key=lambda info: str(info.path))

    @staticmethod
    def _is_read(path: str) -> bool:
        return path.endswith(SUFFIXES) and not any(part.startswith((".", "_")) for part in path.split("/"))

    def _below(self, path: str) -> str:
        return path[len(self._root) :].lstrip("/")

    def _check_alike(self, schemas: Sequence[Any]) -> None:
        expected = set(schemas[0].names)
        for info, schema in zip(self._infos, schemas, strict=True):
            if set(schema.names) != expected:
                first, other = self._below(self._infos[0].path), self._below(info.path)
                raise DataError(
                    f"{self.address}: {other} has columns {quote(schema.names)} and {first} has "
                    f"{quote(schemas[0].names)}; keep files of one kind in a folder"
                )

    @cached_property
    def fragments(self) -> list[Any]:
        """The files as Arrow knows them."""
        return list(self.dataset.get_fragments())

    @cached_property
    def num_rows(self) -> int:
        """Rows of all files, from their footers."""
        with readable(self.address):
            return sum(fragment.metadata.num_rows for fragment in self.fragments)

    @property
    def header(self) -> Table:
        """The columns without their rows."""
        return Table(self.address, tuple(self.schema.names), ())

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the files' names, sizes and times of change."""
        files = [(self._below(info.path), info.size, str(info.mtime)) for info in self._infos]
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def sample(self, rows: int = 1 << 16, places: int = 16) -> Any:
        """Some first rows of row groups spread over the files, to tell the columns by."""
        with readable(self.address):
            groups = [
                (fragment, number) for fragment in self.fragments for number in range(fragment.metadata.num_row_groups)
            ]
            chosen = sorted({len(groups) * place // places for place in range(places)}) if groups else []
            parts = [groups[index][0].subset(row_group_ids=[groups[index][1]]) for index in chosen]
            heads = [pa_dataset.Scanner.from_fragment(part, schema=self.schema).head(rows // places) for part in parts]
        return pa.concat_tables(heads) if heads else self.schema.empty_table()

    def blocks(self, keys: Sequence[str], columns: Sequence[str]) -> tuple[Block, ...] | None:
        """Blocks of whole series; None where the rows of a series may lie anywhere, so that no cheap blocks exist.

        Args:
            keys: the columns that name the series; without any, everything is one series and one block.
            columns: those to read.
        """
        limit = self.rows_per_block(len(columns))
        if not keys or self.num_rows <= limit:
            return (Block(0, self.address, tuple(self.fragments), self.schema, tuple(columns)),)
        groups = self._groups(keys[0])
        return None if groups is None else self._cut(groups, keys[0], tuple(columns), limit)

    def rows_per_block(self, num_columns: int) -> int:
        """About how many rows a block has."""
        return max(1, CELLS_PER_BLOCK // max(1, num_columns))

    def _groups(self, key: str) -> list[_Group] | None:
        """All row groups with the bounds of a key; None where one has none, or may hold rows without a key."""
        kind = self.schema.field(key).type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return None
        groups = []
        for file, fragment in enumerate(self.fragments):
            of_folder = pa_dataset.get_partition_keys(fragment.partition_expression).get(key)
            metadata = fragment.metadata
            places = {metadata.schema.column(index).path: index for index in range(metadata.num_columns)}
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                low = high = of_folder
                if of_folder is None:
                    found = group.column(places[key]).statistics
                    if found is None or not found.has_min_max or found.null_count != 0:
                        return None
                    low, high = found.min, found.max
                groups.append(_Group(file, number, group.num_rows, low, high))
        return groups

    def _cut(
        self, groups: Sequence[_Group], key: str, columns: tuple[str, ...], limit: int
    ) -> tuple[Block, ...] | None:
        """Ranges of keys with about so many rows each; None where their row groups overlap too much for that."""
        cuts, rows = [], 0
        for group in sorted(groups, key=lambda each: each.high):
            rows += group.rows
            if rows >= limit:
                cuts.append(group.high)
                rows = 0
        last = max(group.high for group in groups)
        edges = [None, *(cut for cut in dict.fromkeys(cuts) if cut < last), None]
        blocks, total = [], 0
        for number, (above, up_to) in enumerate(pairwise(edges)):
            inside: dict[int, list[int]] = {}
            size = 0
            for group in groups:
                if (above is None or group.high > above) and (up_to is None or group.low <= up_to):
                    inside.setdefault(group.file, []).append(group.number)
                    size += group.rows
            if size > _LARGEST_BLOCK * limit:
                return None
            total += size
            parts = tuple(self.fragments[file].subset(row_group_ids=ids) for file, ids in inside.items())
            blocks.append(Block(number, self.address, parts, self.schema, columns, key, above, up_to))
        return tuple(blocks) if total <= _MOST_READ_TWICE * self.num_rows else None


@contextmanager
def readable(address: str) -> Iterator[None]:
    """What Arrow and the store say, in one line."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "unknown reason"
        raise DataError(f"{address}: cannot be read as Parquet ({reason}); check the files") from error
