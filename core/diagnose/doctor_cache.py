"""The checks of `vllmc doctor` on where the cache lies. Imports no torch."""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Final

from vllmc.core.diagnose.doctor_facts import Facts, Layer, Mount, Space
from vllmc.core.diagnose.doctor_table import Finding, found

IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
LAYERED: Final = frozenset({"overlay", "aufs", "fuse.fuse-overlayfs"})
OBJECT_STORES: Final = frozenset(
    f"fuse.{name}" for name in ("blobfuse2", "gcsfuse", "goofys", "mountpoint-s3", "rclone", "s3fs")
)
NETWORK: Final = frozenset(
    {
        *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"),
        *("orangefs", "smb3", "wekafs"),
        *("fuse.ceph-fuse", "fuse.glusterfs", "fuse.juicefs", "fuse.sshfs"),
    }
)
FULL: Final = (16 * 10**6, 100)
"""Bytes and inodes: a disk with less than these left is full."""

LOW: Final = (10**9, 10_000)
"""Bytes and inodes: a disk with less than these left will soon be full."""

_TEMPORARY: Final = ("/tmp", "/var/tmp")
_POD_VOLUME: Final = "kubernetes.io~empty-dir"
_NO_NAME: Final = 64
_USABLE: Final = ("directory", "missing")


def check_place(facts: Facts) -> Iterator[Finding]:
    """Whether what is written to the cache is there at the next start."""
    layer = facts.layers[0]
    path, mount = layer.place.path, layer.place.mount
    elsewhere = _elsewhere(facts, layer)
    if mount is not None and mount.kind in IN_MEMORY:
        where = f"{path} lies on {mount.kind}, mounted at {mount.point}"
        yield found("cache-in-memory", where, elsewhere)
    elif below := _temporary_directory(facts, layer.place.resolved):
        yield found("cache-in-temporary-directory", f"{path} lies below {below}", elsewhere)
    if mount is None:
        return
    if _POD_VOLUME in mount.root:
        yield found(
            "cache-in-pod-volume",
            f"{path} lies in an emptyDir, mounted at {mount.point}",
            f"mount a PersistentVolumeClaim at {mount.point} in its place",
        )
    elif _is_anonymous(mount):
        yield found(
            "cache-in-anonymous-volume",
            f"{path} lies in a volume without a name, mounted at {mount.point}",
            _with_volume(facts, mount.point),
        )
    else:
        yield from _check_root(facts, layer, mount)
    if mount.kind in OBJECT_STORES:
        yield found("cache-on-object-store", f"{path} lies on {mount.kind}", elsewhere)


def _check_root(facts: Facts, layer: Layer, mount: Mount) -> Iterator[Finding]:
    """Whether the cache lies on what a container's image became."""
    path = layer.place.path
    layered = mount.kind in LAYERED
    if not layered and not (facts.container and mount.point == "/"):
        return
    where = f"{path} lies on the root file system of a container ({mount.kind})"
    if layer.programs and not _added(facts, layer):
        yield found("cache-in-image", f"{where} and holds programs", "")
        return
    if layer.programs:
        where += ", and this container added programs to it"
    if facts.container == "Kubernetes":
        fix = f"mount a PersistentVolumeClaim at {path}"
    else:
        fix = _with_volume(facts, path)
    fix += ", or vllmc warm in a step of the image's build"
    yield found("cache-in-container-layer" if layered else "cache-in-container-root", where, fix)


def _with_volume(facts: Facts, path: str) -> str:
    program = "podman" if facts.container == "Podman" else "docker"
    return f"{program} run -v vllmc-cache:{shlex.quote(path)} ..."


def _added(facts: Facts, layer: Layer) -> bool:
    """Whether a program was written after the container started: it came with no image."""
    if facts.started is None or layer.newest is None:
        return False
    return layer.newest > facts.started


def _temporary_directory(facts: Facts, path: str) -> str | None:
    known = [*_TEMPORARY]
    if facts.temporary_files is not None:
        known.append(facts.temporary_files)
    return next((top for top in known if PurePath(path).is_relative_to(top)), None)


def _is_anonymous(mount: Mount) -> bool:
    """Whether Docker or Podman made the volume and named it by 64 hex digits."""
    match PurePath(mount.root).parts[-3:]:
        case ("volumes", name, "_data"):
            return len(name) == _NO_NAME and not name.strip("0123456789abcdef")
    return False


