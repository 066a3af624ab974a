"""Where a published data file lies: the user's folder, then the cache, else it is downloaded; always checked."""

from __future__ import annotations

import logging
import os
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from trellis_ts.datasets.checksums import mismatch
from trellis_ts.datasets.download import Progress, fetch
from trellis_ts.errors import DataError

logger = logging.getLogger(__name__)

DATA_VARIABLE = "TRELLIS_DATA"
CACHE_VARIABLE = "TRELLIS_CACHE"


def data_folder() -> Path | None:
    """The user's own folder of data files, named by ``TRELLIS_DATA``.

    Raises:
        DataError: the variable names something that is not a folder.
    """
    value = os.environ.get(DATA_VARIABLE)
    if not value:
        return None
    folder = Path(os.path.expanduser(value))
    if not folder.is_dir():
        raise DataError(f"{DATA_VARIABLE} is {value!r}, which is not a folder; correct it or unset it")
    return folder


def cache_folder() -> Path:
    """Where downloads are kept: ``TRELLIS_CACHE``, else the platform's place for caches. It need not exist yet."""
    value = os.environ.get(CACHE_VARIABLE)
    if value:
        return Path(os.path.expanduser(value))
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~\\AppData\\Local")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or ""
        if not os.path.isabs(base):  # the XDG specification has relative paths ignored
            base = os.path.expanduser("~/.cache")
    return Path(base) / "trellis_ts"


def find_local(file_names: Sequence[str]) -> Path | None:
    """The copy that ``locate`` would look at first, not verified; None if there is none without a download."""
    own = data_folder()
    found = _find(own, file_names) if own is not None else None
    if found is None:
        found = next((path for path in _in_folder(cache_folder(), file_names) if path.is_file()), None)
    return found


def locate(
    file_names: Sequence[str],
    *,
    urls: Sequence[str] = (),
    sha256s: Sequence[str] = (),
    homepage: str = "",
    allow_download: bool = True,
    progress: Progress | None = None,
) -> Path:
    """A verified copy of a published file, plain or as ``.gz``.

    Looked for in ``TRELLIS_DATA`` and its direct subfolders, then in the cache; else downloaded into the cache. A
    damaged copy in the cache is replaced, one in the user's folder is left alone and refused.

    Args:
        file_names: Names it is known by, without ``.gz``; a download gets the first.
        urls: Addresses to try in order: all of the plain file, or all of the ``.gz``.
        sha256s: Accepted checksums of the uncompressed bytes; none means that the file cannot be verified.
        homepage: Where a person finds the file.
        allow_download: Whether the network may be used.
        progress: Told about the download.

    Raises:
        DataError: there is no such file, it is not the published one, or the download failed.
    """
    by_hand = f"download it by hand from {homepage}" if homepage else "get it by hand"
    by_hand += f" and put {file_names[0]} into the folder named by {DATA_VARIABLE}"
    own = data_folder()
    if own is not None and (found := _own_copy(own, file_names, sha256s, homepage)) is not None:
        return found
    cache = cache_folder()
    damaged = []
    for cached in _in_folder(cache, file_names):
        if cached.is_file():
            problem = mismatch(cached, sha256s)
            if problem is None:
                return cached
            damaged.append(f"{cached} {problem}")
    if not allow_download or not urls:
        places = " or ".join(str(place) for place in (own, cache) if place is not None)
        problem = "; ".join(damaged) or f"{file_names[0]} was not found in {places}"
        remedy = "allow the download, or " if urls else ""
        raise DataError(f"{problem}; {remedy}{by_hand}")
    for problem in damaged:
        logger.warning("%s; downloading it again", problem)
    packed = all(urllib.parse.urlsplit(url).path.endswith(".gz") for url in urls)
    destination = cache / (f"{file_names[0]}.gz" if packed else file_names[0])
    fetch(urls, destination, sha256s, progress=progress, advice=by_hand)
    return destination


def _own_copy(folder: Path, file_names: Sequence[str], sha256s: Sequence[str], homepage: str) -> Path | None:
    """The user's file if there is one; a wrong one is an error, since silently taking another would surprise."""
    found = _find(folder, file_names)
    problem = None if found is None else mismatch(found, sha256s)
    if problem is not None:
        where = f" from {homepage}" if homepage else ""
        raise DataError(f"{found} {problem}; get the published one{where}, or take it out of {DATA_VARIABLE}")
    return found


def _in_folder(folder: Path, file_names: Sequence[str]) -> list[Path]:
    return [folder / name for file_name in file_names for name in (file_name, f"{file_name}.gz")]


def _find(folder: Path, file_names: Sequence[str]) -> Path | None:
    """The file in ``folder``, else in a direct subfolder: the usual releases keep ``weather/weather.csv``."""
    try:
        subfolders = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        places = (folder, *subfolders)
        return next((path for place in places for path in _in_folder(place, file_names) if path.is_file()), None)
    except OSError as error:
        raise DataError(f"cannot search the folder {folder} ({error.strerror or error})") from error
