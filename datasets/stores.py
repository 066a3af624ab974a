"""Where files lie: a local path, or the URL of a store that fsspec knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.fs as pa_fs  # type: ignore[import-untyped]

from trellis_ts.errors import DataError


def is_url(address: str) -> bool:
    """Whether an address names a store rather than a path."""
    return "://" in address


def open_store(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        DataError: no such kind of store is known, or its package is not installed.
    """
    if not is_url(address):
        return pa_fs.LocalFileSystem(), str(Path(address).absolute())
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError, OSError) as error:
        raise DataError(f"{address}: {str(error).splitlines()[0]}; check the address") from error
    if "file" in filesystem.protocol:
        return pa_fs.LocalFileSystem(), path
    return pa_fs.PyFileSystem(pa_fs.FSSpecHandler(filesystem)), path.rstrip("/")


def joined(address: str, *names: str) -> str:
    """A path or URL below another."""
    return "/".join([address.rstrip("/") or "/", *names])
