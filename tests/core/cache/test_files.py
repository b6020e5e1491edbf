from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from vllmc.core.cache.files import (
    SWEEP_AFTER_SECONDS,
    IrregularFile,
    plain_size,
    read_plain,
    reading,
    write_plain,
    writing,
)
from vllmc.core.errors import VllmcError


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk-full"),
        (errno.EDQUOT, "disk-full"),
        (errno.EFBIG, "disk-full"),
        (errno.EACCES, "not-writable"),
        (errno.EPERM, "not-writable"),
        (errno.EROFS, "not-writable"),
        (errno.EIO, "cache-io-error"),
    ],
)
def test_a_failed_write_says_what_to_do_and_names_the_path(number, code):
    with pytest.raises(VllmcError) as caught, writing(Path("/cache/v1/blobs/x")):
        raise OSError(number, os.strerror(number))
    assert caught.value.code == code
    assert "/cache/v1/blobs/x" in caught.value.message
    assert os.strerror(number) in caught.value.message
    assert "--cache-dir" in caught.value.hint


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EACCES, "not-readable"),
        (errno.ENOTDIR, "bad-cache-dir"),
        (errno.EIO, "cache-io-error"),
    ],
)
def test_a_failed_read_names_the_path(number, code):
    with pytest.raises(VllmcError) as caught, reading(Path("/cache/v1")):
        raise OSError(number, os.strerror(number))
    assert caught.value.code == code
    assert "/cache/v1" in caught.value.message


def test_a_missing_file_is_left_to_the_reader(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "none")
    assert plain_size(tmp_path / "none") is None


def test_a_file_that_was_replaced_on_another_host_is_read_anew(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("new")
    calls: list[Path] = []
    opened, times = os.open, [1]

    def stale(name, *rest):
        calls.append(name)
        if len(calls) <= times[0]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opened(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", stale)
        assert read_plain(path) == b"new"
        times[0] = 1000  # a stale mount is an error
        with pytest.raises(VllmcError) as caught:
            read_plain(path)
    assert (caught.value.code, len(calls) < 30) == ("cache-io-error", True)


def test_a_link_a_directory_and_a_pipe_are_no_plain_files(tmp_path):
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "directory", "pipe"):
        with pytest.raises(IrregularFile):
            read_plain(tmp_path / name)
        assert plain_size(tmp_path / name) is None
    assert plain_size(tmp_path / "file") == 4


def test_a_write_replaces_the_whole_file_and_leaves_no_draft(tmp_path):
    target, temporary = tmp_path / "a" / "b" / "target", tmp_path / "tmp"
    write_plain(target, b"something longer", temporary=temporary)
    write_plain(target, b"short", temporary=temporary)
    assert target.read_bytes() == b"short"
    assert list(temporary.iterdir()) == []


def test_a_write_replaces_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"not ours")
    (tmp_path / "target").symlink_to(tmp_path / "elsewhere")
    write_plain(tmp_path / "target", b"ours", temporary=tmp_path / "tmp")
    assert (tmp_path / "elsewhere").read_bytes() == b"not ours"
    assert read_plain(tmp_path / "target") == b"ours"


def test_files_are_readable_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        write_plain(tmp_path / "target", b"shared", temporary=tmp_path / "tmp")
    finally:
        os.umask(before)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o640


def test_drafts_of_dead_processes_are_swept_after_a_day(tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    now = time.time()
    for name, age in (("old", SWEEP_AFTER_SECONDS + 600), ("young", SWEEP_AFTER_SECONDS - 600)):
        (temporary / name).write_bytes(b"half a fi")
        os.utime(temporary / name, (now - age, now - age))
    write_plain(tmp_path / "target", b"data", temporary=temporary)
    assert [path.name for path in temporary.iterdir()] == ["young"]


def test_a_directory_that_comes_and_goes_is_made_again(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def made_and_removed_by_others(path, mode=0o777):
        monkeypatch.setattr(Path, "mkdir", mkdir)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(Path, "mkdir", made_and_removed_by_others)
    write_plain(tmp_path / "x" / "y", b"it", temporary=tmp_path / "tmp")
    assert read_plain(tmp_path / "x" / "y") == b"it"


def test_a_path_below_a_file_is_not_writable(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(VllmcError) as caught:
        write_plain(tmp_path / "file" / "cache" / "x", b"data", temporary=tmp_path / "file" / "tmp")
    assert caught.value.code == "not-writable"
