import os
import stat
from pathlib import Path

import pytest

from tripletlib._cache import cache_folder, user_path, write_atomically

posix = pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")


@pytest.fixture
def umask():
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@posix
@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_gets_what_the_umask_gives(mask, expected, umask, tmp_path):
    umask(mask)
    write_atomically(tmp_path / "file", lambda stream: stream.write(b"new"))
    assert mode(tmp_path / "file") == expected


@posix
def test_a_file_that_is_replaced_keeps_its_permissions(umask, tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o640)
    write_atomically(tmp_path / "file", lambda stream: stream.write(b"new"))
    assert mode(tmp_path / "file") == 0o640
    assert (tmp_path / "file").read_bytes() == b"new"


@posix
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(exists, tmp_path):
    target = tmp_path / "folder" / "file"
    target.parent.mkdir()
    if exists:
        target.write_bytes(b"old")
    (tmp_path / "link").symlink_to(Path("folder") / "file")
    write_atomically(tmp_path / "link", lambda stream: stream.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert target.read_bytes() == b"new"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_name_may_be_as_long_as_the_system_takes(tmp_path):
    write_atomically(tmp_path / ("n" * 255), lambda stream: stream.write(b"new"))
    assert (tmp_path / ("n" * 255)).read_bytes() == b"new"


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_bytes(b"old")

    def half(stream):
        stream.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", half)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("TRIPLETLIB_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
    assert user_path("~/file") == tmp_path / "file"
    assert user_path("file") == Path("file")


def test_without_a_home_folder_that_is_said(monkeypatch):
    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    monkeypatch.delenv("TRIPLETLIB_CACHE")
    with pytest.raises(OSError, match="no home folder is known for"):
        cache_folder()
