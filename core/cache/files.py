"""The files below a cache directory: read whole, written atomically, every failure typed.

Foreign errors (`OSError`) are mapped here and nowhere else. Imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from vllmc.core.errors import UnsafeCacheError, VllmcError

SWEEP_AFTER_SECONDS = 24 * 3600

# More than any has, those of the largest models a tenth: what others planted must not take all
# memory before it is refused.
MOST_RECORD = 32 << 20
MOST_ARTIFACT = 2 << 30

_ATTEMPTS = 5

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST})
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_ELSEWHERE = "use another directory with --cache-dir or VLLMC_CACHE_DIR"
_REPAIR = "vllmc cache verify --repair"


class IrregularFile(Exception):
    """Something other than a plain file stands where one belongs; `str()` says what."""


class CorruptArtifact(UnsafeCacheError):
    """A blob whose contents are not those of its digest. `path` is the blob's."""

    def __init__(self, path: Path, *, expected: str, found: str) -> None:
        super().__init__(
            "corrupt-artifact",
            f"the artifact {path} is corrupt: expected SHA-256 {expected}, found {found}",
            context={"path": str(path), "expected": expected, "found": found},
            hint=_REPAIR,
        )
        self.path = path


class MissingArtifact(VllmcError):
    """An artifact that a record names and the cache does not hold."""

    def __init__(self, path: Path, *, digest: str) -> None:
        super().__init__(
            "missing-artifact",
            f"the artifact {digest} is not in the cache",
            context={"path": str(path), "digest": digest},
            hint=_REPAIR,
        )
        self.digest = digest


class CorruptRecordError(UnsafeCacheError):
    """A record file that cannot be what was written there. `path` is the file's."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            "corrupt-record",
            f"the record {path} is corrupt: {reason}",
            context={"path": str(path), "reason": reason},
            hint=_REPAIR,
        )
        self.path = path
        self.reason = reason


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the `OSError`s of reading `path` into `VllmcError`s; a missing file stays itself."""
    try:
        yield
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise VllmcError(
            "bad-cache-dir",
            f"{path} leads through something that is not a directory",
            context={"path": str(path)},
            hint=_ELSEWHERE,
        ) from error
    except PermissionError as error:
        raise VllmcError(
            "not-readable",
            f"{path} cannot be read: {error.strerror}",
            context={"path": str(path)},
            hint=f"make it readable for this user, or {_ELSEWHERE}",
        ) from error
    except OSError as error:
        raise _io_error(path, error) from error


