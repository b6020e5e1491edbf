"""Records: what the cache knows about a compile unit and about a whole program. Imports no torch.

A record file is one JSON object whose header is always spelled in the same bytes:

    {"format":"vllmc.unit","version":1,"checksum":"<64 hex>","body":{...}}

Of the factors, most of which nobody has set, the body holds only names and values where all else
is as usual; each record stays readable by itself. The body is canonical JSON, and the checksum is
the SHA-256 over format, version and body, so a change to any byte of the file is noticed before
the body is parsed. A signature may follow (`signing`). A record holds no absolute path and no
secret: sources are named relative to their package, and whoever makes factors redacts them
(`redaction`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from vllmc.core.cache.key import Factor, JsonValue, canonical_json, key_of, sha256_hex
from vllmc.core.cache.signing import split
from vllmc.core.errors import VllmcError

UNREADABLE = "unreadable"
"""A guarded value that cannot be looked up again, so that its program is never found."""

NO_DIGEST = "0" * 32
"""The digest of a source file that may not be what was traced: it never verifies."""

VERSION = 1
UNIT_FORMAT = "vllmc.unit"
PROGRAM_FORMAT = "vllmc.program"
PIECE_COUNTS = ("total", "splitting", "compilable", "unique")
_UNIT_FIELDS = (
    "key",
    "artifact",
    "format",
    "code",
    "bytes",
    "seconds",
    "created",
    "compiler_key",
    "factors",
)
_PROGRAM_FIELDS = (
    "key",
    "model",
    "created",
    "factors",
    "sources",
    "guarded",
    "units",
    "pieces",
    "program",
)

GRAPH_GROUPS = frozenset({"graph", "range"})
"""The groups of a unit key that come on top of the compiler's factors."""

_HEADER = re.compile(
    rb'\{"format":"([a-z.]+)","version":(\d{1,9}),"checksum":"([0-9a-f]{64})","body":'
)
_NOTE = re.compile(rb"([0-9a-f]{64}) ([0-9a-f]{64})\n")
_TRAILER = b"}\n"
# Before the year 5000: a date that every platform can tell.
_MOST_SECONDS = 95e9

_Row: TypeAlias = "dict[str, JsonValue]"


