"""Programs out of a cache and into another, by a bundle. Imports no torch.

What comes in is verified whole before any of it is published, and it is published in the order in
which `warm` stores: artifacts, units, programs. A process that dies in between leaves nothing that
refers to what is not there.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllmc.core.cache import bundle
from vllmc.core.cache.bundle import BadBundle, Manifest, Reader
from vllmc.core.cache.files import (
    IrregularFile,
    open_plain,
    read_record,
    write_plain,
    writing,
)
from vllmc.core.cache.key import canonical_json
from vllmc.core.cache.layout import Found, Layout
from vllmc.core.cache.record import ProgramRecord, UnitRecord, encode, seconds_in
from vllmc.core.cache.signing import split
from vllmc.core.cache.store import Store
from vllmc.core.cache.trust import Trust, Untrusted
from vllmc.core.cache.trust_store import trusted_keys
from vllmc.core.errors import VllmcError


@dataclass(frozen=True, slots=True, kw_only=True)
class Vouched:
    """Why a bundle is used: the name and key of who signed it, or `--trust-unsigned`."""

    name: str
    key: str

    def __str__(self) -> str:
        return f"signed by {self.name}" if self.key else "not signed, used by --trust-unsigned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What an import did: the bundle, why it was used, and its programs.

    `added` counts the files that were not there before, of `files`.
    """

    manifest: Manifest
    vouched: Vouched
    programs: tuple[ProgramRecord, ...]
    added: int
    files: int


def select(store: Store, names: Iterable[str]) -> tuple[ProgramRecord, ...]:
    """The programs that are meant: by key, by its first 8 or more hex digits, or by model.

    Raises `VllmcError` (`unknown-key`, `ambiguous-key`) and what `Store.programs` does.
    """
    models: dict[str, set[str]] = {}
    for outline in store.outlines():
        models.setdefault(outline.model, set()).add(outline.key)
    found: dict[str, ProgramRecord] = {}
    for name in names:
        keys = models.get(name) or {_program_key(store, name, sorted(models))}
        for key in sorted(keys):
            found |= {record.id: record for record in store.programs(key)}
    return tuple(found.values())


def _program_key(store: Store, name: str, models: list[str]) -> str:
    try:
        key = store.resolve_prefix(name)
    except VllmcError as error:
        if error.code not in ("bad-key", "unknown-key"):
            raise
        key = ""
    if not key or not store.programs(key):
        raise VllmcError(
            "unknown-key",
            f"the cache holds no program called '{name}', nor one whose key begins so",
            context={"cache": str(store.root), "models": models},
            hint="vllmc cache ls lists the programs; vllmc warm compiles one",
        )
    return key


def export(store: Store, programs: Iterable[ProgramRecord], target: Path) -> Manifest:
    """Writes a bundle of these programs to `target`, in place of any file there.

    It is signed by `store.signing`, if there is one. Raises `VllmcError` (`missing-unit`,
    `missing-artifact`), what reading a store raises and what `files.writing` does.
    """
    files: dict[str, bytes] = {}
    programs = tuple(programs)
    units = units_of(store, programs)
    records: tuple[UnitRecord | ProgramRecord, ...] = (*units, *programs)
    for record in records:
        files[path_of(record)] = encode(record)
    for digest in artifacts_of(programs, units):
        files[blob_path(digest)] = store.read_artifact(digest)
    raw = bundle.make_manifest(files, programs, store.signing)
    _write(target, raw, files)
    with _opened(target) as reader:
        return reader.parse(reader.raw_manifest())


def units_of(store: Store, programs: Iterable[ProgramRecord]) -> tuple[UnitRecord, ...]:
    """The units of these programs, each once, to be used.

    Raises `VllmcError` (`missing-unit`), and what `Store.unit` does.
    """
    units: dict[str, UnitRecord] = {}
    for program in programs:
        for unit in program.units:
            record = units.get(unit.key) or store.unit(unit.key)
            if record is None:
                raise VllmcError(
                    "missing-unit",
                    f"the cache lacks unit {unit.key[:12]} of {program.model}",
                    context={"key": program.key, "unit": unit.key},
                    hint="vllmc warm compiles what is missing",
                )
            units[unit.key] = record
    return tuple(units.values())


def artifacts_of(programs: Iterable[ProgramRecord], units: Iterable[UnitRecord]) -> tuple[str, ...]:
    """The digests of the artifacts that these name, each once, in order.

    A program may name another than its unit does, which was compiled again since.
    """
    named = {unit.artifact for program in programs for unit in program.units}
    return tuple(sorted(named.union(unit.artifact for unit in units)))


def path_of(record: UnitRecord | ProgramRecord) -> str:
    """Where a record lies below `v1/`."""
    if isinstance(record, UnitRecord):
        return _relative(Layout.unit, record.key)
    return _relative(Layout.program, record.key, record.id)


def unit_path(key: str) -> str:
    """Where the record of a unit lies below `v1/`."""
    return _relative(Layout.unit, key)


def blob_path(digest: str) -> str:
    """Where an artifact lies below `v1/`."""
    return _relative(Layout.blob, digest)


def _relative(place: Callable[..., Path], *names: str) -> str:
    layout = Layout(Path())
    return place(layout, *names).relative_to(layout.top).as_posix()


def read_manifest(path: Path) -> Manifest:
    """What a bundle says of itself, to be shown. Raises `VllmcError` (`no-bundle`), `BadBundle`."""
    with _opened(path) as reader:
        return reader.parse(reader.raw_manifest())


