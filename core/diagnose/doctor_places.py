"""Looks at directories for `vllmc doctor`: what they are, who may use them, what they lie on.

Imports no torch. Nothing is created or changed, and nothing raises for what it finds.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from vllmc.core.cache.files import SWEEP_AFTER_SECONDS, IrregularFile, read_record
from vllmc.core.cache.layout import Layout
from vllmc.core.cache.trust import Trust
from vllmc.core.diagnose.doctor_facts import Layer, Mount, Place, Role, Space, State
from vllmc.core.errors import VllmcError

MOUNTS: Final = Path("/proc/self/mountinfo")

_RECORDS: Final = frozenset({"units", "programs"})
_READ: Final = _RECORDS | {"blobs", "codes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A directory of the cache: its path, what was typed or set for it, and the origin of that."""

    path: Path
    given: str
    origin: str


def read_mounts(file: Path = MOUNTS) -> tuple[Mount, ...]:
    """The mounts of this process, in the order in which they were made; none without `/proc`."""
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ()
    return tuple(mount for line in lines if (mount := _parse_mount(line)) is not None)


def _parse_mount(line: str) -> Mount | None:
    # proc_pid_mountinfo(5): id, parent, device, root, point, options, optional fields, a hyphen,
    # type, source, options of the file system.
    before, hyphen, after = line.partition(" - ")
    first, second = before.split(" "), after.split(" ")
    if not hyphen or len(first) < 6 or len(second) < 3:
        return None
    options = {*first[5].split(","), *second[2].split(",")}
    return Mount(
        root=_unescape(first[3]),
        point=_unescape(first[4]),
        kind=second[0],
        options=tuple(sorted(options)),
    )


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def mount_of(path: str, mounts: tuple[Mount, ...]) -> Mount | None:
    """The mount that the resolved `path` lies on: the deepest, of two at one point the later."""
    over = [mount for mount in mounts if Path(path).is_relative_to(mount.point)]
    # `max` takes the first of equals.
    return max(reversed(over), key=lambda mount: len(mount.point), default=None)


def look_at(path: Path, mounts: tuple[Mount, ...]) -> Place:
    """What there is at an absolute path."""
    state, reason = _state(path)
    existing = path
    while existing != existing.parent and _state(existing)[0] != "directory":
        existing = existing.parent
    try:
        status = path.stat() if state == "directory" else None
    except OSError:
        status = None
    return Place(
        path=str(path),
        state=state,
        reason=reason,
        resolved=os.path.realpath(path),
        existing=str(existing),
        owner=None if status is None else status.st_uid,
        mode=None if status is None else stat.S_IMODE(status.st_mode),
        readable=state == "directory" and _may(path, os.R_OK | os.X_OK),
        writable=_may(existing, os.W_OK | os.X_OK),
        mount=mount_of(os.path.realpath(existing), mounts),
        space=_space(existing),
    )


def _state(path: Path) -> tuple[State, str]:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            return "not-a-directory", "a link to what is not there"
        return "missing", ""
    except NotADirectoryError:
        return "not-a-directory", "below a file"
    except OSError as error:
        return "unreachable", error.strerror or str(error)
    if stat.S_ISDIR(mode):
        return "directory", ""
    return "not-a-directory", "a file" if stat.S_ISREG(mode) else "no directory"


def _may(path: Path, access: int) -> bool:
    return os.access(path, access, effective_ids=os.access in os.supports_effective_ids)


def _space(path: Path) -> Space | None:
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return Space(
        free_bytes=found.f_bavail * found.f_frsize,
        total_bytes=found.f_blocks * found.f_frsize,
        free_inodes=found.f_favail,
        total_inodes=found.f_files,
    )


def look_into_layer(named: Named, *, role: Role, mounts: tuple[Mount, ...], trust: Trust) -> Layer:
    """What there is at one of the cache's directories, and how much is in it."""
    programs: dict[str, float] = {}
    untrusted = unreadable = 0
    leftovers: list[int] = []
    oldest = time.time() - SWEEP_AFTER_SECONDS
    try:
        for item in Layout(named.path).walk():
            status = _status(item.path)
            if status is None:
                continue
            if item.section == "programs":
                programs[item.key] = max(programs.get(item.key, 0.0), status.st_mtime)
            if item.section in _RECORDS:
                untrusted += _is_refused(item.path, status, named.path, trust)
            if item.section in _READ:
                unreadable += not _may(item.path, os.R_OK)
            elif item.section == "tmp" and status.st_mtime < oldest:
                leftovers.append(status.st_size)
    except VllmcError:  # a directory that this user may not list, or a file in place of one
        unreadable += 1
    return Layer(
        place=look_at(named.path, mounts),
        given=named.given,
        origin=named.origin,
        role=role,
        programs=len(programs),
        newest=max(programs.values(), default=None),
        untrusted=untrusted,
        unreadable=unreadable,
        leftovers=len(leftovers),
        leftover_bytes=sum(leftovers),
    )


def _is_refused(path: Path, status: os.stat_result, root: Path, trust: Trust) -> bool:
    """Whether a record would not be used for want of trust, were nothing unsigned allowed."""
    strict = replace(trust, unsigned=False)
    if not (strict.doubt(status) or strict.doubt_of(root)):
        return False
    try:
        strict.check(path, read_record(path)[0], status, root)
    except (IrregularFile, FileNotFoundError):  # of no use for another reason
        return False
    except VllmcError as error:
        return error.code != "not-readable"
    return False


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:  # removed while we looked
        return None
