"""Rows spread by the hash of their series over files on disk, so that each file holds its series whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pa_parquet  # type: ignore[import-untyped]

from trellis_ts.datasets.columns import as_texts
from trellis_ts.datasets.partitions import Block, ParquetFolder
from trellis_ts.datasets.stores import joined, open_store
from trellis_ts.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

# Rows read at once, and what Arrow reads ahead of them; in the same order each time.
_SCAN = {"batch_size": 1 << 18, "batch_readahead": 4, "fragment_readahead": 1, "use_threads": False}
# Rows waiting to be written, over all files: a row group of each is as many as fit.
_WAITING_ROWS = 1 << 22
_MOST_FILES = 512


def num_buckets(folder: ParquetFolder, columns: Sequence[str]) -> int:
    """Files to spread a folder over. Beyond two billion cells they grow instead of becoming more."""
    rows = folder.rows_per_block(len(columns))
    return int(min(_MOST_FILES, -(-folder.num_rows // rows)))


def spread(
    folder: ParquetFolder,
    keys: Sequence[str],
    columns: Sequence[str],
    into: str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Block, ...]:
    """Writes every row into one of ``num_buckets`` Parquet files by the hash of its keys; the order of rows is kept.

    Args:
        folder: what is read, once.
        keys: the columns that name the series.
        columns: those to keep, keys included.
        into: an empty folder, or the URL of one.
        progress: called with the rows done and all.

    Raises:
        DataError: the folder cannot be read, or a row has no key.
        OSError: a file cannot be written.
    """
    count = num_buckets(folder, columns)
    filesystem, root = open_store(into)
    schema = pa.schema([_plain_field(folder.schema.field(name)) for name in columns])
    names = [f"bucket-{index:05d}.parquet" for index in range(count)]
    writers = [pa_parquet.ParquetWriter(f"{root}/{name}", schema, filesystem=filesystem) for name in names]
    waiting: list[list[Any]] = [[] for _ in names]
    sizes = np.zeros(count, dtype=np.int64)
    at_once, done = max(1024, _WAITING_ROWS // count), 0

    def write(bucket: int) -> None:
        writers[bucket].write_table(pa.concat_tables(waiting[bucket]), row_group_size=1 << 20)
        waiting[bucket], sizes[bucket] = [], 0

    try:
        for batch in folder.dataset.to_batches(columns=list(columns), **_SCAN):
            table = pa.Table.from_batches([batch]).cast(schema)
            buckets = (hash_keys(table, keys, folder.address) % np.uint64(count)).astype(np.int64)
            order = np.argsort(buckets, kind="stable")
            table = table.take(pa.array(order))
            starts = np.searchsorted(buckets[order], np.arange(count + 1))
            for bucket in np.flatnonzero(np.diff(starts)).tolist():
                part = table.slice(starts[bucket], starts[bucket + 1] - starts[bucket])
                waiting[bucket].append(part)
                sizes[bucket] += len(part)
                if sizes[bucket] >= at_once:
                    write(bucket)
            done += len(table)
            if progress is not None:
                progress(done, folder.num_rows)
        for bucket in np.flatnonzero(sizes).tolist():
            write(bucket)
    except pa.ArrowException as error:
        raise DataError(f"{folder.address}: cannot be read as Parquet ({error}); check the files") from error
    finally:
        for writer in writers:
            writer.close()
    return buckets_in(into, columns)


def buckets_in(address: str, columns: Sequence[str]) -> tuple[Block, ...]:
    """The blocks of a folder that was spread before; files without a row are none."""
    folder = ParquetFolder(address)
    files = [fragment for fragment in folder.fragments if fragment.metadata.num_rows]
    return tuple(Block(number, address, (file,), folder.schema, tuple(columns)) for number, file in enumerate(files))


def distinct_series(folder: ParquetFolder, keys: Sequence[str]) -> NDArray[np.uint64]:
    """Hashes of the keys of all series, each once and in order, from a pass over the key columns alone."""
    found: list[NDArray[np.uint64]] = []
    for batch in folder.dataset.to_batches(columns=list(keys), **_SCAN):
        if batch.num_rows:
            found.append(np.unique(hash_keys(pa.Table.from_batches([batch]), keys, folder.address)))
        if len(found) > 64:
            found = [np.unique(np.concatenate(found))]
    return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)


def hash_keys(table: Any, keys: Sequence[str], source: str) -> NDArray[np.uint64]:
    """A 64-bit hash of each row's key, as text; the same on every machine.

    Raises:
        DataError: a row has no key.
    """
    combined = np.zeros(len(table), dtype=np.uint64)
    for name in keys:
        column = table.column(name).combine_chunks()
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        texts = as_texts(column.dictionary, source, name)
        if column.null_count or texts.null_count or pc.any(pc.equal(texts, "")).as_py():
            raise DataError(
                f"{source}, column {name!r}: the name of the series is missing in some rows; fill it in or remove them"
            )
        hashes = pd.util.hash_array(np.array(texts.to_pylist(), dtype=object), categorize=False)
        codes = column.indices.to_numpy(zero_copy_only=False)
        # Multiplied by an odd constant, so that the order of the columns matters; it wraps around.
        combined = combined * np.uint64(0x9E3779B97F4A7C15) + hashes[codes]
    return combined


def _plain_field(field: Any) -> Any:
    """A field without a dictionary, which differs from file to file."""
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def spread_folder(address: str) -> str:
    """Where the rows are spread below a folder of results; hidden from those who read it."""
    return joined(address, "_spread")
