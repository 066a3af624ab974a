"""Downloads against a small server on this machine that can be told to misbehave."""

import errno
import gzip
import hashlib
import http.server
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from trellis_ts.datasets import download
from trellis_ts.datasets.checksums import sha256_of
from trellis_ts.datasets.download import fetch
from trellis_ts.datasets.locations import cache_folder, data_folder, find_local, locate
from trellis_ts.errors import DataError

BODY = bytes(range(256)) * 4096  # 1 MiB, so that it takes several chunks
SHA256 = hashlib.sha256(BODY).hexdigest()
OTHER = b"another version" * 1000


@dataclass
class Page:
    """What one path answers, and how it misbehaves."""

    body: bytes = BODY
    etag: str | None = '"one"'
    last_modified: str | None = None
    status: int = 200
    location: str | None = None
    ranges: bool = True
    honours_if_range: bool = True
    says_length: bool = True
    cuts: list[int] = field(default_factory=list)
    """One for each coming answer: how many bytes of it are sent before the connection is closed."""
    failures: list[int] = field(default_factory=list)
    """One status for each coming answer, instead of the page."""
    chunk_delay_seconds: float = 0.0


class Site(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Page] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        page = self.server.pages.get(self.path)
        if page is None or page.failures:
            self.send_error(page.failures.pop(0) if page is not None else 404)
            return
        start = self.wanted(page)
        if start and start >= len(page.body):
            self.send_error(416)
            return
        body = page.body[start:]
        self.send_response(206 if start else page.status)
        if page.says_length:
            self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(page.body) - 1}/{len(page.body)}")
        for name, value in (("ETag", page.etag), ("Last-Modified", page.last_modified), ("Location", page.location)):
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        stop = page.cuts.pop(0) if page.cuts else len(body)
        for offset in range(0, stop, 65536):
            self.wfile.write(body[offset : min(offset + 65536, stop)])
            time.sleep(page.chunk_delay_seconds)

    def wanted(self, page: Page) -> int:
        asked, version = self.headers.get("Range"), self.headers.get("If-Range")
        if not asked or not page.ranges or (page.honours_if_range and version not in (page.etag, page.last_modified)):
            return 0
        return int(asked.removeprefix("bytes=").removesuffix("-"))

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(download, "_LOCK_POLL_SECONDS", 0.01)
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "file.csv"


def leftovers(target: Path) -> list[str]:
    """Everything in the target's folder but the lock."""
    return sorted(path.name for path in target.parent.iterdir() if not path.name.endswith(".lock"))


def stop_after(chunks: int, error: type[BaseException]) -> Callable[[int, int | None], None]:
    calls = []

    def progress(done: int, total: int | None) -> None:
        calls.append(done)
        if len(calls) == chunks:
            raise error

    return progress


# ---- success ----


