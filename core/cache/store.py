"""The store: content-addressed artifacts and the records that name them. Imports no torch.

Everything below the cache directory is written whole or not at all (`files.write_plain`) and
checked before it is used. Callers write an artifact first and the record that names it last, so a
process that dies in between leaves nothing that refers to what is not there. Reading creates
nothing: a cache directory that does not exist is an empty cache.

A cache has layers: the first is written to, what lies below it is only read, as a cache that was
baked into an image is. Loading an artifact runs its code. Digests detect damage, and do not say
whose work it is: what is read to be used (`unit`, `programs`, `find_code`) must be trusted
(`vllmc.core.cache.trust`), what is read to be shown need not be.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from vllmc.core.cache import inventory, summary, usage, verify
from vllmc.core.cache.files import (
    CorruptArtifact,
    CorruptRecordError,
    IrregularFile,
    MissingArtifact,
    make_directory,
    plain_size,
    read_beginning,
    read_plain,
    read_record,
    reading,
    refresh,
    write_plain,
)
from vllmc.core.cache.inventory import Entry, Stats
from vllmc.core.cache.key import sha256_hex
from vllmc.core.cache.layout import Found, Layout, Section
from vllmc.core.cache.lease import Request, held
from vllmc.core.cache.record import (
    CorruptRecord,
    FormatTooNew,
    Outline,
    ProgramRecord,
    UnitRecord,
    decode,
    encode,
    noted_artifact,
    outline,
)
from vllmc.core.cache.signing import SigningKey, split
from vllmc.core.cache.trust import Trust, Untrusted
from vllmc.core.cache.trust_store import trusts
from vllmc.core.cache.usage import Counts, Hold
from vllmc.core.cache.verify import Problem, RepairPlan
from vllmc.core.errors import UsageError, VllmcError

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
    """The cache in the directory `root`, over the layers `below` it; none need exist yet.

    `trust` decides what is used, and `signing` signs the records that are written.
    """

    root: Path
    below: tuple[Path, ...] = ()
    trust: Trust = field(default_factory=Trust)
    signing: SigningKey | None = None
    # What is corrupt in a layer below cannot be removed.
    _passed_over: set[Path] = field(default_factory=set, repr=False, compare=False)

    @property
    def layout(self) -> Layout:
        """Where each thing lies that is written."""
        return Layout(self.root)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Where each thing may lie: that of the first layer first."""
        return tuple(Layout(root) for root in (self.root, *self.below))

    def check_writable(self) -> None:
        """Raises `Untrusted` where what is written would not be used afterwards."""
        with reading(self.root):
            doubt = self.trust.doubt_of(self.root)
        if doubt is None or self.trust.unsigned:
            return
        hint = f"chmod go-w {self.root}, use a directory of your own, or give --trust-unsigned"
        if self.signing is None:
            raise Untrusted(self.root, doubt, hint=hint)
        if not trusts(self.signing.public, self.trust):
            raise Untrusted(
                self.root,
                f"{doubt}, and the key that would sign what is written is not in the trust store",
                hint=f"vllmc trust add takes its public key; or {hint}",
            )

    def put_artifact(self, data: bytes) -> str:
        """Stores an artifact and returns its SHA-256. One that is there and intact is kept.

        Raises what `files.write_plain` raises, as do the other `put_` methods.
        """
        digest = sha256_hex(data)
        if not any(_holds(layout.blob(digest), data) for layout in self.layouts[1:]):
            path = self.layout.blob(digest)
            if not (_holds(path, data) and refresh(path)):
                write_plain(path, data, temporary=self.layout.temporary)
        return digest

    def put_unit(self, record: UnitRecord, raw: bytes = b"") -> None:
        """Stores a unit's record, in place of any under its key; its artifact is there already.

        `raw` is the record's file elsewhere, whose signature it keeps unless this store signs.
        """
        note = f"{record.code} {record.artifact}\n".encode("ascii")
        self._put(self.layout.code(record.code), note)
        self._put(self.layout.unit(record.key), self._file_of(record, raw))

    def put_program(self, record: ProgramRecord, raw: bytes = b"") -> None:
        """Stores a program's record, in place of any under its key with the same sources.

        `raw` is as of `put_unit`.
        """
        self._put(self.layout.program(record.key, record.id), self._file_of(record, raw))

    def _file_of(self, record: UnitRecord | ProgramRecord, raw: bytes) -> bytes:
        if self.signing is not None:
            return self.signing.signed(encode(record))
        return raw or encode(record)

    def retain(self, digest: str, data: bytes) -> None:
        """Sees to it that an artifact that was found is still there, and counts as new to prune.

        Raises what `put_artifact` does.
        """
        path = self.layout.blob(digest)
        if not refresh(path) and self.artifact_size(digest) is None:
            write_plain(path, data, temporary=self.layout.temporary)

    def _put(self, path: Path, data: bytes) -> None:
        """Writes a record or note, also over one that says the same and is another's."""
        if not (_holds(path, data, self.trust) and refresh(path)):
            write_plain(path, data, temporary=self.layout.temporary)

    def read_artifact(self, digest: str) -> bytes:
        """The artifact with this SHA-256, checked. Raises `CorruptArtifact`, `MissingArtifact`."""
        corrupt: CorruptArtifact | None = None
        for layout in self.layouts:
            try:
                if (data := self._blob(layout.blob(digest), digest)) is not None:
                    return data
            except CorruptArtifact as error:
                corrupt = corrupt or error
        raise corrupt or MissingArtifact(self.layout.blob(digest), digest=digest)

    def _blob(self, path: Path, digest: str) -> bytes | None:
        if path in self._passed_over:
            return None
        try:
            data = read_plain(path)
        except FileNotFoundError:
            return None
        except IrregularFile as error:
            raise CorruptArtifact(path, expected=digest, found=str(error)) from None
        if (found := sha256_hex(data)) != digest:
            raise CorruptArtifact(path, expected=digest, found=found)
        return data

    def artifact_size(self, digest: str) -> int | None:
        """The size of an artifact in bytes, unchecked; None where it is not there."""
        sizes = (plain_size(layout.blob(digest)) for layout in self.layouts)
        return next((size for size in sizes if size is not None), None)

    def unit(self, key: str) -> UnitRecord | None:
        """The record of a compile unit, to be used, if there is one.

        Raises `CorruptRecordError`, `FormatTooNew` for a later vllmc's record, and `Untrusted`.
        """
        return self._unit(key, to_use=True)

    def _unit(self, key: str, *, to_use: bool) -> UnitRecord | None:
        for layout in self.layouts:
            found = Found(section="units", key=key, id="", path=layout.unit(key))
            record = self._load(found, used_from=layout if to_use else None)
            assert not isinstance(record, ProgramRecord)
            if record is not None:
                return record
        return None

    def usable_unit(self, key: str) -> UnitRecord | None:
        """As `unit`; None where there is none that may be used."""
        with suppress(VllmcError):
            return self.unit(key)
        return None

    def programs(self, key: str) -> tuple[ProgramRecord, ...]:
        """The records of a program, to be used, newest first; raises as `unit` does."""
        return self._programs(key, to_use=True)

    def _programs(self, key: str, *, to_use: bool) -> tuple[ProgramRecord, ...]:
        records: dict[str, ProgramRecord] = {}
        for layout in self.layouts:
            for found in layout.walk(layout.programs(key).relative_to(layout.top).as_posix()):
                if found.id not in records:
                    record = self._load(found, used_from=layout if to_use else None)
                    if isinstance(record, ProgramRecord):
                        records[found.id] = record
        return tuple(sorted(records.values(), key=lambda record: (-record.created, record.id)))

    def program(self, key: str, id: str) -> ProgramRecord | None:
        """One record of a program, to be used; None where it is gone or cannot be read.

        Raises `Untrusted`.
        """
        for layout in self.layouts:
            path = layout.program(key, id)
            try:
                record = self._load(
                    Found(section="programs", key=key, id=id, path=path), used_from=layout
                )
            except Untrusted:
                raise
            except VllmcError:
                continue
            if isinstance(record, ProgramRecord):
                return record
        return None

    def walk(self, section: Section, prefix: str = "") -> Iterator[Found]:
        """The files of a section, in the order of keys: of several layers the first that has it.

        `prefix` is two digits with which the keys begin, or empty. Raises as `Layout.walk` does.
        """
        below = f"{section}/{prefix}" if prefix else section
        walks = [
            (found for found in layout.walk(below) if found.section == section)
            for layout in self.layouts
        ]
        if len(walks) == 1:
            yield from walks[0]
            return
        last = None
        for found in heapq.merge(*walks, key=lambda found: (found.key, found.id)):
            if (found.key, found.id) != last:
                last = (found.key, found.id)
                yield found

    def readable_units(self) -> Iterator[UnitRecord]:
        """Every unit's record that can be read; `verify` names the others."""
        for found in self.walk("units"):
            with suppress(VllmcError):
                if isinstance(record := self.load(found), UnitRecord):
                    yield record

    def readable_programs(self) -> Iterator[ProgramRecord]:
        """Every program's record that can be read; `verify` names the others."""
        for found in self.walk("programs"):
            with suppress(VllmcError):
                if isinstance(record := self.load(found), ProgramRecord):
                    yield record

    def readable_program(self, key: str, id: str) -> ProgramRecord | None:
        """One record of a program, to be shown; None where it is gone or cannot be read."""
        for layout in self.layouts:
            path = layout.program(key, id)
            with suppress(VllmcError):
                record = self.load(Found(section="programs", key=key, id=id, path=path))
                if isinstance(record, ProgramRecord):
                    return record
        return None

    def outlines(self) -> Iterator[Outline]:
        """The outline of every program's record that can be read, by key."""
        for found in self.walk("programs"):
            with suppress(FileNotFoundError, IrregularFile, CorruptRecord, VllmcError):
                known = outline(read_record(found.path)[0], found.id)
                if known.key == found.key:
                    yield known

    def ranges_compiled_by(self, compiler: str) -> frozenset[str]:
        """The ranges of the readable units with this `compiler_key`."""
        ranges = set()
        for found in self.walk("units"):
            with suppress(FileNotFoundError, IrregularFile, CorruptRecord, VllmcError):
                data = read_record(found.path)[0]
                # Whatever its file says elsewhere; most units are another compiler's.
                if compiler.encode() in data and isinstance(unit := decode(data), UnitRecord):
                    ranges.add(str(unit.value("range", "tokens")))
        return frozenset(ranges)

    def load(self, found: Found) -> UnitRecord | ProgramRecord | None:
        """The record in a file that `Layout.walk` found, to be shown.

        None where it is gone, or no record. Raises `CorruptRecordError` and `FormatTooNew`.
        """
        return self._load(found, used_from=None)

    def check(self, found: Found, layout: Layout) -> UnitRecord | ProgramRecord | None:
        """As `load`, of a file of `layout`, whose signature is checked wherever it has one.

        Raises `Untrusted`, too, for what would not be used.
        """
        return self._load(found, used_from=layout, to_verify=True)

    def _load(
        self, found: Found, *, used_from: Layout | None, to_verify: bool = False
    ) -> UnitRecord | ProgramRecord | None:
        if found.section not in ("units", "programs") or found.path in self._passed_over:
            return None
        try:
            data, status = read_record(found.path)
            if used_from is not None:
                # Before anything else is made of it.
                self.trust.check(found.path, data, status, used_from.root)
            body, signature = split(data)
            if to_verify and signature is not None and not signature.is_of(body):
                raise CorruptRecord("its signature is not of what it says")
            record = decode(data)
            name = record.id if isinstance(record, ProgramRecord) else ""
        except FileNotFoundError:
            return None
        except IrregularFile as error:
            raise CorruptRecordError(found.path, f"it is {error}") from None
        except CorruptRecord as error:
            raise CorruptRecordError(found.path, error.reason) from None
        except RecursionError:
            raise CorruptRecordError(found.path, "it is nested too deep") from None
        except FormatTooNew as error:
            raise FormatTooNew(error.version, str(found.path)) from None
        section = "programs" if isinstance(record, ProgramRecord) else "units"
        if (section, record.key, name) != (found.section, found.key, found.id):
            raise CorruptRecordError(found.path, "it is the record of something else")
        return record

    def find_code(self, code: str) -> str | None:
        """The digest of a stored artifact with this generated code, if there is one.

        Notes are not signed: of a layer that others may write to there is none.
        """
        for layout in self.layouts:
            with suppress(FileNotFoundError, IrregularFile, Untrusted):
                path = layout.code(code)
                note, status = read_record(path)
                self.trust.check(path, note, status, layout.root)
                artifact = noted_artifact(note, code)
                if artifact is not None and self.artifact_size(artifact) is not None:
                    return artifact
        return None

    def discard(self, error: CorruptArtifact | CorruptRecordError) -> None:
        """Removes the corrupt file that `error` names, so that it is compiled again.

        One of a layer below is left, and taken for absent from now on.
        """
        if error.path.is_relative_to(self.layout.top):
            verify.remove(error.path)
        else:
            self._passed_over.add(error.path)

    def request(self, name: str) -> Request:
        """What it takes to ask for the lease of this name; asks for nothing yet."""
        return Request(self.layout.lock(name), temporary=self.layout.temporary)

    def lock(
        self, name: str, on_wait: Callable[[str], None], timeout: float | None = None
    ) -> AbstractContextManager[None]:
        """Holds the lease of this name; see `lease.held` for the wait and what is raised."""
        return held(self.request(name), on_wait, timeout)

    def note_use(self, key: str, counts: Counts) -> Hold | None:
        """Notes that the program `key` was used now, and holds it; see `usage.note`."""
        path = self.layout.used(key)
        if self.below:
            # The programs of a layer below are used before anything is stored in this one.
            with suppress(OSError):
                make_directory(path.parent)
        return usage.note(path, counts)

    def compile_seconds(self, units: Iterable[str]) -> float:
        """What compiling these units took once, as far as their records can be read."""
        return sum(summary.compile_seconds(self.layouts, key) for key in units)

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
        walks = (self.walk("programs", prefix[:2]), self.walk("units", prefix[:2]))
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

    def record(self, key: str, *, to_use: bool = False) -> tuple[ProgramRecord, ...] | UnitRecord:
        """The records of a program, newest first, or the record of a unit.

        Raises `VllmcError` (`unknown-key`) where there is neither; `CorruptRecordError` and
        `FormatTooNew`, and `to_use` as `unit` does.
        """
        if programs := self._programs(key, to_use=to_use):
            return programs
        if unit := self._unit(key, to_use=to_use):
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


def _holds(path: Path, data: bytes, trust: Trust | None = None) -> bool:
    """Whether a file is there, just this, and with `trust` nobody else's."""
    with suppress(FileNotFoundError, IrregularFile, VllmcError):
        there, status = read_beginning(path, len(data) + 1)
        return there == data and (trust is None or trust.doubt(status) is None)
    return False


def _distinct(keys: list[str]) -> str:
    """The shortest prefix of the first key that no other key has."""
    first, *others = keys
    length = next(n for n in range(1, 65) if not any(k.startswith(first[:n]) for k in others))
    return first[:length]
