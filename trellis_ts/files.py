"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trellis_ts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator


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


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file that is flushed before it is moved into place, and flushes the move too: a crash or a power cut
    leaves the old one or the new one, whole.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        open_permissions(temporary, 0o666)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def replace_folder(stage: Path, target: Path, *, owned: Collection[str]) -> None:
    """Puts a folder in the place of another; what lies in the old one and is not ``owned`` moves along.

    Linux exchanges the two in one system call, so that at any moment one of them is there, whole. Elsewhere the old one
    steps aside first. Afterwards ``stage`` may hold what is left of the old one.

    Raises:
        OSError: the old one is in place again, whole.
    """
    if not target.exists():
        stage.rename(target)
        return
    if not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if _exchange(stage, target):
        with _moved_along(stage, target, owned, undo=lambda: _exchange(stage, target)):
            return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old-"))
    old = aside / target.name
    try:
        target.rename(old)
        with _moved_along(old, stage, owned, undo=lambda: old.rename(target)):
            stage.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _moved_along(old: Path, new: Path, owned: Collection[str], *, undo: Callable[[], object]) -> Iterator[None]:
    """Moves what is not owned from one folder to the other; back again, and all undone, after an error."""
    moved: list[str] = []
    try:
        for each in list(old.iterdir()):
            if each.name not in owned:
                each.rename(new / each.name)
                moved.append(each.name)
        yield
    except OSError:
        for name in moved:
            (new / name).rename(old / name)
        undo()
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one system call where the system has one; whether it did."""
    if sys.platform != "linux":
        return False
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