def test_the_file_arrives_whole_and_nothing_else_is_left(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page()
    fetch([site.url("/file.csv")], target, [SHA256])
    assert target.read_bytes() == BODY
    assert leftovers(target) == ["file.csv"]


def test_progress_rises_to_the_size(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page()
    seen: list[tuple[int, int | None]] = []
    fetch([site.url("/file.csv")], target, [SHA256], progress=lambda done, total: seen.append((done, total)))
    done = [bytes_done for bytes_done, _ in seen]
    assert len(done) > 1
    assert done == sorted(set(done))
    assert done[-1] == len(BODY)
    assert {total for _, total in seen} == {len(BODY)}


def test_a_server_that_does_not_say_the_size(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page(says_length=False)
    totals: set[int | None] = set()
    fetch([site.url("/file.csv")], target, [SHA256], progress=lambda _, total: totals.add(total))
    assert target.read_bytes() == BODY
    assert totals == {None}


def test_any_of_the_accepted_checksums_will_do(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page()
    fetch([site.url("/file.csv")], target, ["0" * 64, SHA256])
    assert target.exists()


def test_checksums_of_a_gz_are_those_of_its_content(site: Site, tmp_path: Path) -> None:
    site.pages["/file.csv.gz"] = Page(body=gzip.compress(BODY))
    fetch([site.url("/file.csv.gz")], tmp_path / "file.csv.gz", [SHA256])
    assert sha256_of(tmp_path / "file.csv.gz") == SHA256


def test_a_redirect_is_followed(site: Site, target: Path) -> None:
    site.pages["/here"] = Page(status=302, body=b"", location=site.url("/file.csv"))
    site.pages["/file.csv"] = Page()
    fetch([site.url("/here")], target, [SHA256])
    assert target.read_bytes() == BODY


def test_a_good_file_is_not_downloaded_again(site: Site, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(BODY)
    fetch([site.url("/file.csv")], target, [SHA256])
    assert site.requests == []


# ---- going on after a cut ----


def test_a_cut_connection_is_gone_on_with(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page(cuts=[300_000, 200_000])
    done: list[int] = []
    fetch([site.url("/file.csv")], target, [SHA256], progress=lambda bytes_done, _: done.append(bytes_done))
    assert target.read_bytes() == BODY
    assert site.ranges() == [None, "bytes=300000-", "bytes=500000-"]
    assert done == sorted(done)
    assert done[-1] == len(BODY)
    assert leftovers(target) == ["file.csv"]


def test_without_an_etag_the_date_vouches_for_the_version(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page(etag=None, last_modified="Wed, 21 Oct 2015 07:28:00 GMT", cuts=[300_000])
    fetch([site.url("/file.csv")], target, [SHA256])
    assert target.read_bytes() == BODY
    assert site.ranges() == [None, "bytes=300000-"]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_a_version_nobody_vouches_for_starts_again(site: Site, target: Path, etag: str | None) -> None:
    site.pages["/file.csv"] = Page(etag=etag, cuts=[300_000])
    fetch([site.url("/file.csv")], target, [SHA256])
    assert target.read_bytes() == BODY
    assert site.ranges() == [None, None]


def test_a_server_that_ignores_ranges_starts_again(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page(ranges=False, cuts=[300_000])
    fetch([site.url("/file.csv")], target, [SHA256])
    assert target.read_bytes() == BODY
    assert site.ranges() == [None, "bytes=300000-"]


@pytest.mark.parametrize("honours_if_range", [True, False])
def test_a_file_that_changed_meanwhile_starts_again(site: Site, target: Path, honours_if_range: bool) -> None:
    site.pages["/file.csv"] = Page(body=OTHER * 100, etag='"old"')
    with pytest.raises(KeyboardInterrupt):
        fetch([site.url("/file.csv")], target, [SHA256], progress=stop_after(2, KeyboardInterrupt))
    site.pages["/file.csv"] = Page(honours_if_range=honours_if_range)
    fetch([site.url("/file.csv")], target, [SHA256])
    assert target.read_bytes() == BODY


def test_a_part_larger_than_the_file_starts_again(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page(body=BODY * 2)
    with pytest.raises(KeyboardInterrupt):
        fetch([site.url("/file.csv")], target, [SHA256], progress=stop_after(7, KeyboardInterrupt))
    site.pages["/file.csv"] = Page()
    fetch([site.url("/file.csv")], target, [SHA256])
    assert target.read_bytes() == BODY


def test_an_interrupted_download_leaves_no_file_and_the_next_one_goes_on(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page()
    with pytest.raises(KeyboardInterrupt):
        fetch([site.url("/file.csv")], target, [SHA256], progress=stop_after(2, KeyboardInterrupt))
    assert not target.exists()
    fetch([site.url("/file.csv")], target, [SHA256])
    assert target.read_bytes() == BODY
    assert site.ranges() == [None, f"bytes={2 * download.CHUNK_BYTES}-"]


def test_a_damaged_part_is_dropped_and_all_is_fetched(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page()
    with pytest.raises(KeyboardInterrupt):
        fetch([site.url("/file.csv")], target, [SHA256], progress=stop_after(2, KeyboardInterrupt))
    part = target.with_name("file.csv.part")
    part.write_bytes(bytes(part.stat().st_size))
    fetch([site.url("/file.csv")], target, [SHA256])
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("text", ["", "[]", '{"url": 1}', "\x00"])
def test_an_unreadable_origin_starts_again(site: Site, target: Path, text: str) -> None:
    site.pages["/file.csv"] = Page()
    target.parent.mkdir()
    target.with_name("file.csv.part").write_bytes(b"what?")
    target.with_name("file.csv.part.json").write_text(text)
    fetch([site.url("/file.csv")], target, [SHA256])
    assert target.read_bytes() == BODY
    assert site.ranges() == [None]


def test_a_part_of_one_mirror_is_not_gone_on_with_at_another(site: Site, target: Path) -> None:
    site.pages["/one"] = Page(body=OTHER * 100, cuts=[300_000] * 3)
    site.pages["/two"] = Page()
    fetch([site.url("/one"), site.url("/two")], target, [SHA256])
    assert target.read_bytes() == BODY
    assert site.ranges()[-1] is None


# ---- failures ----


def test_a_wrong_checksum_leaves_nothing_and_is_named(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page(body=OTHER)
    with pytest.raises(DataError) as error:
        fetch([site.url("/file.csv")], target, [SHA256, "0" * 64])
    assert leftovers(target) == []
    for word in (hashlib.sha256(OTHER).hexdigest(), SHA256, "0" * 64, site.url("/file.csv")):
        assert word in str(error.value)
    assert len(site.requests) == 1  # the bytes would be the same again


def test_a_missing_page_falls_through_to_the_next_address(site: Site, target: Path) -> None:
    site.pages["/two"] = Page()
    fetch([site.url("/one"), site.url("/two")], target, [SHA256])
    assert target.read_bytes() == BODY


def test_a_wrong_file_falls_through_to_the_next_address(site: Site, target: Path) -> None:
    site.pages["/one"] = Page(body=OTHER)
    site.pages["/two"] = Page()
    fetch([site.url("/one"), site.url("/two")], target, [SHA256])
    assert target.read_bytes() == BODY


def test_all_addresses_failing_is_one_line_that_names_them(site: Site, target: Path) -> None:
    site.pages["/two"] = Page(failures=[503] * 9)
    with pytest.raises(DataError) as error:
        fetch([site.url("/one"), site.url("/two")], target, [SHA256], attempts=2, advice="do this instead")
    message = str(error.value)
    assert "\n" not in message
    for word in ("file.csv", site.url("/one"), "HTTP 404", site.url("/two"), "HTTP 503", "do this instead"):
        assert word in message
    assert [path for path, _ in site.requests] == ["/one", "/two", "/two"]
    assert not target.exists()


def test_a_busy_server_is_asked_again(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page(failures=[503, 429])
    fetch([site.url("/file.csv")], target, [SHA256])
    assert target.read_bytes() == BODY


def test_waits_grow_between_attempts(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download, "_BACKOFF_SECONDS", 1.0)
    monkeypatch.setattr(download.time, "sleep", waits.append)
    site.pages["/file.csv"] = Page(failures=[503] * 3)
    fetch([site.url("/file.csv")], target, [SHA256], attempts=4)
    assert [wait for wait in waits if wait] == [1.0, 2.0, 4.0]  # the server sleeps for 0 seconds


def test_a_connection_cut_too_often(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page(cuts=[1000] * 3)
    with pytest.raises(DataError, match=r"cut after 3000 of 1048576 bytes \(attempt 3 of 3\)"):
        fetch([site.url("/file.csv")], target, [SHA256])
    assert not target.exists()


def test_a_server_that_says_nothing(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page(chunk_delay_seconds=1.0)
    with pytest.raises(DataError, match="no answer in time"):
        fetch([site.url("/file.csv")], target, [SHA256], timeout_seconds=0.1, attempts=1)


def test_nobody_listening(site: Site, target: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as other:
        port = other.server_port
    with pytest.raises(DataError, match="no connection"):
        fetch([f"http://127.0.0.1:{port}/file.csv"], target, [SHA256])


def test_an_unknown_host(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_args: object, **_kwargs: object) -> None:
        raise download.socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(download.socket, "getaddrinfo", unknown)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DataError, match="the host was not found"):
        fetch(["http://data.invalid/file.csv"], target, [SHA256])


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1/file.csv", "file:///etc/hostname", "/etc/hostname", "data:,a", "http:"]
)
def test_other_kinds_of_address_are_refused(target: Path, url: str) -> None:
    with pytest.raises(DataError, match="only http and https"):
        fetch([url], target, [SHA256])
    assert not target.parent.exists()


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/file.csv", "file:///etc/hostname"])
def test_a_redirect_to_another_kind_of_address_is_refused(site: Site, target: Path, location: str) -> None:
    site.pages["/file.csv"] = Page(status=302, body=b"", location=location)
    with pytest.raises(DataError, match=location):
        fetch([site.url("/file.csv")], target)
    assert leftovers(target) == []


@pytest.mark.parametrize(("origin", "allowed"), [("https", False), ("http", True)])
def test_a_redirect_never_gives_up_encryption(origin: str, allowed: bool) -> None:
    request = download.urllib.request.Request(f"{origin}://a.test/")
    message = http.client.HTTPMessage()
    arguments = (request, open(download.os.devnull, "rb"), 302, "Found", message, "http://b.test/")  # noqa: SIM115
    with arguments[1]:
        if allowed:
            assert download._SafeRedirects().redirect_request(*arguments) is not None
        else:
            with pytest.raises(download._Refused, match="not followed"):
                download._SafeRedirects().redirect_request(*arguments)


@pytest.mark.parametrize("says_length", [True, False])
def test_a_file_over_the_limit_is_not_kept(site: Site, target: Path, says_length: bool) -> None:
    site.pages["/file.csv"] = Page(says_length=says_length)
    with pytest.raises(DataError, match=r"more than the 100000 (bytes )?accepted"):
        fetch([site.url("/file.csv")], target, max_bytes=100_000)
    assert leftovers(target) == []


def test_a_gz_that_unpacks_over_the_limit_is_not_kept(site: Site, tmp_path: Path) -> None:
    site.pages["/file.csv.gz"] = Page(body=gzip.compress(bytes(10**7)))
    with pytest.raises(DataError, match="more than the 100000 bytes"):
        fetch([site.url("/file.csv.gz")], tmp_path / "file.csv.gz", [SHA256], max_bytes=100_000)
    assert leftovers(tmp_path / "file.csv.gz") == []


def test_a_gz_that_is_none(site: Site, tmp_path: Path) -> None:
    site.pages["/file.csv.gz"] = Page()
    with pytest.raises(DataError, match="is not a whole gzip file"):
        fetch([site.url("/file.csv.gz")], tmp_path / "file.csv.gz", [SHA256])


def test_no_address(target: Path) -> None:
    with pytest.raises(DataError, match=r"cannot download file\.csv: no address"):
        fetch([], target)


def test_a_folder_that_cannot_be_made(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write .*TRELLIS_CACHE"):
        fetch([site.url("/file.csv")], tmp_path / "file" / "file.csv")


def test_a_full_disk(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_write_all", full)
    site.pages["/file.csv"] = Page()
    with pytest.raises(DataError, match=r"cannot write .*No space left on device.*free some space"):
        fetch([site.url("/file.csv")], target, [SHA256])
    assert not target.exists()


# ---- several at once ----


def test_threads_at_once_download_once(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page(chunk_delay_seconds=0.005)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            fetch([site.url("/file.csv")], target, [SHA256])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert target.read_bytes() == BODY
    assert len(site.requests) == 1


FETCH = """
import sys, pathlib
from trellis_ts.datasets.download import fetch
fetch([sys.argv[1]], pathlib.Path(sys.argv[2]), [sys.argv[3]])
"""


def start_process(site: Site, target: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", FETCH, site.url("/file.csv"), str(target), SHA256])


def test_processes_at_once_both_end_right(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page(chunk_delay_seconds=0.02)
    processes = [start_process(site, target) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert target.read_bytes() == BODY
    assert leftovers(target) == ["file.csv"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_process_holds_nobody_up(site: Site, target: Path) -> None:
    site.pages["/file.csv"] = Page(chunk_delay_seconds=0.2)
    process = start_process(site, target)
    part = target.with_name("file.csv.part")
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not target.exists()
    site.pages["/file.csv"].chunk_delay_seconds = 0.0
    fetch([site.url("/file.csv")], target, [SHA256])
    assert target.read_bytes() == BODY
    assert site.ranges()[-1] is not None


def test_a_file_system_without_locks(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_locked", lambda _: False)
    site.pages["/file.csv"] = Page(cuts=[300_000])
    fetch([site.url("/file.csv")], target, [SHA256])
    assert target.read_bytes() == BODY
    with pytest.raises(DataError):
        fetch([site.url("/none.csv")], target.with_name("none.csv"), [SHA256])
    assert leftovers(target) == ["file.csv"]


# ---- where files are looked for ----


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    own, cache = tmp_path / "own", tmp_path / "cache"
    own.mkdir()
    cache.mkdir()
    monkeypatch.setenv("TRELLIS_DATA", str(own))
    monkeypatch.setenv("TRELLIS_CACHE", str(cache))
    return own, cache


def put(path: Path, body: bytes = BODY) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    return path


@pytest.mark.parametrize("place", ["file.csv", "file.csv.gz", "some/file.csv", "some/file.csv.gz"])
def test_the_users_folder_comes_first(folders: tuple[Path, Path], place: str) -> None:
    put(folders[1] / "file.csv")
    expected = put(folders[0] / place)
    assert locate(["file.csv"], sha256s=[SHA256]) == expected


def test_a_plain_file_comes_before_a_packed_and_the_folder_before_its_subfolders(folders: tuple[Path, Path]) -> None:
    put(folders[0] / "some" / "file.csv")
    put(folders[0] / "file.csv.gz")
    expected = put(folders[0] / "file.csv")
    assert locate(["file.csv"], sha256s=[SHA256]) == expected


def test_deeper_folders_are_not_searched(folders: tuple[Path, Path]) -> None:
    put(folders[0] / "a" / "b" / "file.csv")
    with pytest.raises(DataError, match="was not found"):
        locate(["file.csv"], sha256s=[SHA256])


def test_a_file_by_another_of_its_names(folders: tuple[Path, Path]) -> None:
    expected = put(folders[0] / "other.csv")
    assert locate(["file.csv", "other.csv"], sha256s=[SHA256]) == expected


def test_looking_without_verifying(folders: tuple[Path, Path]) -> None:
    assert find_local(["file.csv"]) is None
    cached = put(folders[1] / "file.csv.gz", OTHER)
    assert find_local(["file.csv"]) == cached
    own = put(folders[0] / "some" / "file.csv", OTHER)
    assert find_local(["file.csv"]) == own


@pytest.mark.parametrize("name", ["file.csv", "file.csv.gz"])
def test_then_the_cache(folders: tuple[Path, Path], name: str) -> None:
    expected = put(folders[1] / name)
    assert locate(["file.csv"], sha256s=[SHA256], allow_download=False) == expected


def test_then_the_network_into_the_cache(folders: tuple[Path, Path], site: Site) -> None:
    site.pages["/raw/file.csv.gz"] = Page(body=gzip.compress(BODY))
    urls = [site.url("/raw/file.csv.gz?download=true"), site.url("/raw/file.csv.gz")]
    for _ in range(2):
        assert locate(["file.csv"], urls=urls, sha256s=[SHA256]) == folders[1] / "file.csv.gz"
    assert len(site.requests) == 2


@pytest.mark.parametrize("name", ["file.csv", "file.csv.gz"])
def test_a_wrong_file_of_the_users_is_refused_and_left_alone(folders: tuple[Path, Path], site: Site, name: str) -> None:
    wrong = put(folders[0] / name, OTHER)
    site.pages["/file.csv"] = Page()
    with pytest.raises(DataError) as error:
        locate(["file.csv"], urls=[site.url("/file.csv")], sha256s=[SHA256], homepage="https://home.test")
    for word in (str(wrong), hashlib.sha256(OTHER).hexdigest(), SHA256, "https://home.test", "TRELLIS_DATA"):
        assert word in str(error.value)
    assert wrong.exists()
    assert site.requests == []


def test_a_cut_gz_of_the_users_is_refused(folders: tuple[Path, Path]) -> None:
    (folders[0] / "file.csv.gz").write_bytes(gzip.compress(BODY)[:-20])
    with pytest.raises(DataError, match=r"file\.csv\.gz is not a whole gzip file"):
        locate(["file.csv"], sha256s=[SHA256])


def test_a_damaged_copy_in_the_cache_is_replaced(folders: tuple[Path, Path], site: Site) -> None:
    cached = put(folders[1] / "file.csv", OTHER)
    site.pages["/file.csv"] = Page()
    with pytest.raises(DataError, match="allow the download"):
        locate(["file.csv"], urls=[site.url("/file.csv")], sha256s=[SHA256], allow_download=False)
    assert locate(["file.csv"], urls=[site.url("/file.csv")], sha256s=[SHA256]) == cached
    assert cached.read_bytes() == BODY


def test_a_download_not_allowed(folders: tuple[Path, Path], site: Site) -> None:
    with pytest.raises(DataError) as error:
        locate(["file.csv"], urls=[site.url("/file.csv")], homepage="https://home.test", allow_download=False)
    for word in (*map(str, folders), "allow the download", "https://home.test", "TRELLIS_DATA"):
        assert word in str(error.value)
    assert site.requests == []


def test_a_failed_download_says_how_to_do_without(folders: tuple[Path, Path], site: Site) -> None:
    with pytest.raises(DataError) as error:
        locate(["file.csv"], urls=[site.url("/file.csv")], sha256s=[SHA256], homepage="https://home.test")
    advice = "download it by hand from https://home.test and put file.csv into the folder named by TRELLIS_DATA"
    assert advice in str(error.value)


def test_a_data_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRELLIS_DATA", str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"TRELLIS_DATA is .*missing.*not a folder"):
        data_folder()


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRELLIS_DATA", "")
    assert data_folder() is None


@pytest.mark.skipif(sys.platform != "linux", reason="the place for caches on Linux")
def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRELLIS_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("TRELLIS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "trellis_ts"
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert cache_folder() == tmp_path / ".cache" / "trellis_ts"