def check_network(facts: Facts) -> Iterator[Finding]:
    """Which directories of the cache lie on a network file system."""
    for layer in facts.layers:
        mount = layer.place.mount
        if mount is not None and mount.kind in NETWORK:
            yield found("cache-on-network", f"{layer.place.path} lies on {mount.kind}", "")


def check_name(facts: Facts) -> Iterator[Finding]:
    """Whether the next start means the same directories by what was set."""
    for layer in facts.layers:
        given = layer.given
        if "$" in given:
            what = f"{_source(layer)} says {given}, and nobody put a value for the variable"
            yield found("cache-path-unexpanded", what, "write the path out")
        elif given and not given.startswith("~") and not Path(given).is_absolute():
            what = f"{_source(layer)} says {given}, which is {layer.place.path} here"
            yield found("cache-path-relative", what, _setting(facts, layer, layer.place.path))


def check_user(facts: Facts) -> Iterator[Finding]:
    """Whether another user, or another home, would have the same directory."""
    layer = facts.layers[0]
    if layer.origin != "default" and not layer.given.startswith("~"):
        return
    path, user = layer.place.path, facts.user
    named = f"export VLLMC_CACHE_DIR={shlex.quote(path)}"
    if user.home is None:
        yield found("home-unset", f"HOME is not set; the cache is {path}", named)
        return
    if user.sudo_user and user.uid == 0:
        yield found(
            "cache-of-root-by-sudo",
            f"{user.sudo_user} runs this by sudo, and the cache is {path}",
            f"run it without sudo, or {_setting(facts, layer, 'DIR')}",
        )
    elif layer.origin == "default":
        name = user.name or f"user id {user.uid}"
        what = f"{path} is the default for {name} with HOME={user.home}"
        yield found("cache-by-default", what, f"{named}, where it is warmed and where it is used")


def check_access(facts: Facts) -> Iterator[Finding]:
    """Whether each directory is one, and can be read; whether the first can be written to."""
    for layer in facts.layers:
        place = layer.place
        if place.state == "not-a-directory":
            what = f"{place.path} is {place.reason}"
            yield found("cache-not-a-directory", what, _elsewhere(facts, layer))
        elif place.state == "unreachable" or (place.state == "directory" and not place.readable):
            what = f"{place.path}: {place.reason or 'this user may not list it'}"
            closed = place.state == "directory" or place.reason == os.strerror(errno.EACCES)
            fix = _as_owner(facts, layer) if closed else _elsewhere(facts, layer)
            yield found("cache-not-readable", what, fix)
        elif place.state == "directory" and layer.unreadable:
            what = f"{_files(layer.unreadable)} below {place.path} cannot be read by this user"
            yield found("cache-not-readable", what, _as_owner(facts, layer))
        elif place.state == "missing" and layer.role == "read":
            what = f"{place.path}, named by {_source(layer)}, does not exist"
            yield found("cache-layer-missing", what, f"mount it, or correct {_source(layer)}")
    first = facts.layers[0]
    if first.place.state in _USABLE and not first.place.writable:
        yield _unwritable(facts, first)


def _unwritable(facts: Facts, layer: Layer) -> Finding:
    place = layer.place
    read_only = place.mount is not None and "ro" in place.mount.options
    what = f"this user cannot write to {place.existing}"
    if read_only:
        what = f"{place.existing} is mounted read-only"
    if _programs(facts):
        return found("cache-read-only", what, "")
    fix = _elsewhere(facts, layer) if read_only else _as_owner(facts, layer)
    return found("cache-not-writable", what, fix)


def check_trust(facts: Facts) -> Iterator[Finding]:
    """Whether what is stored would be used: others may have written it, and nobody signed it."""
    for layer in facts.layers:
        doubts = tuple(_doubts(facts, layer))
        if facts.trust_unsigned and (doubts or layer.untrusted):
            what = f"others may have written {layer.place.path}, and --trust-unsigned is in force"
            yield found(
                "unsigned-is-used", what, "sign it (vllmc warm --sign-key), and trust the key"
            )
        elif layer.untrusted or not layer.programs:
            # What is signed is used wherever it lies.
            yield from doubts
            if layer.untrusted and not doubts:
                path = shlex.quote(layer.place.path)
                what = f"{_files(layer.untrusted)} below {layer.place.path} can be others' work"
                fix = f"chown -R {facts.user.uid} {path} && chmod -R go-w {path}"
                yield found("cache-files-not-trusted", what, fix)


