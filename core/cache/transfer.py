"""Programs to a remote and from it; only what is missing moves. Imports no torch.

What a record says is used once a trusted key signed it, and published once all that it names is
here, in the order in which `warm` stores: artifacts, units, programs. A process or connection that
dies in between leaves nothing that refers to what is not there, and what has come is kept.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vllmc.core.cache.exchange import (
    Vouched,
    artifacts_of,
    blob_path,
    note_import,
    path_of,
    unit_path,
    units_of,
    vouch,
)
from vllmc.core.cache.files import make_directory, publish, read_record, writing
from vllmc.core.cache.key import sha256_hex
from vllmc.core.cache.layout import section_of
from vllmc.core.cache.partial import beginning, copy
from vllmc.core.cache.record import (
    CorruptRecord,
    FormatTooNew,
    ProgramRecord,
    UnitRecord,
    decode,
    encode,
)
from vllmc.core.cache.remote import Connection, CorruptRemote, Remote
from vllmc.core.cache.signing import Signature, split
from vllmc.core.cache.store import Store
from vllmc.core.cache.trust import Untrusted
from vllmc.core.cache.trust_store import trusts
from vllmc.core.errors import UnsafeCacheError, VllmcError
from vllmc.core.events import Observer

_PREFIX: Final = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """How many files moved, of how many bytes, and how many were there already.

    `programs` are the keys of what is there now, and `refused` what was not used, and why.
    """

    files: int
    bytes: int
    skipped: int
    programs: tuple[str, ...]
    refused: tuple[UnsafeCacheError, ...] = ()


def push(
    remote: Remote, store: Store, programs: Iterable[ProgramRecord], observer: Observer
) -> Moved:
    """Sends what the remote lacks of these programs: artifacts, then units, then programs.

    Records are signed by `store.signing`, else they stay as they are. One that is there is left
    unless it cannot be used. Raises `VllmcError` (`missing-unit`, `missing-artifact`), what
    `Remote.connect` and `Connection` raise, and what reading a store does.
    """
    observer.stage(f"push to {remote.name}")
    connection = remote.connect()
    programs = tuple(programs)
    units = units_of(store, programs)
    sent: list[int] = []
    skipped = 0
    digests = artifacts_of(programs, units)
    for number, digest in enumerate(digests, start=1):
        path = blob_path(digest)
        if (size := store.artifact_size(digest)) is not None and connection.size(path) == size:
            skipped += 1
            continue
        data = store.read_artifact(digest)
        observer.stage(f"push artifact {number} of {len(digests)}, {_told(len(data))}")
        connection.write(path, data)
        sent.append(len(data))
    records: tuple[UnitRecord | ProgramRecord, ...] = (*units, *programs)
    for record in records:
        path = path_of(record)
        data = _as_stored(store, record, path)
        if _stands(connection, path, store, split(data)[1], digests):
            skipped += 1
            continue
        connection.write(path, data)
        sent.append(len(data))
    return Moved(
        files=len(sent),
        bytes=sum(sent),
        skipped=skipped,
        programs=tuple(sorted({program.key for program in programs})),
    )


def pull(
    remote: Remote,
    store: Store,
    names: Sequence[str],
    observer: Observer,
    accept: Callable[[ProgramRecord], bool] = lambda _: True,
) -> Moved:
    """Fetches what the store lacks of these programs (none: of all), where `accept` takes them.

    A name is a key, its first 8 or more hex digits, or a model. One program that is refused does
    not stop the others. Raises `Untrusted` where the store could not be used afterwards,
    `VllmcError` (`unknown-key`, `ambiguous-key`), what `Remote.connect` and `Connection` raise, and
    what writing does.
    """
    store.check_writable()
    prefixes = {name.lower() for name in names if _PREFIX.fullmatch(name.lower())}
    models = {name for name in names if name.lower() not in prefixes}
    # It may take until the remote is given up.
    observer.stage(f"pull from {remote.name}")
    puller = _Puller(remote.connect(), store, observer)
    paths = puller.listed(() if models else sorted(prefixes))
    for prefix in sorted(prefixes):
        _check_one(remote, prefix, {section_of(path)[1] for path in paths})
    refused: list[UnsafeCacheError] = []
    others: list[UnsafeCacheError] = []
    seen: set[str] = set()
    for path in paths:
        meant = not names or section_of(path)[1].startswith(tuple(prefixes))
        try:
            record, came = puller.program(path)
            meant = meant or record.model in models
            if meant and accept(record):
                seen.add(record.model)
                puller.fetch(record, came)
        except UnsafeCacheError as error:
            # Which model it is of is not known, of a record that is refused.
            (refused if meant else others).append(error)
    if lacking := sorted(models - seen):
        raise others[0] if others else _unknown(remote, lacking[0])
    return puller.moved(refused)


@contextmanager
def downloaded(remote: Remote, store: Store, observer: Observer) -> Iterator[Path]:
    """The file that a URL names, in the store's temporary directory while the block runs.

    Raises `Untrusted` where the store could not be used afterwards, `VllmcError` (`no-bundle`,
    `disk-full`) and what `Remote.connect` and `Connection` do.
    """
    store.check_writable()
    temporary = store.layout.temporary
    path = temporary / f"{os.getpid()}.{secrets.token_hex(8)}"
    observer.stage(f"fetch {remote.name}")
    try:
        with writing(path):
            make_directory(temporary)
            _download(remote, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _download(remote: Remote, path: Path) -> None:
    try:
        with remote.connect().open("") as source, path.open("xb") as target:
            copy(source, target, remote.chunk, None)
    except FileNotFoundError:
        raise VllmcError(
            "no-bundle",
            f"there is no bundle {remote.name}",
            context={"bundle": remote.name},
            hint="vllmc cache export KEY -o FILE writes one",
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Came:
    """A record's file as it came, and why it is used."""

    raw: bytes
    vouched: Vouched


