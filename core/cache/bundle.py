"""Bundles: programs of a cache in one file that can be taken anywhere. Imports no torch.

A bundle is a tar file without compression: the manifest `vllmc-bundle.json`, then the files of the
cache that it lists, in the order in which they are published: artifacts, units, programs. It is
made of nothing but what it holds, so the same programs give the same bytes. The manifest lists the
path, size and SHA-256 of each file, what was compiled with which versions, and may be signed
(`signing`).

Reading believes nothing: each member's header must be the very bytes that `write` would have
written for what the manifest lists, so there are no links, devices, other paths or members told
twice, and nothing that is larger unpacked than it is here.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

from vllmc.core.cache.key import JsonValue, canonical_json, sha256_hex
from vllmc.core.cache.layout import Section, section_of
from vllmc.core.cache.record import CorruptRecord, FormatTooNew, ProgramRecord, UnitRecord, decode
from vllmc.core.cache.signing import Signature, SigningKey, split
from vllmc.core.errors import UnsafeCacheError

MANIFEST: Final = "vllmc-bundle.json"
FORMAT: Final = "vllmc.bundle"
VERSION: Final = 1
_BLOCK: Final = 512
_MOST_MANIFEST: Final = 64 << 20
_ORDER: Final[Mapping[Section, int]] = {"blobs": 0, "units": 1, "programs": 2}
_PROVENANCE: Final = frozenset({"versions", "system", "code"})
_COMPONENTS: Final = frozenset({"python_full", "torch", "transformers", "triton"})
_SIZE = re.compile(rb"[0-7]{11}\0")
_DIGEST = re.compile("[0-9a-f]{64}")


class BadBundle(UnsafeCacheError):
    """A file that is no bundle, or not the one that was written. `reason` says what is wrong."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(
            "corrupt-bundle",
            f"{source} is not a bundle as vllmc writes them: {reason}",
            context={"bundle": source, "reason": reason},
            hint="vllmc cache export writes one; perhaps it was cut off, or packed anew",
        )
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A file of a bundle: its path below the cache's `v1/`, its size in bytes and SHA-256."""

    path: str
    bytes: int
    sha256: str

    @property
    def section(self) -> Section:
        """What kind of file it is."""
        return section_of(self.path)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a bundle says of itself. `body` is what a signature signs."""

    body: bytes
    signature: Signature | None
    members: tuple[Member, ...]
    programs: tuple[JsonValue, ...]
    components: tuple[JsonValue, ...]

    @property
    def id(self) -> str:
        """64 hex digits that tell the bundle from every other, signed or not."""
        return sha256_hex(self.body)


def make_manifest(
    files: Mapping[str, bytes], records: Iterable[ProgramRecord], signing: SigningKey | None
) -> bytes:
    """The manifest of these files, by path; `records` are the programs among them."""
    records = sorted(records, key=lambda record: (record.key, record.id))
    members = [
        {"path": path, "bytes": len(files[path]), "sha256": sha256_hex(files[path])}
        for path in sorted(files, key=_place)
    ]
    value = {
        "format": FORMAT,
        "version": VERSION,
        "files": members,
        "programs": [_provenance(record) for record in records],
        "components": _components(records),
    }
    body = f"{canonical_json(value)}\n".encode("ascii")
    return body if signing is None else signing.signed(body)


def write(target: BinaryIO, manifest: bytes, files: Mapping[str, bytes]) -> None:
    """Writes the bundle of these files to `target`."""
    for path in (MANIFEST, *sorted(files, key=_place)):
        write_member(target, path, manifest if path == MANIFEST else files[path])
    target.write(bytes(2 * _BLOCK))


def write_member(target: BinaryIO, path: str, data: bytes) -> None:
    """Writes one file of a bundle with its header."""
    target.write(_header(path, len(data)))
    target.write(data)
    target.write(bytes(-len(data) % _BLOCK))


class Reader:
    """Reads a bundle of `size` bytes from its beginning: the manifest, then what it lists.

    Nothing is read at once that is larger than the bundle is.
    """

    def __init__(self, file: BinaryIO, size: int, source: str) -> None:
        self._file = file
        self._size = size
        self._source = source

    def raw_manifest(self) -> bytes:
        """The manifest's bytes, of which nothing is known yet. Raises `BadBundle`."""
        header = self._file.read(_BLOCK)
        size = header[124:136]
        if len(header) != _BLOCK or not _SIZE.fullmatch(size):
            raise self._bad("it does not begin with a manifest")
        length = int(size[:-1], 8)
        if header != _header(MANIFEST, length):
            raise self._bad("it does not begin with a manifest")
        if length > _MOST_MANIFEST:
            raise self._bad(f"its manifest would have {length} bytes")
        if length > self._size:
            raise self._bad("it ends within the manifest")
        return self._data(length, "the manifest")

    def parse(self, raw: bytes) -> Manifest:
        """What a manifest says. Raises `BadBundle`, and `VllmcError` (`format-too-new`)."""
        body, signature = split(raw)
        try:
            value = json.loads(body)
            _require(canonical_json(value).encode("ascii") + b"\n" == body)
            _require(isinstance(value, dict))
            if value["format"] == FORMAT and _number(value["version"]) > VERSION:
                raise FormatTooNew(value["version"], self._source)
            _require(value.keys() == {"format", "version", "files", "programs", "components"})
            _require((value["format"], value["version"]) == (FORMAT, VERSION))
            members = tuple(_member(row) for row in value["files"])
            _require(isinstance(value["programs"], list))
            _require(isinstance(value["components"], list))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._bad("its manifest says nothing that vllmc writes") from None
        lengths = (len(raw), *(member.bytes for member in members))
        if sum(map(_space, lengths)) + 2 * _BLOCK != self._size:
            raise self._bad("it is longer or shorter than its manifest says")
        order = [_place(member.path) for member in members]
        if order != sorted(set(order)):
            raise self._bad("its manifest lists a file twice, or out of order")
        return Manifest(
            body=body,
            signature=signature,
            members=members,
            programs=tuple(value["programs"]),
            components=tuple(value["components"]),
        )

    def files(self, manifest: Manifest) -> Iterator[tuple[Member, bytes]]:
        """Each file with its contents, which are as the manifest says. Raises `BadBundle`."""
        for member in manifest.members:
            if self._file.read(_BLOCK) != _header(member.path, member.bytes):
                raise self._bad(f"where {member.path} should be there is something else")
            data = self._data(member.bytes, member.path)
            if hashlib.sha256(data).hexdigest() != member.sha256:
                raise self._bad(f"{member.path} is not what its manifest says")
            yield member, data
        if self._file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
            raise self._bad("it does not end as it should")

    def _data(self, size: int, what: str) -> bytes:
        padded = size + -size % _BLOCK
        data = self._file.read(padded)
        if len(data) != padded:
            raise self._bad(f"it ends within {what}")
        if any(data[size:]):
            raise self._bad(f"there is something behind {what}")
        return data[:size]

    def _bad(self, reason: str) -> BadBundle:
        return BadBundle(self._source, reason)


