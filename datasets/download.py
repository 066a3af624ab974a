"""One file over HTTP: resumed where it was cut, checked by sha256, moved into place only when it is whole."""

from __future__ import annotations

import errno
import http.client
import json
import logging
import os
import re
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from trellis_ts.datasets.checksums import MAX_BYTES, mismatch
from trellis_ts.errors import DataError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
"""Called with the bytes there are so far and the bytes there will be, None where the server does not say."""

CHUNK_BYTES = 2**18

_BACKOFF_SECONDS = 1.0
_LOCK_POLL_SECONDS = 0.1
_LOCK_PATIENCE_SECONDS = 600.0
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class _Cut(Exception):
    """This attempt failed in a way that another attempt may not."""


class _Refused(Exception):
    """This address will not give the file, however often it is asked."""


def fetch(
    urls: Sequence[str],
    destination: Path,
    sha256s: Sequence[str] = (),
    *,
    progress: Progress | None = None,
    timeout_seconds: float = 30.0,
    attempts: int = 3,
    max_bytes: int = MAX_BYTES,
    advice: str = "",
) -> None:
    """Downloads one file to ``destination``, which appears only once it is complete and verified.

    What was received is kept beside it as ``.part``, and a later attempt, in this call or the next, goes on from
    there if the server vouches that its file is still the same. Calls that run at once wait for each other.

    Args:
        urls: http or https addresses of the same file, tried in order.
        destination: Checksums are taken after decompression if its name ends in ``.gz``.
        sha256s: Accepted checksums; none accepts anything.
        progress: Told after every chunk; starts again at 0 where a server cannot go on from the middle.
        timeout_seconds: Longest silence of the server.
        attempts: For each address, when the connection is cut or the server is busy.
        max_bytes: Largest file accepted, compressed or not.
        advice: What the user can do instead, for the error message.

    Raises:
        DataError: no address gave the file, or it cannot be written.
    """
    for url in urls:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise DataError(f"cannot download from {url!r}: only http and https addresses are accepted")
    plan = _Plan(destination, tuple(sha256s), progress, timeout_seconds, attempts, max_bytes)
    with _writing(destination.parent):
        destination.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    with _claimed_part(destination) as part:
        if destination.is_file() and mismatch(destination, sha256s, max_bytes=max_bytes) is None:
            return  # another process finished while this one waited
        for url in urls:
            logger.info("downloading %s", url)
            problem = _fetch_one(url, part, plan)
            if problem is None:
                with _writing(destination):
                    os.replace(part.path, destination)
                    part.discard()
                return
            problems.append(f"{url}: {problem}")
    advice = f"; {advice}" if advice else ""
    raise DataError(_one_line(f"cannot download {destination.name}: {'; '.join(problems) or 'no address'}{advice}"))


@dataclass(frozen=True)
class _Plan:
    """What one call of ``fetch`` was asked for."""

    destination: Path
    sha256s: tuple[str, ...]
    progress: Progress | None
    timeout_seconds: float
    attempts: int
    max_bytes: int


@dataclass(frozen=True)
class _Part:
    """A download in progress and, in a second file, the address and version of what it is a part of."""

    path: Path

    @property
    def origin_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def begin(self, url: str, validator: str | None) -> None:
        """Starts from nothing."""
        with _writing(self.path):
            # In this order, old bytes can never be taken for a part of the new version.
            self.path.write_bytes(b"")
            self.origin_path.write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")

    def resume_point(self, url: str) -> tuple[int, str]:
        """How many bytes of ``url`` there are and the version they belong to; 0 where they cannot be gone on with."""
        try:
            origin = json.loads(self.origin_path.read_text(encoding="utf-8"))
            size = self.path.stat().st_size
        except (OSError, ValueError):
            return 0, ""
        if not isinstance(origin, dict) or origin.get("url") != url or not isinstance(origin.get("validator"), str):
            return 0, ""
        return size, origin["validator"]

    def discard(self) -> None:
        """Forgets what was received."""
        with _writing(self.path):
            self.path.unlink(missing_ok=True)
            self.origin_path.unlink(missing_ok=True)


def _fetch_one(url: str, part: _Part, plan: _Plan) -> str | None:
    """Downloads and verifies one address into ``part``; returns what went wrong, None if nothing did."""
    compressed = plan.destination.suffix == ".gz"
    problem = ""
    for attempt in range(plan.attempts):
        if attempt:
            time.sleep(_BACKOFF_SECONDS * 2 ** (attempt - 1))
        try:
            resumed = _transfer(url, part, plan)
        except _Refused as error:
            return str(error)
        except _Cut as error:
            problem = f"{error} (attempt {attempt + 1} of {plan.attempts})"
            logger.info("%s: %s", url, problem)
            continue
        wrong = mismatch(part.path, plan.sha256s, compressed=compressed, max_bytes=plan.max_bytes)
        if wrong is None:
            return None
        part.discard()
        problem = f"the file {wrong}"
        if not resumed:  # a resumed one may owe it to what lay there before: a crash can leave a part full of zeros
            return problem
    return problem


