"""What the store holds for a job, and why it lacks it: nothing is captured or compiled here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from vllmc.core.cache.explain import Change, alike, by_distance, diff, diff_guarded, diff_sources
from vllmc.core.cache.files import MissingArtifact
from vllmc.core.cache.key import REDACTED, Factor, JsonValue, canonical_json, key_of
from vllmc.core.cache.record import UNREADABLE, ProgramRecord
from vllmc.core.cache.sources import current, verify
from vllmc.core.cache.store import Store
from vllmc.core.cache.trust import Untrusted
from vllmc.core.errors import UnsafeCacheError
from vllmc.core.job import Job
from vllmc.core.spec import unit_ranges

Meanwhile: TypeAlias = Callable[[ProgramRecord], object]
"""What to do with the record of a found program while its artifacts are read."""

PredictedOutcome: TypeAlias = Literal["hit", "miss", "unknown", "unsafe"]

ANY_RANGE: Final = "any"
"""Stands for the range of a unit in which the token count plays no part."""

# What the compiler is told, and capture never sees: the graph is the same whatever they say.
_COMPILER_GROUPS: Final = frozenset({"inductor", "functorch"})

_NAMED: Final = 3
"""How many differences a reason names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """Why a program was not found: the nearest stored key, and what differs from it.

    `nearest_model` is the model of that program where it is another, else None.
    """

    nearest_key: str | None
    changes: tuple[Change, ...]
    nearest_model: str | None = None

    def to_json(self) -> dict[str, JsonValue]:
        """The miss as `warm` and `inspect-key` print it with `--json`."""
        return {
            "nearest_key": self.nearest_key,
            "nearest_model": self.nearest_model,
            "changes": [change.to_json() for change in self.changes],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A record whose sources and guarded values are current, and its artifacts."""

    record: ProgramRecord
    artifacts: dict[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeseenUnit:
    """A compile unit that a warm would need: `artifact` is None where it would be compiled."""

    pieces: tuple[str, ...]
    range: str
    artifact: str | None
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a warm would do: on a hit of the program with what it found, else with the reasons.

    `units` and `pieces` (the counts of a record) are empty where only capture can tell them.
    """

    outcome: PredictedOutcome
    reason: str
    program: Literal["hit", "miss"] = "miss"
    miss: Miss | None = None
    units: tuple[ForeseenUnit, ...] = ()
    pieces: dict[str, int] | None = None


def lookup(job: Job, store: Store, meanwhile: Meanwhile | None = None) -> Found | None:
    """The stored program of `job`, verified whole; None where there is none.

    Raises `CorruptRecordError`, `CorruptArtifact` and `MissingArtifact`, and what `meanwhile` does.
    """
    for record in store.programs(job.key):
        if is_current(record, job):
            return Found(record=record, artifacts=_artifacts(record, store, meanwhile))
    return None


def _artifacts(
    record: ProgramRecord, store: Store, meanwhile: Meanwhile | None
) -> dict[str, bytes]:
    def read() -> dict[str, bytes]:
        digests = {unit.artifact for unit in record.units}
        return {digest: store.read_artifact(digest) for digest in sorted(digests)}

    if meanwhile is None:
        return read()
    from concurrent.futures import ThreadPoolExecutor

    # Reading and hashing need no interpreter, so the other thread keeps it.
    with ThreadPoolExecutor(max_workers=1) as pool:
        reading = pool.submit(read)
        meanwhile(record)
        return reading.result()


def is_current(record: ProgramRecord, job: Job) -> bool:
    """Whether the source files and values that the record's capture depended on are as then."""
    if verify(record.sources):
        return False
    now = job.read_guarded(tuple(record.guarded))
    # Not `==` between values: Python takes 1, 1.0 and True for equal.
    return not {UNREADABLE, REDACTED} & {*map(str, record.guarded.values())} and (
        canonical_json(now) == canonical_json(record.guarded)
    )


def keyed(job: Job, graph: str, tokens: str) -> tuple[Factor, ...]:
    """The factors of a unit's key: the compiler's, the digest of the graph, and the range.

    The model plays no part, so that models with the same layers share artifacts.
    """
    own = (("graph", "digest", graph), ("range", "tokens", tokens))
    return (
        *job.compiler_factors,
        *(
            Factor(group=group, name=name, value=value, origin="probe", is_default=False)
            for group, name, value in own
        ),
    )


def predict(job: Job, store: Store) -> Prediction:
    """What `obtain_program` would find, without capturing or compiling anything.

    A `miss` compiles something for certain, and a `hit` nothing. Where neither can be known it is
    `unknown`: the graph shows only in a capture, and other programs may have stored its units.
    """
    try:
        found = lookup(job, store)
        if found is not None:
            return _hit(found)
        miss = explain_miss(job, store)
        return _predict_units(job, store, miss)
    except UnsafeCacheError as error:
        return Prediction(outcome="unsafe", reason=str(error))
    except MissingArtifact as error:
        return Prediction(
            outcome="miss", reason=str(error), miss=Miss(nearest_key=job.key, changes=())
        )


def explain_miss(job: Job, store: Store) -> Miss:
    """The nearest stored program, and the factors, source files or values in which it differs."""
    record = _nearest(job, store)
    if record is None:
        return Miss(nearest_key=None, changes=())
    files = diff_sources(record.sources, current(record.sources))
    changes = [*diff(record.factors, job.factors), *files]
    other = None if record.model == job.label else record.model
    if other is None:
        # To read those of another model would be to import its code beside this one's. To read any
        # is to import the modules that they name, so of what is not trusted none is.
        with suppress(Untrusted):
            if (used := store.program(record.key, record.id)) is not None:
                guarded = job.read_guarded(tuple(used.guarded))
                changes += diff_guarded(used.guarded, guarded, files_changed=bool(files))
    return Miss(nearest_key=record.key, changes=tuple(changes), nearest_model=other)


def _nearest(job: Job, store: Store) -> ProgramRecord | None:
    ranked = by_distance(job.factors, store.outlines(), job.label)
    return next(filter(None, (store.readable_program(key, id) for key, id in ranked)), None)


def _hit(found: Found) -> Prediction:
    units = tuple(
        ForeseenUnit(
            pieces=unit.pieces,
            range=unit.range,
            artifact=unit.artifact,
            bytes=len(found.artifacts[unit.artifact]),
        )
        for unit in found.record.units
    )
    return Prediction(
        outcome="hit",
        reason="the program is stored",
        program="hit",
        units=units,
        pieces=found.record.pieces,
    )


def _predict_units(job: Job, store: Store, miss: Miss) -> Prediction:
    why = _why(job, miss)
    stored = store.ranges_compiled_by(key_of(job.compiler_factors))
    if not stored:
        return Prediction(outcome="miss", reason=why, miss=miss)
    # A language model has pieces whose code depends on the token count: attention's inputs do.
    lacking = [given for given in unit_ranges(job.spec) if str(given) not in stored]
    if lacking and job.model.runs_in_engine:
        what = f"nothing is stored for {lacking[0].tokens}"
        return Prediction(outcome="miss", reason=f"{why}; {what}", miss=miss)
    twin = _captured_alike(job, store)
    units = None if twin is None else _foresee(job, store, twin)
    if twin is None or units is None:
        return Prediction(
            outcome="unknown",
            reason=f"{why}; whether stored units of other programs serve it is known only "
            "once the model is captured",
            miss=miss,
        )
    compiled = sum(unit.artifact is None for unit in units)
    how = f"{compiled} of {len(units)} units" if compiled else "none of its units"
    return Prediction(
        outcome="miss" if compiled else "hit",
        reason=f"{why}; {how} would be compiled",
        miss=miss,
        units=units,
        pieces=twin.pieces,
    )


def _why(job: Job, miss: Miss) -> str:
    if miss.nearest_key is None:
        return "the cache holds no program yet"
    if miss.nearest_model is not None:
        return f"the cache holds no program of {job.label}"
    groups = {change.group for change in miss.changes}
    if not groups:
        return "a Python value that the model reads is secret, or only capturing it can look it up"
    if groups == {"sources"}:
        return f"source files changed since it was stored: {_named(c.name for c in miss.changes)}"
    if groups == {"guarded"}:
        names = _named(c.name for c in miss.changes)
        return f"Python values that the model reads changed since it was stored: {names}"
    names = _named(f"{c.group}.{c.name}" for c in miss.changes)
    return f"the nearest stored program differs in {names}"


def _named(names: Iterable[str]) -> str:
    every = list(dict.fromkeys(names))
    more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return f"{', '.join(every[:_NAMED])}{more}"


def _captured_alike(job: Job, store: Store) -> ProgramRecord | None:
    """A program that capture made of the same model in the same way, whatever compiled it.

    Raises `Untrusted`.
    """
    wanted = _to_capture({f.identity: f.compared for f in job.factors if f.affects_key})
    for outline in store.outlines():
        known = _to_capture(outline.values)
        if known.keys() == wanted.keys() and all(alike(known[k], wanted[k]) for k in wanted):
            record = store.program(outline.key, outline.id)
            if record is not None and is_current(record, job):
                return record
    return None


def _to_capture(values: Mapping[tuple[str, str], JsonValue]) -> dict[tuple[str, str], JsonValue]:
    return {k: v for k, v in values.items() if k[0] not in _COMPILER_GROUPS}


def _foresee(job: Job, store: Store, twin: ProgramRecord) -> tuple[ForeseenUnit, ...] | None:
    """The units of `twin`, compiled as `job` asks; None where one of them has left the store.

    Raises `CorruptRecordError` and `CorruptArtifact`.
    """
    units = []
    for unit in twin.units:
        known = store.unit(unit.key)
        if known is None:
            return None
        key = key_of(keyed(job, str(known.value("graph", "digest")), unit.range))
        artifact, size = None, 0
        if (wanted := store.unit(key)) is not None:
            with suppress(MissingArtifact):
                size = len(store.read_artifact(wanted.artifact))
                artifact = wanted.artifact
        units.append(
            ForeseenUnit(pieces=unit.pieces, range=unit.range, artifact=artifact, bytes=size)
        )
    return tuple(units)
