"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trellis_ts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator


def open_permissions(path: Path, mode: int) -> None:
    """Gives a file or directory made private by ``tempfile`` the permissions it would otherwise have had."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def check_writable(path: Path) -> None:
    """Refuses an output path before the work, not after it.

    Raises:
        ConfigError: it is a directory, or its directory does not exist or cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a directory; name a file")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"cannot write {path}: there is no directory {folder}; create it first")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ConfigError(f"cannot write {path}: permission denied; choose another path")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path of the same ending that replaces ``path`` at the end, and vanishes on an error.

    Raises:
        ConfigError: the disk is full, or the path cannot be written.
    """
    check_writable(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix="".join(path.suffixes[-2:]))
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            open_permissions(temporary, 0o666)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error
