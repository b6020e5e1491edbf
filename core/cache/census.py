"""The census of a cache: each of its files, and which of them refer to which. Imports no torch."""

from __future__ import annotations

import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllmc.core.cache.files import IrregularFile, read_record, reading
from vllmc.core.cache.layout import Found, Layout, Section
from vllmc.core.cache.record import CorruptRecord, FormatTooNew, Outline, outline
from vllmc.core.cache.summary import summarize_unit

_DIGEST = re.compile(rb"[0-9a-f]{64}")
_NOTE = re.compile(rb"[0-9a-f]{64} ([0-9a-f]{64})\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFile:
    """A plain file: what it is, and its size and modification time when it was looked at.

    `key` is the key, digest or name that it stands for, `mtime_ns` by the file system's clock.
    """

    section: Section
    key: str
    path: Path
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredProgram:
    """A program key, with all its records.

    `model` is the newest record's, `units` are the keys of the compile units that the records
    name, and `artifacts` the digests. `last_used` is in seconds of the file system's clock, and
    the time of the newest record where no use is noted. `torch` is the version that it takes:
    None where its records do not say.
    """

    key: str
    model: str
    torch: str | None
    last_used: float
    records: tuple[CacheFile, ...]
    units: frozenset[str]
    artifacts: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What lies in one cache directory.

    `programs` come the least recently used first. Of the units and the notes of generated code
    `artifact_of` tells the artifact, by path; those that cannot be read are not in it. `mentioned`
    holds every digest in a record that a later vllmc wrote, and those `elsewhere`. `programs_of`
    tells the programs of a note of an import, by path. `temporary` are drafts and leases.
    """

    programs: tuple[StoredProgram, ...]
    units: Mapping[str, CacheFile]
    codes: Mapping[str, CacheFile]
    blobs: Mapping[str, CacheFile]
    used: Mapping[str, CacheFile]
    imports: Mapping[str, CacheFile]
    facts: Mapping[str, CacheFile]
    temporary: tuple[CacheFile, ...]
    artifact_of: Mapping[Path, str]
    programs_of: Mapping[Path, frozenset[str]]
    mentioned: frozenset[str]

    @property
    def files(self) -> tuple[CacheFile, ...]:
        """Every file: program by program first, and artifacts after what refers to them."""
        own = [
            file
            for program in self.programs
            for file in (*program.records, self.used.get(program.key))
            if file is not None
        ]
        keys = {program.key for program in self.programs}
        orphans = (file for key, file in self.used.items() if key not in keys)
        tables = (self.imports, self.units, self.codes, self.blobs, self.facts)
        return (*own, *orphans, *(f for table in tables for f in table.values()), *self.temporary)


def take_census(layout: Layout, elsewhere: Iterable[str] = ()) -> Census:
    """Looks at every file of the cache; raises `not-readable` and `bad-cache-dir`.

    Links, directories in the place of files and what vllmc did not write are left out.
    `elsewhere` are keys and digests that programs in other layers stand for.
    """
    files: defaultdict[Section, dict[str, CacheFile]] = defaultdict(dict)
    outlines: defaultdict[str, list[tuple[CacheFile, Outline]]] = defaultdict(list)
    artifact_of: dict[Path, str] = {}
    programs_of: dict[Path, frozenset[str]] = {}
    mentioned = set(elsewhere)
    for found in layout.walk():
        file = _look_at(found)
        if file is None:
            continue
        if found.section == "programs":
            with _later_formats(file, mentioned) as data:
                row = (file, outline(data, found.id))
                outlines[file.key].append(row)
            continue
        files[file.section][file.key] = file
        if found.section == "units":
            with _later_formats(file, mentioned) as data:
                artifact_of[file.path] = summarize_unit(data, file.key).artifact
        elif found.section == "codes" and (match := _NOTE.fullmatch(_read(file.path))):
            artifact_of[file.path] = match[1].decode("ascii")
        elif found.section == "imports":
            programs_of[file.path] = _digests(_read(file.path))
    used = files["used"]
    programs = (_program(key, rows, used.get(key)) for key, rows in outlines.items())
    return Census(
        programs=tuple(sorted(programs, key=lambda program: (program.last_used, program.key))),
        units=files["units"],
        codes=files["codes"],
        blobs=files["blobs"],
        used=used,
        imports=files["imports"],
        facts=files["facts"],
        temporary=(*files["locks"].values(), *files["tmp"].values()),
        artifact_of=artifact_of,
        programs_of=programs_of,
        mentioned=frozenset(mentioned),
    )


@contextmanager
def _later_formats(file: CacheFile, mentioned: set[str]) -> Iterator[bytes]:
    """The bytes of a record; that it is corrupt ends the block, and so does a later format."""
    data = _read(file.path)
    try:
        yield data
    except CorruptRecord:
        pass
    except FormatTooNew:
        mentioned |= _digests(data)


def _digests(data: bytes) -> frozenset[str]:
    return frozenset(digest.decode("ascii") for digest in _DIGEST.findall(data))


def _read(path: Path) -> bytes:
    """The contents of a file, empty where it is gone by now."""
    try:
        return read_record(path)[0]
    except (FileNotFoundError, IrregularFile):
        return b""


def _look_at(found: Found) -> CacheFile | None:
    try:
        with reading(found.path):
            status = found.path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return CacheFile(
        section=found.section,
        key=found.key,
        path=found.path,
        bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
    )


def _program(
    key: str, rows: Iterable[tuple[CacheFile, Outline]], used: CacheFile | None
) -> StoredProgram:
    records, outlines = zip(*rows, strict=True)
    newest: Outline = max(outlines, key=lambda outline: (outline.created, outline.id))
    units = [unit for outline in outlines for unit in outline.units]
    torch = newest.values.get(("versions", "torch"))
    latest = used or max(records, key=lambda file: file.mtime_ns)
    return StoredProgram(
        key=key,
        model=newest.model,
        torch=torch if isinstance(torch, str) else None,
        last_used=latest.mtime_ns / 1e9,
        records=records,
        units=frozenset(unit.key for unit in units),
        artifacts=frozenset(unit.artifact for unit in units),
    )