def _doubts(facts: Facts, layer: Layer) -> Iterator[Finding]:
    """Why a directory of the cache is not trusted: the rules of `vllmc.core.cache.trust`."""
    place = layer.place
    path = shlex.quote(place.path)
    if place.owner is not None and place.owner not in (0, facts.user.uid):
        yield found(
            "cache-of-another-user",
            f"{place.path} belongs to user id {place.owner}, and this runs as {facts.user.uid}",
            f"chown -R {facts.user.uid} {path}",
        )
    if place.mode is not None and place.mode & 0o022:
        who = "everyone" if place.mode & 0o002 else "its group"
        what = f"{place.path} can be written by {who} (mode {place.mode:04o})"
        yield found("cache-writable-by-others", what, f"chmod go-w {path}")


def check_contents(facts: Facts) -> Iterator[Finding]:
    """Whether there is anything in the cache, and anything that should not be."""
    open_to_us = all(
        layer.place.state in _USABLE and not layer.unreadable for layer in facts.layers
    )
    if open_to_us and not _programs(facts):
        paths = ", ".join(layer.place.path for layer in facts.layers)
        yield found("cache-empty", f"no program in {paths}", "vllmc warm MODEL")
    for layer in facts.layers:
        if layer.leftovers:
            what = (
                f"{layer.place.path} has {_files(layer.leftovers)} that nobody finished, "
                f"{layer.leftover_bytes} bytes in all"
            )
            yield found("cache-leftovers", what, "")


def check_room(facts: Facts) -> Iterator[Finding]:
    """Whether there is room for what is to be stored."""
    layer = facts.layers[0]
    space = layer.place.space
    # What cannot be written to is another finding's, and says it is full where it is read-only.
    if space is None or not layer.place.writable:
        return
    left = f"{space.free_bytes // 10**6} MB and {space.free_inodes} inodes are left"
    if not space.total_inodes:
        left = f"{space.free_bytes // 10**6} MB are left"
    for kind, least in (("cache-disk-full", FULL), ("cache-disk-low", LOW)):
        if _is_below(space, least):
            yield found(kind, f"{layer.place.path}: {left}", _elsewhere(facts, layer))
            return


def _is_below(space: Space, least: tuple[int, int]) -> bool:
    few = space.total_inodes > 0 and space.free_inodes < least[1]
    return few or space.free_bytes < least[0]


def check_ci(facts: Facts) -> Iterator[Finding]:
    """What CI has to keep."""
    if facts.ci:
        path = facts.layers[0].place.path
        yield found("ci-runner", f"this is a job of {facts.ci}", f"save and restore {path}")


def _programs(facts: Facts) -> int:
    return sum(layer.programs for layer in facts.layers)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _source(layer: Layer) -> str:
    """Who named the directory, in words."""
    kind, _, name = layer.origin.partition(":")
    return {"flag": "--cache-dir", "default": "the default"}.get(kind, name)


def _setting(facts: Facts, layer: Layer, path: str) -> str:
    """How to name another directory where this one was named, the layers beside it as they are."""
    kind, _, name = layer.origin.partition(":")
    paths = [path if other is layer else other.place.path for other in facts.layers]
    if kind == "file":
        listed = json.dumps(paths if len(paths) > 1 else path)
        return f"cache-dir = {listed} in {name}"
    words = [shlex.quote(text) for text in paths]
    if kind == "flag":
        return " ".join(f"--cache-dir {word}" for word in words)
    return f"export VLLMC_CACHE_DIR={':'.join(words)}"


def _elsewhere(facts: Facts, layer: Layer) -> str:
    named = _setting(facts, layer, "DIR")
    return f"{named}, with DIR on a disk or a volume that this user can write to"


def _as_owner(facts: Facts, layer: Layer) -> str:
    return f"run it as the owner of {layer.place.existing}, or {_setting(facts, layer, 'DIR')}"
