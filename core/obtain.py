"""Compile units in the store: the only place that decides hit or miss."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllmc.core.cache.files import CorruptArtifact, CorruptRecordError, MissingArtifact
from vllmc.core.cache.key import Factor, key_of
from vllmc.core.cache.record import UnitRecord
from vllmc.core.cache.store import Store
from vllmc.core.errors import CheckFailed
from vllmc.core.events import Observer, UnitOutcome
from vllmc.core.graph.passes.report import PassReport
from vllmc.core.job import Job
from vllmc.core.prediction import ANY_RANGE, Found, Meanwhile, keyed, lookup

if TYPE_CHECKING:  # importing it takes Dynamo and sympy, which a hit does without
    from vllmc.core.compiler.protocol import Compiled, Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitResult:
    """What became of one compile unit. `data` is its artifact, verified.

    `range` is `any` where the token count plays no part. `passes` and `texts` are those of
    `Compiled`, of one that was compiled now.
    """

    pieces: tuple[str, ...]
    range: str
    outcome: UnitOutcome
    key: str
    artifact: str
    data: bytes
    seconds: float
    passes: tuple[PassReport, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()


class Reader:
    """Reads of the store that take what is corrupt for absent, after a warning.

    With `repairs=False` what is corrupt is raised instead, and nothing is removed.
    """

    def __init__(self, store: Store, observer: Observer, *, repairs: bool = True) -> None:
        self.store = store
        self._observer = observer
        self._repairs = repairs

    def program(self, job: Job, meanwhile: Meanwhile | None = None) -> Found | None:
        """See `lookup`."""
        while True:
            try:
                return lookup(job, self.store, meanwhile)
            except MissingArtifact:
                return None
            except CorruptArtifact as error:
                self._discard(error)
                return None
            except CorruptRecordError as error:
                # Another record of the same key may be intact.
                self._discard(error)

    def unit(self, key: str) -> tuple[UnitRecord, bytes] | None:
        """The record of a unit and its artifact."""
        try:
            record = self.store.unit(key)
            return None if record is None else (record, self.store.read_artifact(record.artifact))
        except MissingArtifact:
            return None
        except (CorruptArtifact, CorruptRecordError) as error:
            self._discard(error)
            return None

    def same_code(self, code: str) -> tuple[str, bytes] | None:
        """An artifact of the same generated code, stored under another key."""
        digest = self.store.find_code(code)
        try:
            return None if digest is None else (digest, self.store.read_artifact(digest))
        except (CorruptArtifact, MissingArtifact):
            return None

    def _discard(self, error: CorruptArtifact | CorruptRecordError) -> None:
        if not self._repairs:
            raise error
        self._observer.warning(
            error.code, error.message, "it is compiled again; vllmc cache verify finds the rest"
        )
        self.store.discard(error)


def unit_key(unit: Unit, job: Job) -> tuple[str, tuple[Factor, ...]]:
    """The key of a unit and its factors: the graph, its range and what the compiler depends on.

    The model plays no part, so that models with the same layers share artifacts.
    """
    factors = keyed(job, unit.piece.digest, range_name(unit))
    return key_of(factors), factors


def range_name(unit: Unit) -> str:
    """The unit's range, or `any` where no size of its piece depends on the token count."""
    return str(unit.range) if unit.piece.depends_on_tokens else ANY_RANGE


def in_words(unit: Unit) -> str:
    """What the unit serves: `2:64 tokens`, `1 token`, `any number of tokens`."""
    return unit.range.tokens if unit.piece.depends_on_tokens else "any number of tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """`force` compiles what is stored already; without `may_compile` nothing is compiled.

    `texts` asks for what a person may read of each unit that is compiled.
    """

    force: bool = False
    may_compile: bool = True
    texts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A unit that the store is asked for, with the names of the pieces that share it."""

    unit: Unit
    pieces: tuple[str, ...]
    key: str
    factors: tuple[Factor, ...]

    @property
    def label(self) -> str:
        """`piece_0 for 1:8192 tokens`."""
        return label_of(self.unit, self.pieces)


def label_of(unit: Unit, pieces: tuple[str, ...]) -> str:
    """What people are told of a unit: `piece_0 for 1:8192 tokens`."""
    return f"{pieces[0]} for {in_words(unit)}"


def find(
    unit: Unit, pieces: tuple[str, ...], job: Job, reader: Reader, policy: Policy
) -> UnitResult | Wanted:
    """Finds the unit by its key, or says what is wanted: here it is decided what is compiled.

    Raises `CheckFailed` (`would-miss`) for what must be compiled and may not be.
    """
    key, factors = unit_key(unit, job)
    wanted = Wanted(unit=unit, pieces=pieces, key=key, factors=factors)
    if (found := stored(wanted, reader, policy)) is not None:
        return found
    if not policy.may_compile:
        raise CheckFailed(
            "would-miss",
            f"{label_of(unit, pieces)} is not stored, so it would be compiled",
            context={"unit_key": key},
            hint="vllmc warm compiles it; vllmc inspect-key says what the cache lacks",
        )
    return wanted


def stored(wanted: Wanted, reader: Reader, policy: Policy) -> UnitResult | None:
    """The unit, if the store has it by now and `policy` does not have it compiled again."""
    found = None if policy.force else reader.unit(wanted.key)
    if found is None:
        return None
    record, data = found
    return UnitResult(
        pieces=wanted.pieces,
        range=range_name(wanted.unit),
        outcome="hit",
        key=wanted.key,
        artifact=record.artifact,
        data=data,
        seconds=0.0,
    )


def keep(
    wanted: Wanted, compiled: Compiled, seconds: float, reader: Reader, policy: Policy
) -> UnitResult:
    """Stores what took `seconds` to compile."""
    known = None if policy.force else reader.same_code(compiled.code)
    if known is None:
        artifact, data = reader.store.put_artifact(compiled.artifact), compiled.artifact
    else:
        artifact, data = known
        reader.store.retain(artifact, data)
    reader.store.put_unit(
        UnitRecord(
            key=wanted.key,
            artifact=artifact,
            format=compiled.format,
            code=compiled.code,
            bytes=len(data),
            seconds=seconds,
            created=time.time(),
            factors=wanted.factors,
        )
    )
    return UnitResult(
        pieces=wanted.pieces,
        range=range_name(wanted.unit),
        outcome="dup" if known else "compiled",
        key=wanted.key,
        artifact=artifact,
        data=data,
        seconds=seconds,
        passes=compiled.passes,
        texts=compiled.texts,
    )
