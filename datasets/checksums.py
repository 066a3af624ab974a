"""Checksums of published files: of the uncompressed bytes, so that one list serves ``name`` and ``name.gz``."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

from trellis_ts.errors import DataError

MAX_BYTES = 2**30
"""Several times the largest benchmark; keeps a wrong address or a forged archive from filling the disk."""

_CHUNK_BYTES = 2**18


def sha256_of(path: Path, *, compressed: bool | None = None, max_bytes: int = MAX_BYTES) -> str:
    """The sha256 of a file's bytes, of the decompressed ones where it is gzip (``compressed``; None asks the name).

    Raises:
        DataError: the file cannot be read, is not whole, or holds more than ``max_bytes``.
    """
    if compressed is None:
        compressed = path.suffix == ".gz"
    digest = hashlib.sha256()
    size = 0
    try:
        with cast(BinaryIO, gzip.open(path, "rb")) if compressed else open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > max_bytes:
                    raise DataError(f"{path} holds more than the {max_bytes} bytes accepted")
                digest.update(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def mismatch(
    path: Path, sha256s: Sequence[str], *, compressed: bool | None = None, max_bytes: int = MAX_BYTES
) -> str | None:
    """What is wrong with the file, as the rest of a sentence that begins with its name; None if it is good."""
    if not sha256s:
        return None
    try:
        found = sha256_of(path, compressed=compressed, max_bytes=max_bytes)
    except DataError as error:
        return str(error).removeprefix(f"{path} ")
    return None if found in sha256s else f"has sha256 {found}, expected {' or '.join(sha256s)}"