def record_of(member: Member, data: bytes, source: str) -> UnitRecord | ProgramRecord | None:
    """The record in a file of a bundle; None for an artifact.

    Raises `BadBundle` where the file is not what its path says, and `FormatTooNew`.
    """
    section, key, record_id = section_of(member.path)
    if section == "blobs":
        if member.sha256 != key:
            raise BadBundle(source, f"{member.path} is another artifact")
        return None
    try:
        record = decode(data)
    except CorruptRecord as error:
        raise BadBundle(source, f"{member.path} is no record: {error.reason}") from None
    except FormatTooNew as error:
        raise FormatTooNew(error.version, f"{member.path} of {source}") from None
    kind = UnitRecord if section == "units" else ProgramRecord
    found_id = record.id if isinstance(record, ProgramRecord) else ""
    if not isinstance(record, kind) or (record.key, found_id) != (key, record_id):
        raise BadBundle(source, f"{member.path} is the record of something else")
    return record


def _place(path: str) -> tuple[int, str]:
    return _ORDER[section_of(path)[0]], path


def _space(size: int) -> int:
    """What a file of this size takes, with its header."""
    return _BLOCK + size + -size % _BLOCK


def _header(path: str, size: int) -> bytes:
    """The header of a plain file: of no user, of no time, for all to read."""
    info = tarfile.TarInfo(path)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def _member(row: dict[str, JsonValue]) -> Member:
    _require(isinstance(row, dict) and row.keys() == {"path", "bytes", "sha256"})
    path, digest, size = _text(row["path"]), _text(row["sha256"]), _number(row["bytes"])
    _require(section_of(path)[0] in _ORDER)
    _require(_DIGEST.fullmatch(digest) is not None)
    _require(size >= 0)
    return Member(path=path, bytes=size, sha256=digest)


def _number(value: JsonValue) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(value)
    return value


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _require(holds: bool) -> None:
    """Raises `ValueError` unless it holds; an assertion would not under `python -O`."""
    if not holds:
        raise ValueError


def _provenance(record: ProgramRecord) -> JsonValue:
    """What was compiled, when, and with what: the factors that say so."""
    told = [factor for factor in record.factors if factor.group in _PROVENANCE]
    return {
        "key": record.key,
        "id": record.id,
        "model": record.model,
        "created": record.created,
        "units": len(record.units),
        "factors": {f"{factor.group}.{factor.name}": factor.value for factor in told},
    }


def _components(records: Iterable[ProgramRecord]) -> list[JsonValue]:
    """The packages whose code took part, each version once: what a bill of materials lists."""
    versions = {
        (factor.name.removesuffix("_full"), factor.value)
        for record in records
        for factor in record.factors
        if factor.group == "versions" and factor.name in _COMPONENTS
        if isinstance(factor.value, str)
    }
    return [{"name": name, "version": version} for name, version in sorted(versions)]
