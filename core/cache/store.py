"""The store: content-addressed artifacts and the records that name them. Imports no torch.

Everything below the cache directory is written whole or not at all (`files.write_plain`) and
checked before it is used. Callers write an artifact first and the record that names it last, so a
process that dies in between leaves nothing that refers to what is not there. Reading creates
nothing: a cache directory that does not exist is an empty cache. Loading an artifact runs its
code: the digests here detect damage, they do not authenticate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllmc.core.cache import inventory, summary, usage, verify
from vllmc.core.cache.files import (
    CorruptArtifact,
    CorruptRecordError,
    IrregularFile,
    MissingArtifact,
    make_directory,
    plain_size,
    read_plain,
    refresh,
    write_plain,
    writing,
)
from vllmc.core.cache.inventory import Entry, Stats
from vllmc.core.cache.key import sha256_hex
from vllmc.core.cache.layout import Found, Layout
from vllmc.core.cache.record import (
    CorruptRecord,
    FormatTooNew,
    Outline,
    ProgramRecord,
    UnitRecord,
    decode,
    encode,
    outline,
)
from vllmc.core.cache.usage import Counts, Hold
from vllmc.core.cache.verify import Problem, RepairPlan
from vllmc.core.errors import UsageError, VllmcError

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = [
    "CorruptArtifact",
    "CorruptRecordError",
    "Entry",
    "MissingArtifact",
    "Problem",
    "RepairPlan",
    "Stats",
    "Store",
]

_PREFIX = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class Store:
    """The cache in the directory `root`, which need not exist yet."""

    root: Path

    @property
    def layout(self) -> Layout:
        """Where each thing lies."""
        return Layout(self.root)

    def put_artifact(self, data: bytes) -> str:
        """Stores an artifact and returns its SHA-256. One that is there and intact is kept.

        Raises what `files.write_plain` raises, as do the other `put_` methods.
        """
        digest = sha256_hex(data)
        self._put(self.layout.blob(digest), data)
        return digest

    def put_unit(self, record: UnitRecord) -> None:
        """Stores a unit's record, in place of any under its key; its artifact is there already."""
        note = f"{record.code} {record.artifact}\n".encode("ascii")
        self._put(self.layout.code(record.code), note)
        self._put(self.layout.unit(record.key), encode(record))

    def put_program(self, record: ProgramRecord) -> None:
        """Stores a program's record, in place of any under its key with the same sources."""
        self._put(self.layout.program(record.key, record.id), encode(record))

    def retain(self, digest: str, data: bytes) -> None:
        """Sees to it that an artifact that was found is still there, and counts as new to prune.

        Raises what `put_artifact` does.
        """
        path = self.layout.blob(digest)
        if not refresh(path):
            write_plain(path, data, temporary=self.layout.temporary)

    def _put(self, path: Path, data: bytes) -> None:
        with suppress(FileNotFoundError, IrregularFile, VllmcError):
            if read_plain(path) == data and refresh(path):
                return
        write_plain(path, data, temporary=self.layout.temporary)

    def read_artifact(self, digest: str) -> bytes:
        """The artifact with this SHA-256, checked. Raises `CorruptArtifact`, `MissingArtifact`."""
        path = self.layout.blob(digest)
        try:
            data = read_plain(path)
        except FileNotFoundError:
            raise MissingArtifact(path, digest=digest) from None
        except IrregularFile as error:
            raise CorruptArtifact(path, expected=digest, found=str(error)) from None
        if (found := sha256_hex(data)) != digest:
            raise CorruptArtifact(path, expected=digest, found=found)
        return data

    def unit(self, key: str) -> UnitRecord | None:
        """The record of a compile unit, if there is one.

        Raises `CorruptRecordError`, and `FormatTooNew` for a later vllmc's record.
        """
        found = Found(section="units", key=key, id="", path=self.layout.unit(key))
        record = self.load(found)
        assert not isinstance(record, ProgramRecord)
        return record

    def programs(self, key: str) -> tuple[ProgramRecord, ...]:
        """The records of a program, newest first; raises as `unit` does."""
        below = self.layout.programs(key).relative_to(self.layout.top)
        records = self._load_programs(self.layout.walk(below.as_posix()))
        return tuple(sorted(records, key=lambda record: (-record.created, record.id)))

    def all_units(self) -> Iterator[UnitRecord]:
        """Every unit's record, by key; raises as `unit` does."""
        for found in self.layout.walk("units"):
            if isinstance(record := self.load(found), UnitRecord):
                yield record

    def all_programs(self) -> Iterator[ProgramRecord]:
        """Every program's records, by key; raises as `unit` does."""
        return self._load_programs(self.layout.walk("programs"))

    def readable_units(self) -> Iterator[UnitRecord]:
        """Every unit's record that can be read; `verify` names the others."""
        for found in self.layout.walk("units"):
            with suppress(VllmcError):
                if isinstance(record := self.load(found), UnitRecord):
                    yield record

    def readable_programs(self) -> Iterator[ProgramRecord]:
        """Every program's record that can be read; `verify` names the others."""
        for found in self.layout.walk("programs"):
            with suppress(VllmcError):
                if isinstance(record := self.load(found), ProgramRecord):
                    yield record

    def readable_program(self, key: str, id: str) -> ProgramRecord | None:
        """One record of a program; None where it is gone or cannot be read."""
        path = self.layout.program(key, id)
        with suppress(VllmcError):
            record = self.load(Found(section="programs", key=key, id=id, path=path))
            assert not isinstance(record, UnitRecord)
            return record
        return None

    def outlines(self) -> Iterator[Outline]:
        """The outline of every program's record that can be read, by key."""
        for found in self.layout.walk("programs"):
            if found.section == "programs":
                with suppress(FileNotFoundError, IrregularFile, CorruptRecord, VllmcError):
                    known = outline(read_plain(found.path), found.id)
                    if known.key == found.key:
                        yield known

    def ranges_compiled_by(self, compiler: str) -> frozenset[str]:
        """The ranges of the readable units with this `compiler_key`."""
        ranges = set()
        for found in self.layout.walk("units"):
            if found.section == "units":
                with suppress(FileNotFoundError, IrregularFile, CorruptRecord, VllmcError):
                    data = read_plain(found.path)
                    # Whatever its file says elsewhere; most units are another compiler's.
                    if compiler.encode() in data and isinstance(unit := decode(data), UnitRecord):
                        ranges.add(str(unit.value("range", "tokens")))
        return frozenset(ranges)

    def _load_programs(self, files: Iterable[Found]) -> Iterator[ProgramRecord]:
        for found in files:
            if isinstance(record := self.load(found), ProgramRecord):
                yield record

    def load(self, found: Found) -> UnitRecord | ProgramRecord | None:
        """The record in a file that `Layout.walk` found; None where it is gone, or no record."""
        if found.section not in ("units", "programs"):
            return None
        try:
            record = decode(read_plain(found.path))
        except FileNotFoundError:
            return None
        except IrregularFile as error:
            raise CorruptRecordError(found.path, f"it is {error}") from None
        except CorruptRecord as error:
            raise CorruptRecordError(found.path, error.reason) from None
        except FormatTooNew as error:
            raise FormatTooNew(error.version, str(found.path)) from None
        name = record.id if isinstance(record, ProgramRecord) else ""
        section = "programs" if isinstance(record, ProgramRecord) else "units"
        if (section, record.key, name) != (found.section, found.key, found.id):
            raise CorruptRecordError(found.path, "it is the record of something else")
        return record

    def find_code(self, code: str) -> str | None:
        """The digest of a stored artifact with this generated code, if there is one."""
        try:
            note = read_plain(self.layout.code(code))
        except (FileNotFoundError, IrregularFile):
            return None
        match = re.fullmatch(rb"([0-9a-f]{64}) ([0-9a-f]{64})\n", note)
        if match is None or match[1].decode("ascii") != code:
            return None
        artifact = match[2].decode("ascii")
        return None if plain_size(self.layout.blob(artifact)) is None else artifact

    def discard(self, error: CorruptArtifact | CorruptRecordError) -> None:
        """Removes the corrupt file that `error` names, so that it is compiled again."""
        verify.remove(error.path)

    @contextmanager
    def lock(
        self, name: str, on_wait: Callable[[], None], timeout: float | None = None
    ) -> Iterator[None]:
        """Holds the lock of this name; another holder is waited for after one call of `on_wait`.

        The kernel drops the lock of a process that dies. Raises `not-writable` where no lock can
        be made, and `lock-timeout` after `timeout` seconds (None: waits for ever).
        """
        # Only who writes needs its import, which takes as long as reading a record.
        from filelock import FileLock

        path = self.layout.lock(name)
        guard = FileLock(path)
        with writing(path):
            make_directory(path.parent)
            taken = _acquire(guard, 0)
        if not taken:
            on_wait()
            with writing(path):
                taken = _acquire(guard, -1 if timeout is None else timeout)
        if not taken:
            raise VllmcError(
                "lock-timeout",
                f"another process still holds {path} after {timeout:g} seconds",
                context={"path": str(path), "seconds": timeout},
                hint="wait for the other vllmc to finish, or stop it",
            )
        try:
            yield
        finally:
            guard.release()

    def note_use(self, key: str, counts: Counts) -> Hold | None:
        """Notes that the program `key` was used now, and holds it; see `usage.note`."""
        return usage.note(self.layout.used(key), counts)

    def compile_seconds(self, units: Iterable[str]) -> float:
        """What compiling these units took once, as far as their records can be read."""
        return sum(summary.compile_seconds(self.layout, key) for key in units)

    def resolve_prefix(self, prefix: str) -> str:
        """The one program or unit key that starts with `prefix` (8 hex digits or more).

        Raises `UsageError` (`bad-key`), `VllmcError` (`unknown-key`, `ambiguous-key`).
        """
        prefix = prefix.lower()
        if not _PREFIX.fullmatch(prefix):
            raise UsageError(
                "bad-key",
                f"'{prefix}' is not a key: that takes 8 to 64 hex digits",
                hint="vllmc cache ls lists the keys",
            )
        walks = (self.layout.walk(f"{name}/{prefix[:2]}") for name in ("programs", "units"))
        keys = sorted({f.key for walk in walks for f in walk if f.key.startswith(prefix)})
        if not keys:
            raise VllmcError(
                "unknown-key",
                f"no key in the cache starts with {prefix}",
                context={"cache": str(self.root)},
                hint="vllmc cache ls lists the keys",
            )
        if len(keys) > 1:
            raise VllmcError(
                "ambiguous-key",
                f"{len(keys)} keys start with {prefix}",
                context={"candidates": keys},
                hint=f"give more digits, for example {_distinct(keys)}",
            )
        return keys[0]

    def record(self, key: str) -> tuple[ProgramRecord, ...] | UnitRecord:
        """The records of a program, newest first, or the record of a unit.

        Raises `VllmcError` (`unknown-key`) where there is neither, else as `unit` does.
        """
        if programs := self.programs(key):
            return programs
        if unit := self.unit(key):
            return unit
        raise VllmcError(
            "unknown-key",
            f"the cache holds no record of {key}",
            context={"cache": str(self.root)},
            hint="vllmc cache ls lists the keys",
        )

    def entries(self) -> tuple[Entry, ...]:
        """One entry per program key, the last used first."""
        return inventory.entries(self)

    def stats(self) -> Stats:
        """How much the cache holds."""
        return inventory.stats(self)

    def verify(self) -> tuple[Problem, ...]:
        """Everything that is wrong with the cache, every byte of it read."""
        return verify.verify(self)

    def plan_repair(self, problems: Iterable[Problem]) -> RepairPlan:
        """What `verify`'s problems ask to be removed; `execute()` removes it."""
        return verify.plan_repair(self, problems)


def _acquire(guard: FileLock, timeout: float) -> bool:
    from filelock import Timeout

    try:
        guard.acquire(timeout=timeout)
    except Timeout:
        return False
    return True


def _distinct(keys: list[str]) -> str:
    """The shortest prefix of the first key that no other key has."""
    first, *others = keys
    length = next(n for n in range(1, 65) if not any(k.startswith(first[:n]) for k in others))
    return first[:length]
