"""`vllmc cache`: what the cache holds and whether it is intact. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated

import typer

from vllmc.cli import render
from vllmc.cli.options import CommonFlags, command
from vllmc.core.cache.exchange import Imprint, imports_of
from vllmc.core.cache.key import Factor, JsonValue
from vllmc.core.cache.record import ProgramRecord, UnitRecord
from vllmc.core.errors import UnsafeCacheError

JsonRow = dict[str, JsonValue]


@command
def ls(common: CommonFlags) -> None:
    """List the compiled programs, the last used first."""
    store = common.settings().store()
    rows = [entry.to_json() for entry in store.entries()]
    common.output("cache ls").data({"entries": rows}, lambda: render.entries(rows))


@command
def show(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="A key, or its first 8 or more hex digits.")
    ],
    common: CommonFlags,
) -> None:
    """Show a stored record: its units, sources, pieces and factors.

    With --json, kind is program or unit. A program has records, one per version of its sources
    (key, id, model, created, pieces, units, sources, factor_groups), the newest first, and imports,
    the bundles that it came in (bundle, source, at, signed_by, key; the last two are empty where
    --trust-unsigned let it in); a unit has one record (key, artifact, format, code, bytes, seconds,
    created, factor_groups).
    """
    store = common.settings().store()
    full = store.resolve_prefix(key)
    record = store.record(full)
    output = common.output("cache show")
    if isinstance(record, UnitRecord):
        row = _unit_row(record)
        output.data({"key": full, "kind": "unit", "record": row}, lambda: render.unit(row))
        return
    rows = [_program_row(item) for item in record]
    notes = [_import_row(note) for note in imports_of(store, full)]
    output.data(
        {"key": full, "kind": "program", "records": rows, "imports": notes},
        lambda: render.programs(rows, notes),
    )


@command
def stats(common: CommonFlags) -> None:
    """Sum up what the cache holds.

    Hits are compile units that were found, in all uses of the programs that are stored; misses
    are those that were compiled, and dups the misses whose code was stored under another key.

    With --json, stats has programs, units, artifacts, bytes, unreferenced_bytes, inodes, hits,
    misses, dups, seconds_saved and by_model.
    """
    store = common.settings().store()
    row = dataclasses.asdict(store.stats())
    common.output("cache stats").data({"stats": row}, lambda: render.stats(row))


@command
def verify(
    common: CommonFlags,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is corrupt, and nothing else.")
    ] = False,
) -> int:
    """Read every artifact and record; exit 4 when anything is corrupt.

    With --json, problems has what was found (path, kind, detail), and removed what --repair
    removed (path, reason). With --repair the exit code is 0 unless something corrupt is left.
    """
    output = common.output("cache verify")
    store = common.settings().store()
    problems = store.verify()
    plan = store.plan_repair(problems)
    if repair:
        plan.execute()
    removals = plan.removals if repair else ()
    removed = {removal.path for removal in removals}
    left = [problem for problem in problems if problem.unsafe and problem.path not in removed]
    rows = [problem.to_json() for problem in problems]
    gone = [removal.to_json() for removal in removals]
    output.data({"problems": rows, "removed": gone}, lambda: render.problems(rows, gone))
    if plan.removals and not repair:
        output.note("hint: vllmc cache verify --repair removes just what is corrupt")
    return UnsafeCacheError.exit_code if left else 0


@command
def path(common: CommonFlags) -> None:
    """Print where the cache lies.

    With --json, path, below (the layers that are only read) and origin: flag, env:NAME,
    file:NAME:LINE or default.
    """
    settings = common.settings()
    where, *below = map(str, settings.cache_dirs)
    common.output("cache path").data(
        {"path": where, "below": below, "origin": settings.cache_dir_origin},
        lambda: "\n".join([where, *below]),
    )


def _program_row(record: ProgramRecord) -> JsonRow:
    return {
        "key": record.key,
        "id": record.id,
        "model": record.model,
        "created": record.created,
        "pieces": {**record.pieces},
        "units": [
            {
                "key": unit.key,
                "range": unit.range,
                "pieces": list(unit.pieces),
                "artifact": unit.artifact,
            }
            for unit in record.units
        ],
        "sources": [
            {
                "package": source.package,
                "path": source.path,
                "digest": source.digest,
                "functions": list(source.functions),
            }
            for source in record.sources
        ],
        "factor_groups": _factor_groups(record.factors),
    }


def _import_row(note: Imprint) -> JsonRow:
    return {
        "bundle": note.bundle,
        "source": note.source,
        "at": note.at,
        "signed_by": note.signed_by,
        "key": note.key,
    }


def _unit_row(record: UnitRecord) -> JsonRow:
    return {
        "key": record.key,
        "artifact": record.artifact,
        "format": record.format,
        "code": record.code,
        "bytes": record.bytes,
        "seconds": record.seconds,
        "created": record.created,
        "factor_groups": _factor_groups(record.factors),
    }


def _factor_groups(factors: Iterable[Factor]) -> list[JsonValue]:
    groups: dict[str, list[Factor]] = {}
    for factor in factors:
        groups.setdefault(factor.group, []).append(factor)
    return [
        {
            "group": group,
            "factors": len(members),
            "not_default": [factor.name for factor in members if not factor.is_default],
        }
        for group, members in groups.items()
    ]
