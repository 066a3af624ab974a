"""Files that appear whole or not at all, and the names of devices."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from trellis_ts.devices import resolve_device
from trellis_ts.errors import ConfigError
from trellis_ts.files import atomic_file, check_writable


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "out.csv.gz"
    with atomic_file(path) as temporary:
        assert temporary.name.endswith(".csv.gz")
        assert not path.exists()
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["out.csv.gz"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ValueError("bad"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "out.csv"
    path.write_text("old")

    def write():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(ConfigError if isinstance(error, OSError) else type(error)) as caught:
        write()
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"cannot write {path}: ")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["out.csv"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "out.csv") as temporary:
            temporary.write_text("new")
    finally:
        assert os.umask(before) == umask
    assert stat.S_IMODE((tmp_path / "out.csv").stat().st_mode) == 0o666 & ~umask


def test_bad_places_are_refused_before_the_work(tmp_path):
    with pytest.raises(ConfigError, match="is a directory"):
        check_writable(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere.*create it first"):
        check_writable(tmp_path / "nowhere" / "out.csv")
    check_writable(tmp_path / "out.csv")
    assert list(tmp_path.iterdir()) == []


def test_devices():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "cuda:-1", "cpu:0", "mps:1", "", "CPU", "cuda:4096"])
def test_unknown_devices_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"device '{name}'"):
        resolve_device(name)