@contextmanager
def writing(path: Path, *, elsewhere: str = _ELSEWHERE) -> Iterator[None]:
    """Turns the `OSError`s of writing `path` into `VllmcError`s.

    `elsewhere` is how to have it written to another place.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise VllmcError(
                "disk-full",
                f"there is no room to write {path}: {error.strerror}",
                context={"path": str(path)},
                hint=f"free some space, or {elsewhere}",
            ) from error
        if error.errno in _DENIED:
            raise VllmcError(
                "not-writable",
                f"{path} cannot be written: {error.strerror}",
                context={"path": str(path)},
                hint=elsewhere,
            ) from error
        raise _io_error(path, error, elsewhere) from error


def _io_error(path: Path, error: OSError, elsewhere: str = _ELSEWHERE) -> VllmcError:
    return VllmcError(
        "cache-io-error",
        f"{path} cannot be used: {error.strerror}",
        context={"path": str(path), "errno": errno.errorcode.get(error.errno or 0, "")},
        hint=f"check the file system, or {elsewhere}",
    )


@contextmanager
def open_plain(path: Path, *, through_links: bool = False) -> Iterator[BufferedReader]:
    """Opens a plain file for reading; `through_links`, also where a link leads to one.

    Raises `FileNotFoundError`, `IrregularFile` for a link, directory, pipe or device, and
    `VllmcError` for what `reading` maps.
    """
    links = 0 if through_links else os.O_NOFOLLOW
    with reading(path), _open_plain(path, os.O_RDONLY | links) as file:
        yield file


def open_to_lock(path: Path) -> BufferedReader:
    """Opens a plain file as `try_lock` takes it; raises what `open_plain` raises."""
    with reading(path):
        try:
            # Over NFS an exclusive lock takes a file that is open for writing.
            return _open_plain(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno not in _DENIED:
                raise
            return _open_plain(path, os.O_RDONLY | os.O_NOFOLLOW)


def try_lock(fd: int, kind: int) -> bool:
    """Locks an open file (`fcntl.LOCK_SH`, `LOCK_EX`) until it is closed; false where others have.

    On a file system without locks everybody has them.
    """
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _open_plain(path: Path, flags: int) -> BufferedReader:
    try:
        # O_NONBLOCK: a pipe in place of a file must be refused, not waited for.
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except IsADirectoryError:
        raise IrregularFile("not a plain file") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise IrregularFile("a symbolic link") from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise IrregularFile("not a plain file")
    return os.fdopen(fd, "rb")


def read_plain(path: Path) -> bytes:
    """The contents of a plain file; raises what `open_plain` raises."""
    return read_with_status(path)[0]


def read_record(path: Path) -> tuple[bytes, os.stat_result]:
    """As `read_with_status`, of a record, note or fact."""
    return read_with_status(path, MOST_RECORD)


def read_with_status(path: Path, most: int = MOST_ARTIFACT) -> tuple[bytes, os.stat_result]:
    """As `read_plain`, with what the open file says of itself: its owner and mode.

    Raises `IrregularFile`, too, for one of more than `most` bytes.
    """
    return _read(path, most, whole=True)


def read_beginning(path: Path, size: int) -> tuple[bytes, os.stat_result]:
    """As `read_with_status`, of a file of any size no more than its first `size` bytes."""
    return _read(path, size, whole=False)


def _read(path: Path, most: int, *, whole: bool) -> tuple[bytes, os.stat_result]:
    for _ in range(_ATTEMPTS):
        try:
            return _read_once(path, most, whole)
        except VllmcError as error:
            # Over NFS it was removed or replaced on another host while it was open.
            if error.context.get("errno") != "ESTALE":
                raise
    return _read_once(path, most, whole)


def _read_once(path: Path, most: int, whole: bool) -> tuple[bytes, os.stat_result]:
    with open_plain(path) as file:
        status = os.fstat(file.fileno())
        if whole and status.st_size > most:
            raise IrregularFile(f"larger than {most >> 20} MiB")
        # Memory is taken for as much as is asked for, whatever the file holds.
        return file.read(min(most, status.st_size + 1)), status


def plain_size(path: Path) -> int | None:
    """The size of a plain file in bytes; None where there is none."""
    try:
        with reading(path):
            status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def refresh(path: Path) -> bool:
    """Makes the file as young as one written now, if it is there; else returns False."""
    try:
        os.utime(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError:
        # A cache that cannot be written is not pruned either.
        pass
    return True


def make_directory(path: Path) -> None:
    """Makes `path` and its parents, each entry on disk before anything is written below it.

    What is made is this user's alone: a directory that others write to is not trusted.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    # One that another process made may be removed again by a prune, before it is looked at.
    for _ in range(_ATTEMPTS):
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        if path.is_dir():
            _sync_directory(path.parent)
            return
    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def write_plain(path: Path, data: bytes, *, temporary: Path) -> None:
    """Writes `path` so that a reader sees nothing, what was there before, or all of `data`.

    `temporary` is a directory on the same file system; files that dead processes left in it a day
    ago are removed. Raises `VllmcError` (`disk-full`, `not-writable`, `cache-io-error`), and then
    leaves no file of its own behind.
    """
    with writing(path):
        make_directory(path.parent)
        make_directory(temporary)
        draft = temporary / f"{os.getpid()}.{secrets.token_hex(8)}"
        try:
            # Whatever the umask: who may enter the directory reads, and none but its owner writes.
            with os.fdopen(os.open(draft, _NEW, 0o644), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                _sweep(temporary, os.fstat(file.fileno()).st_mtime)
            publish(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def publish(draft: Path, path: Path) -> None:
    """Moves a file that is on disk to where readers look; raises what `os.replace` does."""
    # A prune removes the directory of a program with the last of its records.
    for _ in range(_ATTEMPTS):
        try:
            draft.replace(path)
            break
        except FileNotFoundError:
            make_directory(path.parent)
    else:
        draft.replace(path)
    # Whoever removed it by now, with what was in it, need not wait for it.
    with suppress(FileNotFoundError):
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems cannot sync a directory; the rename is atomic all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _sweep(temporary: Path, now: float) -> None:
    # `now` is by the file system's clock: by this host's, what others write now may look old.
    oldest = now - SWEEP_AFTER_SECONDS
    for left in temporary.iterdir():
        with suppress(OSError):
            if left.lstat().st_mtime < oldest:
                left.unlink()