class _Puller:
    """Fetches programs into a store, and counts."""

    def __init__(self, connection: Connection, store: Store, observer: Observer) -> None:
        self._connection = connection
        self._store = store
        self._observer = observer
        # By path. What programs share is fetched for the first of them.
        self._fetched: dict[str, int] = {}
        self._here: set[str] = set()
        self._programs: set[str] = set()

    def listed(self, prefixes: Sequence[str]) -> tuple[str, ...]:
        """The paths of the programs whose keys begin so; without prefixes, of all."""
        programs = self._connection.programs
        return tuple(dict.fromkeys(path for p in prefixes or ("",) for path in programs(p)))

    def program(self, path: str) -> tuple[ProgramRecord, _Came]:
        """The record at `path`, and how it came. Raises `CorruptRemote` and `Untrusted`."""
        record, came = self._record(path)
        assert isinstance(record, ProgramRecord)
        return record, came

    def fetch(self, record: ProgramRecord, came: _Came) -> None:
        """Fetches what the store lacks of a program, and publishes it."""
        store = self._store
        units: list[tuple[UnitRecord, _Came]] = []
        sizes: dict[str, int | None] = {unit.artifact: None for unit in record.units}
        for key in sorted({unit.key for unit in record.units}):
            path = unit_path(key)
            # Programs that were here already name the artifact of theirs.
            unit = store.usable_unit(key)
            if unit is None:
                fetched, unit_came = self._record(path)
                assert isinstance(fetched, UnitRecord)
                unit = fetched
                units.append((unit, unit_came))
            else:
                self._here.add(path)
                if unit.artifact not in sizes:
                    continue
            sizes[unit.artifact] = unit.bytes
        missing = [digest for digest in sorted(sizes) if not _holds(store, digest)]
        self._here.update(blob_path(digest) for digest in sizes.keys() - missing)
        for number, digest in enumerate(missing, start=1):
            size = sizes[digest]
            told = "" if size is None else f", {_told(size)}"
            self._observer.stage(f"pull {record.model}: {number} of {len(missing)}{told}")
            self._fetched[blob_path(digest)] = self._artifact(digest, size)
        for unit, unit_came in units:
            store.put_unit(unit, unit_came.raw)
            self._fetched[path_of(unit)] = len(unit_came.raw)
        path = path_of(record)
        if missing or not _is_usable(store, record):
            store.put_program(record, came.raw)
            self._fetched[path] = len(came.raw)
            source = self._connection.remote.name
            # Signed is what all of it is.
            reasons = [came.vouched, *(unit_came.vouched for _, unit_came in units)]
            vouched = next((reason for reason in reasons if not reason.key), came.vouched)
            note_import(store, sha256_hex(encode(record)), {record.key}, vouched, source)
        else:
            self._here.add(path)
        self._programs.add(record.key)

    def moved(self, refused: Sequence[UnsafeCacheError]) -> Moved:
        """What was done so far."""
        return Moved(
            files=len(self._fetched),
            bytes=sum(self._fetched.values()),
            skipped=len(self._here - self._fetched.keys()),
            programs=tuple(sorted(self._programs)),
            refused=tuple(refused),
        )

    def _record(self, path: str) -> tuple[UnitRecord | ProgramRecord, _Came]:
        name = self._connection.name(path)
        raw = self._connection.read_record(path)
        if raw is None:
            raise CorruptRemote(name, "it is not there")
        # Before anything is made of it.
        vouched = vouch(raw, self._store.trust, name)
        try:
            return _parsed(raw, path, name), _Came(raw=raw, vouched=vouched)
        except FormatTooNew as error:
            reason = f"a later vllmc wrote it, in version {error.version} of the format"
            raise CorruptRemote(name, reason, hint="upgrade vllmc, or use another remote") from None

    def _artifact(self, digest: str, size: int | None) -> int:
        """Fetches an artifact into the store and returns its size; goes on where one broke off."""
        path = blob_path(digest)
        size = self._connection.size(path) if size is None else size
        chunk = self._connection.remote.chunk
        target = self._store.layout.blob(digest)
        with writing(target), beginning(self._store.layout.temporary, digest) as (part, file):
            for _ in range(2):
                begun = file.seek(0, os.SEEK_END)
                if size is None or begun > size:
                    begun = 0
                try:
                    if begun != size:
                        with self._connection.open(path, start=begun) as source:
                            file.truncate(source.start)
                            file.seek(source.start)
                            copy(source, file, chunk, size)
                except FileNotFoundError:
                    raise CorruptRemote(self._connection.name(path), "it is not there") from None
                file.seek(0)
                if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                    file.flush()
                    os.fsync(file.fileno())
                    make_directory(target.parent)
                    publish(part, target)
                    return file.tell()
                # Perhaps its beginning was of another, or damaged on the way.
                file.truncate(0)
            part.unlink(missing_ok=True)
        raise CorruptRemote(
            self._connection.name(path),
            f"its SHA-256 is not {digest[:12]}..., as its path says",
            hint="remove it there, and push it again from where it was compiled",
        )


