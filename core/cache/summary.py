"""Summaries: the few facts of a record that listing, counting and pruning take. Imports no torch.

A record's body is canonical JSON, whose keys are sorted and whose spelling is one. So these facts
are found in an intact record without reading its factors, which are most of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from vllmc.core.cache.files import IrregularFile, read_record
from vllmc.core.cache.layout import Found, Layout
from vllmc.core.cache.record import (
    PROGRAM_FORMAT,
    UNIT_FORMAT,
    CorruptRecord,
    ProgramUnit,
    open_body,
    program_units,
    seconds_in,
)
from vllmc.core.errors import VllmcError

_NUMBER = r"\d[\d.e+-]*"
_CREATED = re.compile(rf'\{{"created":({_NUMBER}),"factors":')
_UNIT_START = re.compile(
    r'\{"artifact":"([0-9a-f]{64})","bytes":(\d{1,18}),"code":"([0-9a-f]{64})",'
)
_UNIT_END = re.compile(rf'"key":"([0-9a-f]{{64}})","seconds":({_NUMBER})\}}')
_UNIT_END_LENGTH = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramSummary:
    """Of a program's record: its fields as `ProgramRecord` has them."""

    key: str
    id: str
    model: str
    created: float
    units: tuple[ProgramUnit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSummary:
    """Of a unit's record: its fields as `UnitRecord` has them."""

    key: str
    artifact: str
    code: str
    bytes: int
    seconds: float


def summarize_program(data: bytes, key: str, id: str) -> ProgramSummary:
    """The summary of the program's record `id` under `key`. Raises what `decode` raises."""
    body = _body(data, PROGRAM_FORMAT)
    created = _CREATED.match(body)
    # Quotes within strings are escaped, so what looks like a name is one, of this object or of one
    # below it. None below has this key; `units` is the last name, and its rows have no such name.
    marker = f',"key":"{key}","model":'
    start, end = body.find(marker), body.rfind(',"units":[')
    if created is None or start < 0 or end < start:
        raise CorruptRecord("it is the record of something else")
    try:
        model, _ = json.JSONDecoder().raw_decode(body, start + len(marker))
        return ProgramSummary(
            key=key,
            id=id,
            model=str(model),
            created=_seconds(created[1]),
            units=program_units(json.loads("{" + body[end + 1 :])),
        )
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"its body is not as every record's: {error}") from None


def summarize_unit(data: bytes, key: str) -> UnitSummary:
    """The summary of the unit's record under `key`. Raises what `decode` raises."""
    body = _body(data, UNIT_FORMAT)
    start = _UNIT_START.match(body)
    end = _UNIT_END.search(body, max(0, len(body) - _UNIT_END_LENGTH))
    if start is None or end is None or end.end() != len(body) or end[1] != key:
        raise CorruptRecord("it is the record of something else")
    return UnitSummary(
        key=key,
        artifact=start[1],
        code=start[3],
        bytes=int(start[2]),
        seconds=_seconds(end[2]),
    )


def program_summaries(files: Iterable[Found]) -> Iterator[ProgramSummary]:
    """The summaries of those program's records that can be read, in their order."""
    for found in files:
        with suppress(FileNotFoundError, IrregularFile, CorruptRecord, VllmcError):
            yield summarize_program(read_record(found.path)[0], found.key, found.id)


def unit_summaries(files: Iterable[Found]) -> Iterator[UnitSummary]:
    """The summaries of those unit's records that can be read, in their order."""
    for found in files:
        with suppress(FileNotFoundError, IrregularFile, CorruptRecord, VllmcError):
            yield summarize_unit(read_record(found.path)[0], found.key)


def compile_seconds(layouts: Iterable[Layout], key: str) -> float:
    """What compiling this unit took, as its first record that can be read says; 0 without one."""
    for layout in layouts:
        with suppress(FileNotFoundError, IrregularFile, CorruptRecord, VllmcError):
            return summarize_unit(read_record(layout.unit(key))[0], key).seconds
    return 0.0


def _seconds(number: str) -> float:
    try:
        return seconds_in({"seconds": json.loads(number)}, "seconds")
    except ValueError as error:
        raise CorruptRecord(str(error)) from None


def _body(data: bytes, expected: str) -> str:
    name, body = open_body(data)
    if name != expected:
        raise CorruptRecord("it is the record of something else")
    try:
        return body.decode("ascii")
    except UnicodeDecodeError:
        raise CorruptRecord("its body is not ASCII") from None
