"""Downloads that are not whole yet: what has come is kept, and gone on from. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO, Final

from vllmc.core.cache.files import make_directory
from vllmc.core.cache.remote import Reading

# What a download leaves free.
_SPARE: Final = 64 << 20
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def beginning(temporary: Path, digest: str) -> Iterator[tuple[Path, BufferedRandom]]:
    """The beginning of an artifact, which the next pull goes on from where this one breaks off.

    Where another process is at it, one of this process's own, which is gone in the end.
    """
    make_directory(temporary)
    path = temporary / f"{digest}.part"
    file = _locked(path)
    if file is not None:
        with file:
            yield path, file
        return
    path = temporary / f"{digest}.{secrets.token_hex(8)}.part"
    try:
        with path.open("x+b") as own:
            yield path, own
    finally:
        path.unlink(missing_ok=True)


def copy(source: Reading, target: BinaryIO, chunk: int, size: int | None) -> None:
    """Copies what is left of `source`; of a file of `size` bytes no more than that."""
    at = target.tell()
    free = max(0, shutil.disk_usage(target.fileno()).free - _SPARE)
    last = at + free if size is None else max(at, size)
    if last > at + free:
        raise _full(target)
    while block := source.read(min(chunk, last - at)):
        target.write(block)
        at += len(block)
    if size is None and at == last:
        raise _full(target)


def _full(target: BinaryIO) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target.name)


def _locked(path: Path) -> BufferedRandom | None:
    """The file at `path`, made where there is none; None where another process holds it."""
    with suppress(OSError):
        file = os.fdopen(os.open(path, _NEW, 0o644), "r+b")
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            opened, there = os.fstat(file.fileno()), path.lstat()
            # Who held it before may have published it since: what is opened is then an artifact.
            same = (opened.st_dev, opened.st_ino) == (there.st_dev, there.st_ino)
            mine = opened.st_uid == os.geteuid() and opened.st_nlink == 1
            if same and mine and stat.S_ISREG(opened.st_mode):
                return file
        file.close()
    return None
