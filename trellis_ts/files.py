"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
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


def reason_of(error: OSError) -> str:
    """Why the operating system refused, as part of a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return (error.strerror or str(error)).lower()


def check_directory(path: Path) -> None:
    """Refuses a directory that cannot be written, or made, before the work.

    Raises:
        ConfigError: a file is in the way, or permission is missing.
    """
    there = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    if not there.is_dir():
        raise ConfigError(f"cannot write {path}: {there} is a file; name a directory")
    # A directory that is there is replaced, which its parent has to allow.
    if not os.access(path.absolute().parent if there == path else there, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write {path}: permission denied; choose another directory")


def check_writable(path: Path) -> None:
    """Refuses an output path before the work, not after it.

    Raises:
        ConfigError: it is a directory, or its directory does not exist or cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a directory; name a file")
    folder = path.parent
    if not folder.is_dir():
        what = "is no directory; choose another path" if folder.exists() else "does not exist; create it first"
        raise ConfigError(f"cannot write {path}: {folder} {what}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ConfigError(f"cannot write {path}: permission denied; choose another path")


def check_output(path: Path, endings: tuple[str, ...], option: str, data: str) -> None:
    """Refuses an output file of an unknown format, one that cannot be written, and one that is the input itself.

    Raises:
        ConfigError: any of these.
    """
    if not path.name.lower().endswith(endings):
        raise ConfigError(f"{option} '{path}': unknown ending; use one of {', '.join(endings)}")
    check_writable(path)
    if path.exists() and Path(data).exists() and path.samefile(data):
        raise ConfigError(f"{option} {path} is DATA itself; choose another path, for the history would be lost")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path of the same ending that replaces ``path`` at the end, and vanishes on an error.

    Raises:
        ConfigError: the disk is full, or the path cannot be written.
    """
    check_writable(path)
    target = path.resolve()  # a link stays a link
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=ending)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            open_permissions(temporary, 0o666)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {reason_of(error)}; make room or choose another path") from error
