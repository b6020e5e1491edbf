"""What the store holds for a job, and why it lacks it: nothing is captured or compiled here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from vllmc.core.cache.explain import Change, diff, diff_sources, nearest
from vllmc.core.cache.files import MissingArtifact
from vllmc.core.cache.key import key_of
from vllmc.core.cache.record import ProgramRecord
from vllmc.core.cache.sources import current, verify
from vllmc.core.cache.store import Store
from vllmc.core.errors import UnsafeCacheError
from vllmc.core.job import Job

PredictedOutcome: TypeAlias = Literal["hit", "miss", "unknown", "unsafe"]

GRAPH_GROUPS = frozenset({"graph", "range"})
"""The groups of a unit key that come on top of the job's compiler factors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """Why a program was not found: the nearest stored key, and what differs from it."""

    nearest_key: str | None
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A record whose sources are current, and its artifacts."""

    record: ProgramRecord
    artifacts: dict[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a warm would find: on a hit the program itself, otherwise why it is not there."""

    outcome: PredictedOutcome
    reason: str
    miss: Miss | None
    found: Found | None


def lookup(job: Job, store: Store) -> Found | None:
    """The stored program of `job`, verified whole; None where there is none.

    Raises `CorruptRecordError`, `CorruptArtifact` and `MissingArtifact`.
    """
    for record in store.programs(job.key):
        if not verify(record.sources):
            digests = {unit.artifact for unit in record.units}
            return Found(
                record=record, artifacts={d: store.read_artifact(d) for d in sorted(digests)}
            )
    return None


def predict(job: Job, store: Store) -> Prediction:
    """What `obtain_program` would find, without capturing or compiling anything."""
    try:
        found = lookup(job, store)
    except UnsafeCacheError as error:
        return Prediction(outcome="unsafe", reason=str(error), miss=None, found=None)
    except MissingArtifact as error:
        miss = Miss(nearest_key=job.key, changes=())
        return Prediction(outcome="miss", reason=str(error), miss=miss, found=None)
    if found is not None:
        return Prediction(outcome="hit", reason="the program is stored", miss=None, found=found)
    miss = explain_miss(job, store)
    reason = _miss_reason(job, miss)
    if _shares_compiler(job, store):
        return Prediction(
            outcome="unknown",
            reason=f"{reason}; whether stored units of other programs serve it is known only "
            "once the model is captured",
            miss=miss,
            found=None,
        )
    return Prediction(outcome="miss", reason=reason, miss=miss, found=None)


def explain_miss(job: Job, store: Store) -> Miss:
    """The nearest stored program, and the factors or source files in which it differs."""
    record = nearest(job.factors, store.readable_programs(), job.label)
    if record is None:
        return Miss(nearest_key=None, changes=())
    changes = (
        *diff(record.factors, job.factors),
        *diff_sources(record.sources, current(record.sources)),
    )
    return Miss(nearest_key=record.key, changes=changes)


def _miss_reason(job: Job, miss: Miss) -> str:
    if miss.nearest_key is None:
        return "the cache holds no program yet"
    if miss.nearest_key == job.key:
        return "source files changed since the program was stored"
    count = "1 difference" if len(miss.changes) == 1 else f"{len(miss.changes)} differences"
    return f"no program is stored under this key; the nearest has {count}"


def _shares_compiler(job: Job, store: Store) -> bool:
    wanted = key_of(job.compiler_factors)
    return any(
        key_of(f for f in unit.factors if f.group not in GRAPH_GROUPS) == wanted
        for unit in store.readable_units()
    )