def import_bundle(store: Store, path: Path, *, source: str = "") -> Imported:
    """Verifies the bundle at `path` and publishes what it holds in the first layer of `store`.

    `source` is what it is called in messages and in the cache's note of it. Raises `Untrusted`
    where nobody whom `store.trust` believes signed it, `BadBundle`, `VllmcError` (`no-bundle`) and
    what writing raises.
    """
    source = source or str(path)
    store.check_writable()
    with _opened(path, source) as reader:
        raw = reader.raw_manifest()
        # Before anything is made of it.
        vouched = vouch(raw, store.trust, source)
        manifest = reader.parse(raw)
        records = [
            bundle.record_of(member, data, source) for member, data in reader.files(manifest)
        ]
    units = {record.key: record for record in records if isinstance(record, UnitRecord)}
    programs = tuple(record for record in records if isinstance(record, ProgramRecord))
    _check_whole(manifest, units, programs, source)
    added = 0
    with _opened(path, source) as reader:
        if reader.raw_manifest() != raw:
            raise BadBundle(source, "it changed while it was read")
        for member, data in reader.files(manifest):
            record = bundle.record_of(member, data, source)
            added += not (store.layout.top / member.path).exists()
            if record is None:
                store.put_artifact(data)
            elif isinstance(record, ProgramRecord):
                store.put_program(record)
            elif store.usable_unit(record.key) is None:
                # Programs that were here already name the artifact of theirs.
                store.put_unit(record)
    keys = {program.key for program in programs}
    note_import(store, manifest.id, keys, vouched, source)
    return Imported(
        manifest=manifest,
        vouched=vouched,
        programs=programs,
        added=added,
        files=len(manifest.members),
    )


def vouch(raw: bytes, trust: Trust, source: str) -> Vouched:
    """Why what is signed at its end may be used. Raises `Untrusted`.

    What is not trusted is not parsed. A signature that does not hold is refused in any case.
    """
    body, signature = split(raw)
    if signature is None:
        if trust.unsigned:
            return Vouched(name="", key="")
        raise Untrusted(
            source,
            "it is not signed",
            hint="have it signed where it comes from (--sign-key), or give --trust-unsigned",
        )
    if not signature.is_of(body):
        raise Untrusted(source, "its signature is not of what it says", hint="fetch it once more")
    name = trusted_keys(trust).get(signature.key)
    if name is not None:
        return Vouched(name=name, key=signature.key.hex())
    if trust.unsigned:
        return Vouched(name="", key="")
    raise Untrusted(
        source,
        f"the key that signs it is not in the trust store: {signature.key.hex()}",
        hint="vllmc trust add FILE takes the public key of whom you trust",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Imprint:
    """The cache's note of an import: which bundle, called what, when, and why it was used.

    `at` is in unix seconds. `signed_by` and `key` are empty where `--trust-unsigned` let it in.
    """

    bundle: str
    source: str
    at: float
    signed_by: str
    key: str
    programs: tuple[str, ...]


def imports_of(store: Store, key: str) -> tuple[Imprint, ...]:
    """The bundles that a program came in, the oldest first.

    Notes that are damaged are left out, and those that others may have written.
    """
    notes = []
    for layout in store.layouts:
        for found in layout.walk("imports"):
            note = _imprint(found, store.trust, layout.root)
            if note is not None and key in note.programs:
                notes.append(note)
    return tuple(sorted(notes, key=lambda note: note.at))


def _imprint(found: Found, trust: Trust, root: Path) -> Imprint | None:
    try:
        data, status = read_record(found.path)
        trust.check(found.path, data, status, root)
        row = json.loads(data)
        return Imprint(
            bundle=found.key,
            source=str(row["source"]),
            at=seconds_in(row, "at"),
            signed_by=str(row["signed_by"]),
            key=str(row["key"]),
            programs=tuple(row["programs"]),
        )
    except (FileNotFoundError, IrregularFile, VllmcError):
        return None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _check_whole(
    manifest: Manifest,
    units: dict[str, UnitRecord],
    programs: tuple[ProgramRecord, ...],
    source: str,
) -> None:
    """Raises `BadBundle` where a program lacks a unit, or a unit its artifact."""
    blobs = {member.sha256 for member in manifest.members if member.section == "blobs"}
    for program in programs:
        for unit in program.units:
            if unit.key not in units or unit.artifact not in blobs:
                raise BadBundle(source, f"it lacks a unit of {program.model}: {unit.key[:12]}")
    for record in units.values():
        if record.artifact not in blobs:
            raise BadBundle(source, f"it lacks the artifact of unit {record.key[:12]}")


def note_import(
    store: Store, bundle_id: str, keys: Iterable[str], vouched: Vouched, source: str
) -> None:
    """Notes where programs came from and why they are used; `bundle_id` is 64 hex digits."""
    note = {
        "bundle": bundle_id,
        "source": source,
        "at": time.time(),
        "signed_by": vouched.name,
        "key": vouched.key,
        "programs": sorted(keys),
    }
    data = f"{canonical_json(note)}\n".encode("ascii")
    write_plain(store.layout.imported(bundle_id), data, temporary=store.layout.temporary)


def _write(target: Path, raw: bytes, files: dict[str, bytes]) -> None:
    draft = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    with writing(target, elsewhere="write to another file with -o"):
        try:
            with draft.open("xb") as file:
                bundle.write(file, raw, files)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path, source: str = "") -> Iterator[Reader]:
    source = source or str(path)
    try:
        # What counts is who signed it, not how it is called here: the hub's cache is full of links.
        with open_plain(path, through_links=True) as file:
            yield Reader(file, os.fstat(file.fileno()).st_size, source)
    except FileNotFoundError:
        raise VllmcError(
            "no-bundle",
            f"there is no bundle {source}",
            context={"bundle": source},
            hint="vllmc cache export KEY -o FILE writes one",
        ) from None
    except IrregularFile as error:
        raise BadBundle(source, f"it is {error}") from None
