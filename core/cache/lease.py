"""Leases: who does what, so that others need not do it too. Imports no torch.

A lease is a file that exists while somebody holds it; it says who. Nothing rests on it but time:
what is published is published whole (`files.write_plain`) whoever else does the same. So a lease
may be taken over from a holder that is dead, and, where that cannot be known, from one that has
not touched its file for `STALE_SECONDS` of the waiter's own monotonic clock. Clocks of different
hosts are never compared, and none is asked what time it is.

A lease is made by one process only, and removed by one that has a lock on its very file: so of
many that would succeed a holder one does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vllmc.core.cache.files import (
    IrregularFile,
    make_directory,
    open_to_lock,
    read_beginning,
    try_lock,
    writing,
)
from vllmc.core.errors import VllmcError

STALE_SECONDS: Final = 30.0
BEAT_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.2

# More than a lease is long; what is longer is none.
_LONGEST: Final = 4096
_FORM: Final = re.compile(
    rb"vllmc lease 1\n"
    rb"host ([\w.-]{0,255})\n"
    rb"system ([0-9a-f-]{0,64}) ([0-9]{0,20})\n"
    rb"process ([0-9]{1,9}) ([0-9]{0,20})\n"
    rb"nonce [0-9a-f]{32}\n"
)
# Zombies have ended, though nobody has asked how.
_ENDED: Final = ("Z", "X")
_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process: its host's name, which boot and PID namespace of it, its id and start time.

    `boot`, `namespace` and `started` are empty where there is no Linux `/proc`.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> Holder:
        """This process."""
        pid = os.getpid()
        _, started = _status(pid)
        namespace = ""
        with suppress(OSError):
            namespace = re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))
        return cls(
            host=re.sub(r"[^A-Za-z0-9_.-]", "-", os.uname().nodename)[:255],
            boot=_boot(),
            namespace=namespace,
            pid=pid,
            started=started,
        )

    @classmethod
    def parse(cls, contents: bytes) -> Holder | None:
        """Who wrote the lease; None for what is no lease of this format."""
        match = _FORM.fullmatch(contents)
        if match is None:
            return None
        host, boot, namespace, pid, started = (part.decode("ascii") for part in match.groups())
        if int(pid) == 0:
            return None
        return cls(host=host, boot=boot, namespace=namespace, pid=int(pid), started=started)

    def contents(self) -> bytes:
        """A lease of this process, unlike every other."""
        return (
            f"vllmc lease 1\nhost {self.host}\nsystem {self.boot} {self.namespace}\n"
            f"process {self.pid} {self.started}\nnonce {secrets.token_hex(16)}\n"
        ).encode("ascii")

    def dead(self, seen_from: Holder) -> bool:
        """Whether the process is known to be gone; false where that cannot be seen."""
        system = (seen_from.boot, seen_from.namespace)
        if "" in system or (self.boot, self.namespace) != system:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it is another user's, whose entry in /proc may be hidden
        state, started = _status(self.pid)
        if "" in (started, self.started):
            return state in _ENDED
        return state in _ENDED or started != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _status(pid: int) -> tuple[str, str]:
    """A process's state and start time, in the system's own units; empty where not known."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    # proc_pid_stat(5): the command, in parentheses, may hold anything; then fields 3, 4, ...
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]


class Lease:
    """A lease that is held, and kept alive by a thread, until `release`."""

    def __init__(self, path: Path, contents: bytes) -> None:
        self._path = path
        self._contents = contents
        self._process = os.getpid()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"lease {path.name}", daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            # What fails once may work the next time. A lease that was taken over is lost, and
            # its work is done twice.
            with suppress(OSError, VllmcError, IrregularFile):
                if _read(self._path)[0] == self._contents:
                    os.utime(self._path)

    def release(self) -> None:
        """Gives the lease up, if it is still held. Never fails: what is left behind goes stale."""
        if os.getpid() != self._process:
            return  # a fork's copy
        self._ended.set()
        self._heart.join()
        with suppress(OSError, VllmcError, IrregularFile):
            _withdraw(self._path, self._contents)