def _holds(store: Store, digest: str) -> bool:
    with suppress(VllmcError):
        # It counts as new to a prune until the record that names it is here.
        store.retain(digest, store.read_artifact(digest))
        return True
    return False


def _is_usable(store: Store, record: ProgramRecord) -> bool:
    with suppress(Untrusted):
        return store.program(record.key, record.id) is not None
    return False


def _parsed(raw: bytes, path: str, name: str) -> UnitRecord | ProgramRecord:
    """The record in the remote's file at `path`, called `name`.

    Raises `CorruptRemote` and `FormatTooNew`.
    """
    try:
        record = decode(raw)
    except CorruptRecord as error:
        raise CorruptRemote(name, error.reason) from None
    if path_of(record) != path:
        raise CorruptRemote(name, "it is the record of something else")
    return record


def _stands(
    connection: Connection,
    path: str,
    store: Store,
    signature: Signature | None,
    digests: Collection[str],
) -> bool:
    """Whether the remote's record at `path` can stay: it is whole, and so is what it names.

    Where what would be sent has a `signature`, it must have one of that key or of a trusted one.
    The artifacts with these `digests` are known to be there.
    """
    try:
        raw = connection.read_record(path)
        if raw is None:
            return False
        record = _parsed(raw, path, connection.name(path))
    except CorruptRemote:
        return False
    except FormatTooNew:
        return True
    body, theirs = split(raw)
    if theirs is not None and not theirs.is_of(body):
        return False
    if signature is not None and (
        theirs is None or (theirs.key != signature.key and not trusts(theirs.key, store.trust))
    ):
        return False
    units = (record,) if isinstance(record, UnitRecord) else record.units
    others = {unit.artifact for unit in units}.difference(digests)
    return all(connection.size(blob_path(digest)) is not None for digest in others)


def _as_stored(store: Store, record: UnitRecord | ProgramRecord, path: str) -> bytes:
    """The bytes of a record: signed by the store's key, else with the signature that it has."""
    if store.signing is not None:
        return store.signing.signed(encode(record))
    for layout in store.layouts:
        with suppress(FileNotFoundError):
            return read_record(layout.top / path)[0]
    return encode(record)


def _check_one(remote: Remote, prefix: str, keys: set[str]) -> None:
    """Raises `VllmcError` unless one of `keys` begins with `prefix`."""
    found = sorted(key for key in keys if key.startswith(prefix))
    if not found:
        raise _unknown(remote, prefix)
    if len(found) > 1:
        raise VllmcError(
            "ambiguous-key",
            f"{len(found)} keys of {remote.name} start with {prefix}",
            context={"candidates": found},
            hint="give more digits",
        )


def _unknown(remote: Remote, name: str) -> VllmcError:
    return VllmcError(
        "unknown-key",
        f"{remote.name} holds no program called '{name}', nor one whose key begins so",
        context={"remote": remote.name},
        hint="vllmc cache push REMOTE MODEL sends one from where it was compiled",
    )


def _told(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