class CorruptRecord(ValueError):
    """Bytes that are no record, or not the record that was written. `reason` says what is wrong."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class FormatTooNew(VllmcError):
    """A record that a later vllmc wrote, in a version of the format that this one cannot read."""

    def __init__(self, version: int, path: str = "") -> None:
        super().__init__(
            "format-too-new",
            f"the record {path or 'given'} has format version {version}, and this vllmc reads "
            f"no later one than {VERSION}",
            context={"path": path, "version": version},
            hint="upgrade vllmc, or use another cache with --cache-dir",
        )
        self.version = version


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A source file that capture traced.

    `path` is relative to the directory of the top-level `package`, with `/` between its parts;
    `digest` is the file's xxh3_128 (32 hex digits), or `NO_DIGEST`; `functions` are the qualified
    names of the functions traced in it.
    """

    package: str
    path: str
    digest: str
    functions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRecord:
    """One compile unit: a unique piece for one compile range.

    `artifact` is the SHA-256 of the stored blob of `bytes` bytes, `format` names what kind of
    artifact it is, `code` the SHA-256 of the generated code. `seconds` is what compiling took,
    `created` is in unix seconds.
    """

    key: str
    artifact: str
    format: str
    code: str
    bytes: int
    seconds: float
    created: float
    factors: tuple[Factor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", _ordered(self.factors))

    @property
    def compiler_key(self) -> str:
        """The key of the compiler's factors alone: what any graph compiled in this way shares."""
        return key_of(factor for factor in self.factors if factor.group not in GRAPH_GROUPS)

    def value(self, group: str, name: str) -> JsonValue:
        """The value of a factor; None where there is none."""
        return next((f.value for f in self.factors if f.identity == (group, name)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramUnit:
    """A compile unit's place in a program: its key, artifact, range (`A:B` or `N`) and pieces."""

    key: str
    artifact: str
    range: str
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramRecord:
    """Everything needed to link a program without capturing it again.

    `sources` are the files that capture traced, `guarded` the Python values that it depended on
    by the expressions that read them, `pieces` the counts named in `PIECE_COUNTS`, `program` the
    linkable description, opaque here.
    """

    key: str
    model: str
    created: float
    factors: tuple[Factor, ...]
    sources: tuple[SourceFile, ...]
    guarded: dict[str, JsonValue]
    units: tuple[ProgramUnit, ...]
    pieces: dict[str, int]
    program: JsonValue

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", _ordered(self.factors))

    @property
    def id(self) -> str:
        """64 hex digits over the key, the sources and the values: one record per version."""
        sources = sorted((s.package, s.path, s.digest) for s in self.sources)
        return sha256_hex(canonical_json([self.key, sources, self.guarded]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """As much of a program's record as listing it takes, and finding the nearest one.

    `values` are those of the factors that affect the key, by (group, name): what is `compared`.
    """

    key: str
    id: str
    model: str
    created: float
    values: dict[tuple[str, str], JsonValue]
    units: tuple[ProgramUnit, ...]


def noted_artifact(note: bytes, code: str) -> str | None:
    """The artifact that a note of this generated code names; None for what is no such note."""
    match = _NOTE.fullmatch(note)
    return match[2].decode("ascii") if match and match[1].decode("ascii") == code else None


def encode(record: UnitRecord | ProgramRecord) -> bytes:
    """The record as the bytes of its file; `decode` gives an equal record back."""
    if isinstance(record, UnitRecord):
        name, body = UNIT_FORMAT, canonical_json(_unit_body(record)).encode("ascii")
    else:
        name, body = PROGRAM_FORMAT, canonical_json(_program_body(record)).encode("ascii")
    data = seal(name, VERSION, body)
    assert decode(data) == record, "a record holds something that its file cannot"
    return data


def seal(name: str, version: int, body: bytes) -> bytes:
    """The file of a record whose body is spelled so, in the format `name`."""
    checksum = _checksum(name, version, body)
    header = f'{{"format":"{name}","version":{version},"checksum":"{checksum}","body":'
    return header.encode("ascii") + body + _TRAILER


def decode(data: bytes) -> UnitRecord | ProgramRecord:
    """Reads what `encode` wrote.

    Raises `CorruptRecord` for anything that `encode` cannot have written, and `FormatTooNew` for
    an intact record of a later version.
    """
    name, value = _open(data)
    try:
        return _read_unit(value) if name == UNIT_FORMAT else _read_program(value)
    except RecursionError:
        raise CorruptRecord("it is nested too deep") from None


def outline(data: bytes, id: str) -> Outline:
    """As `decode`, for the outline of a program's record, in a tenth of the time."""
    name, value = _open(data)
    if name != PROGRAM_FORMAT:
        raise CorruptRecord("it is the record of something else")
    body: Any = value
    try:
        values = {
            (group, name): value
            for group, rows in body["factors"]["default"].items()
            for name, value in rows.items()
        }
        for row in body["factors"]["other"]:
            if row["affects_key"]:
                values[row["group"], row["name"]] = row.get("digest", row["value"])
        return Outline(
            key=_hex(body, "key"),
            id=id,
            model=_text(body, "model"),
            created=seconds_in(body, "created"),
            values=values,
            units=program_units(body),
        )
    except (KeyError, TypeError, AttributeError):
        raise CorruptRecord("it lacks fields that every record has") from None


def open_body(data: bytes) -> tuple[str, bytes]:
    """The format and the body of an intact record, not parsed; raises what `decode` raises."""
    data, _ = split(data)
    header = _HEADER.match(data)
    if header is None or not data.endswith(_TRAILER):
        raise CorruptRecord("it is truncated, or not a vllmc record")
    name, version = header[1].decode("ascii"), int(header[2])
    body = data[header.end() : -len(_TRAILER)]
    if _checksum(name, version, body) != header[3].decode("ascii"):
        raise CorruptRecord("its checksum does not match its contents")
    if version > VERSION:
        raise FormatTooNew(version)
    if name not in (UNIT_FORMAT, PROGRAM_FORMAT) or version < 1:
        raise CorruptRecord(f"its format is {name} {version}, which vllmc never wrote")
    return name, body


def _open(data: bytes) -> tuple[str, JsonValue]:
    name, body = open_body(data)
    try:
        value = json.loads(body, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"its body is not JSON: {error}") from None
    return name, value


def _checksum(name: str, version: int, body: bytes) -> str:
    return sha256_hex(f"{name} {version}\n".encode("ascii") + body)


def _unit_body(record: UnitRecord) -> _Row:
    return {
        "key": record.key,
        "artifact": record.artifact,
        "format": record.format,
        "code": record.code,
        "bytes": record.bytes,
        "seconds": record.seconds,
        "created": record.created,
        "compiler_key": record.compiler_key,
        "factors": _factor_rows(record.factors),
    }


def _read_unit(value: JsonValue) -> UnitRecord:
    row = _row(value, _UNIT_FIELDS)
    _hex(row, "compiler_key")
    return UnitRecord(
        key=_hex(row, "key"),
        artifact=_hex(row, "artifact"),
        format=_text(row, "format"),
        code=_hex(row, "code"),
        bytes=_count(row, "bytes"),
        seconds=seconds_in(row, "seconds"),
        created=seconds_in(row, "created"),
        factors=_factors(row),
    )


def _program_body(record: ProgramRecord) -> _Row:
    return {
        "key": record.key,
        "model": record.model,
        "created": record.created,
        "factors": _factor_rows(record.factors),
        "sources": [
            {
                "package": source.package,
                "path": source.path,
                "digest": source.digest,
                "functions": list(source.functions),
            }
            for source in record.sources
        ],
        "guarded": {**record.guarded},
        "units": [
            {
                "key": unit.key,
                "artifact": unit.artifact,
                "range": unit.range,
                "pieces": list(unit.pieces),
            }
            for unit in record.units
        ],
        "pieces": {**record.pieces},
        "program": record.program,
    }


def _read_program(value: JsonValue) -> ProgramRecord:
    row = _row(value, _PROGRAM_FIELDS)
    sources = tuple(_source(item) for item in _list(row, "sources"))
    _check_unique("source file", ((s.package, s.path) for s in sources))
    pieces = _row(row["pieces"], PIECE_COUNTS)
    return ProgramRecord(
        key=_hex(row, "key"),
        model=_text(row, "model"),
        created=seconds_in(row, "created"),
        factors=_factors(row),
        sources=sources,
        guarded=_object(row, "guarded"),
        units=program_units(row),
        pieces={name: _count(pieces, name) for name in PIECE_COUNTS},
        program=row["program"],
    )


def _source(value: JsonValue) -> SourceFile:
    row = _row(value, ("package", "path", "digest", "functions"))
    path = _text(row, "path")
    if "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise CorruptRecord(f"the source path {path!r} is not relative to its package")
    return SourceFile(
        package=_text(row, "package"),
        path=path,
        digest=_hex(row, "digest", digits=32),
        functions=_texts(row, "functions"),
    )


def program_units(row: Mapping[str, JsonValue]) -> tuple[ProgramUnit, ...]:
    """The units in the body of a program's record. Raises `CorruptRecord`, and `KeyError`."""
    return tuple(_program_unit(item) for item in _list(row, "units"))


def _program_unit(value: JsonValue) -> ProgramUnit:
    row = _row(value, ("key", "artifact", "range", "pieces"))
    return ProgramUnit(
        key=_hex(row, "key"),
        artifact=_hex(row, "artifact"),
        range=_text(row, "range"),
        pieces=_texts(row, "pieces"),
    )


def _factor_rows(factors: Iterable[Factor]) -> _Row:
    default: dict[str, JsonValue] = {}
    other: list[JsonValue] = []
    for factor in factors:
        if _usual(factor):
            group = default.setdefault(factor.group, {})
            assert isinstance(group, dict)
            group[factor.name] = factor.value
        else:
            row = factor.to_json()
            if not factor.hidden:
                del row["digest"]
            other.append(row)
    return {"default": default, "other": other}


def _usual(factor: Factor) -> bool:
    return (
        factor.origin == "default"
        and factor.is_default
        and factor.affects_key
        and not factor.hidden
    )


def _factors(row: _Row) -> tuple[Factor, ...]:
    parts = _row(row["factors"], ("default", "other"))
    groups = _object(parts, "default")
    factors = [
        Factor(group=_text({"group": group}, "group"), name=_text({"name": name}, "name"), value=v)
        for group in groups
        for name, v in _object(groups, group).items()
    ]
    names = ("group", "name", "value", "origin", "is_default", "affects_key")
    for item in _list(parts, "other"):
        hidden = isinstance(item, dict) and "digest" in item
        fields = _row(item, (*names, "digest") if hidden else names)
        if hidden:
            _hex(fields, "digest")
        for name in ("is_default", "affects_key"):
            if not isinstance(fields[name], bool):
                _refuse(name, "true or false", fields[name])
        for name in ("group", "name", "origin"):
            _text(fields, name)
        factors.append(Factor.from_json(fields))
    _check_unique("factor", (factor.identity for factor in factors))
    return tuple(factors)


def _ordered(factors: Iterable[Factor]) -> tuple[Factor, ...]:
    """By group and name, so that a record has one spelling."""
    return tuple(sorted(factors, key=lambda factor: factor.identity))


def _row(value: JsonValue, names: Iterable[str]) -> _Row:
    if not isinstance(value, dict):
        _refuse("a row", "an object", value)
    if value.keys() != set(names):
        odd = ", ".join(sorted(value.keys() ^ set(names)))
        raise CorruptRecord(f"a row lacks fields or has others than it should: {odd}")
    return value


def _object(row: _Row, name: str) -> _Row:
    value = row[name]
    if not isinstance(value, dict):
        _refuse(name, "an object", value)
    return value


def _list(row: Mapping[str, JsonValue], name: str) -> list[JsonValue]:
    value = row[name]
    if not isinstance(value, list):
        _refuse(name, "a list", value)
    return value


def _text(row: _Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value:
        _refuse(name, "text", value)
    return value


def _texts(row: _Row, name: str) -> tuple[str, ...]:
    return tuple(_text({name: item}, name) for item in _list(row, name))


def _hex(row: _Row, name: str, digits: int = 64) -> str:
    value = row[name]
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
        _refuse(name, f"{digits} hex digits", value)
    return value


def _count(row: _Row, name: str) -> int:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        _refuse(name, "a count", value)
    return value


def seconds_in(row: Mapping[str, JsonValue], name: str) -> float:
    """A time span or a unix time of a record's body. Raises `CorruptRecord`."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(name, "a number of seconds", value)
    if not 0 <= value < _MOST_SECONDS:
        _refuse(name, "a number of seconds", value)
    return float(value)


def _check_unique(what: str, identities: Iterable[tuple[str, str]]) -> None:
    seen: set[tuple[str, str]] = set()
    for identity in identities:
        if identity in seen:
            raise CorruptRecord(f"the {what} {'/'.join(identity)} is listed twice")
        seen.add(identity)


def _refuse(name: str, expected: str, found: JsonValue) -> NoReturn:
    raise CorruptRecord(f"{name} should be {expected}, and is {found!r:.80}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is larger than any number")
    return value