class Request:
    """What this process knows of a lease that it wants. Drafts are made in `temporary`."""

    def __init__(self, path: Path, *, temporary: Path) -> None:
        self.holder = "another process"
        """Who held it when it was last asked for."""
        self.path = path
        self._temporary = temporary
        self._seen: tuple[bytes, int] | None = None
        self._since = 0.0

    def attempt(self) -> Lease | None:
        """The lease, if nobody has it who is alive.

        Raises `VllmcError` (`not-writable`, `disk-full`, `not-readable`, `cache-io-error`).
        """
        us = Holder.this()
        contents = us.contents()
        with writing(self.path):
            make_directory(self.path.parent)
            make_directory(self._temporary)
            while True:
                try:
                    theirs = _read(self.path)
                except FileNotFoundError:
                    if _create(self.path, contents, self._temporary):
                        return Lease(self.path, contents)
                    continue  # another was faster
                except IrregularFile as error:
                    raise _in_the_way(self.path, error) from None
                if not self._given_up(theirs, us) or not self._withdrawn(theirs[0]):
                    return None

    def _given_up(self, theirs: tuple[bytes, int], us: Holder) -> bool:
        now = time.monotonic()
        if theirs != self._seen:
            self._seen, self._since = theirs, now
        holder = Holder.parse(theirs[0])
        self.holder = str(holder or "another process")
        return (holder is not None and holder.dead(us)) or now - self._since >= STALE_SECONDS

    def _withdrawn(self, contents: bytes) -> bool:
        # Who was stopped while it had the lock, or whose host died, has had its time as well.
        waited = time.monotonic() - self._since
        return _withdraw(self.path, contents, alone=waited < 2 * STALE_SECONDS)


@contextmanager
def held(request: Request, on_wait: Callable[[str], None], timeout: float | None) -> Iterator[None]:
    """Holds the lease; while others do, waits, and tells `on_wait` of each who it is.

    Raises what `Request.attempt` raises, and `lock-timeout` after `timeout` seconds (None: waits
    for ever).
    """
    lease = _obtain(request, on_wait, timeout)
    try:
        yield
    finally:
        lease.release()


def _obtain(request: Request, on_wait: Callable[[str], None], timeout: float | None) -> Lease:
    started = time.monotonic()
    told = ""
    while (lease := request.attempt()) is None:
        if request.holder != told:
            told = request.holder
            on_wait(told)
        if timeout is not None and time.monotonic() - started >= timeout:
            raise VllmcError(
                "lock-timeout",
                f"{request.holder} still holds {request.path} after {timeout:g} seconds",
                context={"path": str(request.path), "seconds": timeout},
                hint="wait for the other vllmc to finish, or stop it",
            )
        time.sleep(POLL_SECONDS)
    return lease


def _read(path: Path) -> tuple[bytes, int]:
    """A lease's contents, and its modification time, which says no more than that it changed.

    Opening it is what makes a client of NFS ask the server, rather than what it remembers.
    """
    contents, status = read_beginning(path, _LONGEST)
    return contents, status.st_mtime_ns


def _create(path: Path, contents: bytes, temporary: Path) -> bool:
    """Makes the lease, whole; false where there is one."""
    draft = temporary / f"{os.getpid()}.{secrets.token_hex(8)}"
    try:
        with draft.open("xb") as file:
            file.write(contents)
        try:
            path.hardlink_to(draft)
        except FileExistsError:
            # open(2): a server of NFS may have made the link and lost its answer.
            return draft.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_links(path, contents)
        return True
    finally:
        draft.unlink(missing_ok=True)


def _create_without_links(path: Path, contents: bytes) -> bool:
    """As `_create`; one who dies in between leaves an empty lease, which goes stale."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(contents)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _withdraw(path: Path, contents: bytes, *, alone: bool = True) -> bool:
    """Removes the lease with these contents, and no other; false while another does just that.

    Unless it is `alone` in that, it does not mind the other.
    """
    with suppress(FileNotFoundError), open_to_lock(path) as file:
        try:
            if file.read(_LONGEST) != contents:
                return True
        except OSError:
            return True  # over NFS it is gone by now, or the next look says what it is
        if not try_lock(file.fileno(), fcntl.LOCK_EX) and alone:
            return False
        # Before it was locked, others may have withdrawn it and made their own.
        if _read(path)[0] == contents:
            path.unlink()
    return True


def _in_the_way(path: Path, error: IrregularFile) -> VllmcError:
    return VllmcError(
        "not-writable",
        f"{path} cannot be written: {error} is in its place",
        context={"path": str(path)},
        hint="vllmc did not make it: vllmc cache verify --repair removes it",
    )
