"""What is noted when a program is used, and how it is held while it runs. Imports no torch.

A program has one such file, `v1/used/<key>`. Its modification time is the last use. A line is
appended for each use, with what it found and compiled and a checksum; when the file has grown to
`FOLD_AT` bytes its lines are replaced by their sum. Damage, and writers on several hosts of a
network file system, cost counts and nothing else: what cannot be written is not noted, and what
cannot be read is not counted.

Who runs a program has a shared lock on the file, which the kernel drops when the process ends. So
the file is never replaced by another: it is folded in place, and removed under an exclusive lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vllmc.core.cache.files import IrregularFile, open_plain, open_to_lock, try_lock
from vllmc.core.errors import VllmcError

FOLD_AT: Final = 16 * 1024
"""The size in bytes at which the lines of a file are added up."""

_READ_AT_MOST: Final = 8 * FOLD_AT
_ATTEMPTS: Final = 50
_CLAIM_ATTEMPTS: Final = 4
_PAUSE_SECONDS: Final = 0.005
_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LINE = re.compile(rb"((\d{1,18}) (\d{1,18}) (\d{1,18}) (\d{1,15}\.\d{3})) ([0-9a-f]{8})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What uses of a program found: numbers of compile units, as `warm` counts them.

    `hits` were stored, `misses` had to be compiled; `dups` are those misses whose generated code
    was stored under another key. `seconds_saved` is what compiling the hits took once, in
    milliseconds' precision.
    """

    hits: int = 0
    misses: int = 0
    dups: int = 0
    seconds_saved: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        """The counts of both."""
        return Counts(
            hits=self.hits + other.hits,
            misses=self.misses + other.misses,
            dups=self.dups + other.dups,
            seconds_saved=round(self.seconds_saved + other.seconds_saved, 3),
        )


class Hold:
    """Keeps `cache prune` from removing a program, until it is released or forgotten."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def release(self) -> None:
        """Lets go, at once and for good."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __del__(self) -> None:
        self.release()


def note(path: Path, counts: Counts) -> Hold | None:
    """Notes a use in the file `path` now, and holds it; never raises for what a disk can cause.

    The directory above that of `path` must be there. A file that cannot be written is held all
    the same; None where there is none, and where a prune is about to remove it.
    """
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
    for _ in range(_ATTEMPTS):
        try:
            fd = _open(path)
        except OSError:
            return None
        if _is_lasting(fd, path):
            try:
                _append(fd, counts)
            except OSError:
                # A full disk may still take the time.
                with suppress(OSError):
                    os.utime(fd)
            return Hold(fd)
        os.close(fd)
        time.sleep(_PAUSE_SECONDS)
    return None


def last_use(path: Path) -> float | None:
    """When the program was last used, by the file system's clock; None where that is unknown."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return None


def read_counts(path: Path) -> Counts:
    """The sum of what is noted in the file `path`, as far as it can be read."""
    try:
        with open_plain(path) as file:
            return _sum(file.read(_READ_AT_MOST))
    except (OSError, IrregularFile, VllmcError):
        return Counts()


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether nobody holds the program whose file is `path`; while the block runs nobody can.

    Where there is no such file, or the file system has no locks, nobody does. Raises what
    `files.open_to_lock` does.
    """
    try:
        file = open_to_lock(path)
    except (FileNotFoundError, IrregularFile):
        yield True
        return
    with file:
        yield _claim(file.fileno())


def _claim(fd: int) -> bool:
    # Another prune that asks the same has it for a moment only.
    for _ in range(_CLAIM_ATTEMPTS):
        if try_lock(fd, fcntl.LOCK_EX):
            return True
        time.sleep(_PAUSE_SECONDS)
    return False


def _open(path: Path) -> int:
    """Raises `OSError` also for what is no plain file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _FLAGS, 0o644)
        if os.fstat(fd).st_nlink > 1:
            # Where others may write, this may be any file of this user's: it is not written.
            os.close(fd)
            fd = os.open(path, os.O_RDONLY | _FLAGS)
    except OSError:
        # A shared lock takes no more.
        fd = os.open(path, os.O_RDONLY | _FLAGS)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
    return fd


def _is_lasting(fd: int, path: Path) -> bool:
    """Locks the open file, and makes sure that `path` still leads to it."""
    if not try_lock(fd, fcntl.LOCK_SH):
        return False
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except OSError:
        return False


def _append(fd: int, counts: Counts) -> None:
    line = _line(counts)
    os.write(fd, line)
    end = os.lseek(fd, 0, os.SEEK_CUR)
    if end > _READ_AT_MOST:
        # Whoever wrote that, it was not this module.
        os.ftruncate(fd, 0)
        os.write(fd, line)
    elif end // FOLD_AT != (end - len(line)) // FOLD_AT:
        # Of many writers only one sees its own line cross the limit: nothing is added up twice.
        total = _sum(os.pread(fd, _READ_AT_MOST, 0))
        # In this order: a process that dies in between loses counts and doubles none.
        os.ftruncate(fd, 0)
        os.write(fd, _line(total))


def _line(counts: Counts) -> bytes:
    text = f"{counts.hits} {counts.misses} {counts.dups} {counts.seconds_saved:.3f}"
    data = text.encode("ascii")
    return b"%s %08x\n" % (data, zlib.crc32(data))


def _sum(data: bytes) -> Counts:
    total = Counts()
    for line in data.splitlines():
        match = _LINE.fullmatch(line)
        if match is not None and zlib.crc32(match[1]) == int(match[6], 16):
            total += Counts(
                hits=int(match[2]),
                misses=int(match[3]),
                dups=int(match[4]),
                seconds_saved=float(match[5]),
            )
    return total