def _transfer(url: str, part: _Part, plan: _Plan) -> bool:
    """Receives the file, or the rest of it; returns whether it was the rest."""
    offset, validator = part.resume_point(url)
    headers = {"User-Agent": "trellis-ts", "Accept-Encoding": "identity"}
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
    with _opened(urllib.request.Request(url, headers=headers), plan.timeout_seconds, part) as response:
        start, total = _extent(response, offset, validator, part)
        if total is not None and total > plan.max_bytes:
            raise _Refused(f"the file has {total} bytes, more than the {plan.max_bytes} accepted")
        if start == 0:
            part.begin(url, _validator(response))
        done = _save(response, part, start, total, plan)
    if total is not None and done < total:
        raise _Cut(f"the connection was cut after {done} of {total} bytes")
    return start > 0


def _extent(response: http.client.HTTPResponse, offset: int, validator: str, part: _Part) -> tuple[int, int | None]:
    """Where in the file the answer begins, and the file's size if the server says it."""
    length = response.headers.get("Content-Length", "")
    size = int(length) if length.isdigit() else None
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0, size
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    version = _validator(response)
    if match is None or int(match[1]) != offset or (version is not None and offset and version != validator):
        part.discard()
        raise _Cut("the server sent another part than the one asked for")
    if match[3] != "*":
        return offset, int(match[3])
    return offset, None if size is None else offset + size


def _validator(response: http.client.HTTPResponse) -> str | None:
    """What an If-Range may name: a weak ETag does not promise the same bytes."""
    etag: str | None = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    modified: str | None = response.headers.get("Last-Modified")
    return modified


def _save(response: http.client.HTTPResponse, part: _Part, start: int, total: int | None, plan: _Plan) -> int:
    """Appends the answer to the part; returns how many bytes there are then."""
    done = start
    with _writing(part.path):
        handle = open(part.path, "ab", buffering=0)  # noqa: SIM115  (only opening it is an error of the disk)
    with handle:
        while chunk := _received(response):
            done += len(chunk)
            if done > plan.max_bytes:
                part.discard()
                raise _Refused(f"the file has more than the {plan.max_bytes} bytes accepted")
            with _writing(part.path):
                _write_all(handle, chunk)
            if plan.progress is not None:
                plan.progress(done, total)
        with _writing(part.path):
            os.fsync(handle.fileno())
    return done


def _received(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK_BYTES)
    except http.client.IncompleteRead as error:
        if error.partial:  # the next read says that the connection is gone
            return error.partial
        raise _Cut("the connection was cut") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(_network_reason(error)) from error


def _write_all(handle: IO[bytes], chunk: bytes) -> None:
    """Unbuffered, so that a full disk shows here and not when the file is closed."""
    view = memoryview(chunk)
    while view:
        view = view[handle.write(view) :]


# ---- the network ----


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https, but never from https down to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme != "https" and scheme != req.type:
            fp.close()
            raise _Refused(f"it redirects to {newurl!r}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    # Not `build_opener`, which would add file, ftp and data addresses.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _SafeRedirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


@contextmanager
def _opened(request: urllib.request.Request, timeout_seconds: float, part: _Part) -> Iterator[http.client.HTTPResponse]:
    """The server's answer, its refusals sorted into those worth another attempt and those that are not."""
    try:
        response = cast(http.client.HTTPResponse, _opener().open(request, timeout=timeout_seconds))
    except urllib.error.HTTPError as error:
        error.close()
        problem = _one_line(f"HTTP {error.code} {error.reason}")
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.discard()  # there is more of it here than the server has: not the same file
            raise _Cut(problem) from error
        raise (_Cut if error.code in _TRANSIENT_STATUS else _Refused)(problem) from error
    except urllib.error.URLError as error:
        # The host was not reached at all: asking at once again seldom helps, another address may.
        raise _Refused(_network_reason(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(_network_reason(error)) from error
    with response:
        yield response


def _network_reason(reason: object) -> str:
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    if isinstance(reason, socket.gaierror):
        return f"the host was not found ({reason.strerror})"
    if isinstance(reason, OSError):
        return f"no connection ({reason.strerror or reason})"
    return f"the connection was cut ({reason})" if str(reason) else "the connection was cut"


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---- the disk ----


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror or error}); free some space, or name another folder in TRELLIS_CACHE"
        ) from error


@contextmanager
def _claimed_part(destination: Path) -> Iterator[_Part]:
    """The unfinished download, for this process alone.

    The lock is a file of its own that is never removed: removing it, or locking the part and renaming that, would let
    two processes hold the lock on two files of the same name. The system gives it up when its holder dies.
    """
    with _writing(destination):
        lock = open(destination.with_name(f".{destination.name}.lock"), "ab")  # noqa: SIM115
    with lock:
        if _locked(lock):
            yield _Part(destination.with_name(f"{destination.name}.part"))
            return
        # Some network file systems have no locks: a part under a name of its own is safe too, if never resumed.
        with _writing(destination):
            handle, name = tempfile.mkstemp(prefix=f"{destination.name}.", suffix=".part", dir=destination.parent)
            os.close(handle)
        part = _Part(Path(name))
        try:
            yield part
        finally:
            part.discard()


def _locked(lock: IO[bytes]) -> bool:
    """Waits for the lock; False if it cannot be had."""
    deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
    waiting = False
    while True:
        try:
            if sys.platform == "win32":
                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK) or time.monotonic() > deadline:
                return False
        if not waiting:
            logger.info("waiting for another process that downloads the same file (%s)", lock.name)
            waiting = True
        time.sleep(_LOCK_POLL_SECONDS)
