"""`vllmc inspect-key` of a vLLM cache directory: the rows, and what they look like to a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from vllmc.cli.render import Listing, factors, facts, moment, names, plain_value, short_key, size
from vllmc.cli.report import notes
from vllmc.core.diagnose.foreign_files import clean
from vllmc.core.diagnose.vllm_cache import Compilation, VllmCache, duplicates, read_caches
from vllmc.core.diagnose.vllm_compare import cache_subjects, compare_keys
from vllmc.core.diagnose.vllm_factors import (
    ENVIRONMENT,
    HASHES,
    RELEASE,
    KeyFacts,
    follows_handles,
    moving,
    spurious,
)
from vllmc.core.diagnose.vllm_graph import source_roots

Row = dict[str, Any]

_ROLES = {
    "handle": "vLLM before 0.32 looks for artifacts there, also when they were moved",
    "moved": "not where the artifacts are now; vLLM before 0.32 looks for them there",
    "factor": "hashed: another path is another key",
    "source": "hashed with the sources: another path is another key",
    "artifact": "mentioned in artifacts; whether it is used is not known",
}


def vllm_row(path: Path) -> Row:
    """What `inspect-key` prints of the caches in a directory.

    `key` and `factors` are those of the only cache, and empty where there are several.
    """
    caches = read_caches(path)
    if len(caches) == 1:
        caches = read_caches(path, contents=True)
    only = caches[0] if len(caches) == 1 else None
    facts = only.main.facts if only and only.main else KeyFacts()
    known = (*facts.factors, *facts.fields)
    previous: dict[str, VllmCache] = {}
    rows = []
    for cache in caches:
        rows.append(_cache_row(cache, previous.get(cache.kind)))
        previous[cache.kind] = cache
    return {
        "model": "",
        "key": only.key if only else "",
        "factors": [factor.to_json() for factor in known],
        "excluded": [],
        "caches": rows,
    }


def _cache_row(cache: VllmCache, previous: VllmCache | None) -> Row:
    known = cache.main.facts if cache.main else KeyFacts()
    twins = duplicates(cache.artifacts)
    read = all(artifact.digest for artifact in cache.artifacts)
    return {
        "kind": cache.kind,
        "key": cache.key,
        "path": clean(str(cache.path)),
        "release": cache.release,
        "bytes": cache.bytes,
        "modified": cache.modified,
        "compilations": [_compilation_row(compilation) for compilation in cache.compilations],
        "artifacts": twins.artifacts,
        "unique_artifacts": twins.unique if read else None,
        "duplicate_bytes": twins.bytes if read else None,
        "stores": dict(cache.stores),
        "spurious": [_spurious_row(name, known.environment[name]) for name in moving(known)],
        "secrets": list(known.secrets),
        "paths": [row for compilation in cache.compilations[:1] for row in _paths(compilation)],
        "differs": _differs(previous, cache) if previous else None,
        "notes": list(cache.notes),
    }


def _compilation_row(compilation: Compilation) -> Row:
    return {
        "label": compilation.label,
        "pieces": len(compilation.graph.pieces) if compilation.graph else None,
        "ranges": list(compilation.ranges),
        "artifacts": [
            {
                "name": artifact.name,
                "range": artifact.range,
                "piece": artifact.piece,
                "bytes": artifact.bytes,
                "digest": artifact.digest,
            }
            for artifact in compilation.artifacts
        ],
    }


def _spurious_row(name: str, value: object) -> Row:
    known = spurious(name)
    assert known is not None, "only spurious factors are listed"
    return {"name": name, "value": value, "reason": known.reason, "advice": known.advice}


def _paths(compilation: Compilation) -> list[Row]:
    places = compilation.places
    environment = compilation.facts.environment
    found = []
    if follows_handles(environment):
        role = "moved" if places.moved else "handle"
        found.append((role, "vllm_compile_cache.py", places.handles))
    for name, value in environment.items():
        if isinstance(value, str) and value.startswith("/"):
            found.append(("factor", name, (value,)))
    found.append(("source", "computation_graph.py", source_roots(places.sources)))
    for place, count in places.artifacts:
        found.append(("artifact", "1 artifact" if count == 1 else f"{count} artifacts", (place,)))
    return [
        {"path": path, "role": role, "where": where, "meaning": _ROLES[role]}
        for role, where, paths in found
        for path in paths
    ]


def _differs(before: VllmCache, after: VllmCache) -> list[str]:
    compared = compare_keys(cache_subjects(before)[0], cache_subjects(after)[0])
    return [
        change.name if change.group == ENVIRONMENT else f"{change.group}.{change.name}"
        for change in compared.changes
        if change.affects_key
    ]


def vllm_report(row: Mapping[str, Any], *, whole: bool) -> RenderableType:
    """The report of a cache, or the list of several; `whole` shows every factor of one."""
    caches = row["caches"]
    if len(caches) > 1:
        return _several(caches)
    [cache] = caches
    parts: list[RenderableType] = [_verdict(row, cache), "", _head(row, cache)]
    if cache["spurious"]:
        parts += ["", _spurious(cache["spurious"])]
    if cache["paths"]:
        parts += ["", _paths_table(cache["paths"])]
    if whole:
        parts += ["", factors(row["factors"])]
    return Group(*parts, *notes(cache["notes"]))


def _verdict(row: Mapping[str, Any], cache: Row) -> RenderableType:
    if moved := [place["path"] for place in cache["paths"] if place["role"] == "moved"]:
        said = f"it was moved, and vLLM before 0.32 looks for its artifacts in {names(moved, 1)}"
        return Text(said, style="bold yellow")
    if not row["factors"]:
        return Text("what it is keyed by is not recorded", style="bold yellow")
    found = [item["name"] for item in cache["spurious"]]
    if not found:
        return Text("no spurious factor is known that ties it to one place", style="bold green")
    what = "1 spurious factor ties" if len(found) == 1 else f"{len(found)} spurious factors tie"
    return Text(f"{what} it to one place: {names(found, 3)}", style="bold yellow")


def _head(row: Mapping[str, Any], cache: Row) -> RenderableType:
    lines = [("key", cache["key"]), ("directory", cache["path"]), ("size", size(cache["bytes"]))]
    if cache["release"]:
        known = [f["value"] for f in row["factors"] if (f["group"], f["name"]) == RELEASE]
        how = "" if cache["release"] in known else ", by the variables it hashes"
        lines.append(("vLLM", f"{cache['release']}{how}"))
    parts = cache["compilations"]
    if parts:
        lines.append(("parts", names([part["label"] for part in parts])))
        pieces = parts[0]["pieces"]
        lines.append(("pieces", "not known" if pieces is None else str(pieces)))
        lines.append(("ranges", names(parts[0]["ranges"]) or "none"))
    if cache["artifacts"]:
        saved = f"storing each once saves {size(cache['duplicate_bytes'])}"
        unique = f"{cache['unique_artifacts']} unique"
        lines.append(("artifacts", f"{cache['artifacts']}, {unique}; {saved}"))
    for name, count in cache["stores"].items():
        lines.append((name, size(count)))
    if row["factors"]:
        lines.append(("factors", f"{_counted(row['factors'])}; -v shows all"))
    if cache["secrets"]:
        lines.append(("secrets", f"recorded in plain text: {names(cache['secrets'])}"))
    return facts(*lines)


def _counted(rows: Sequence[Row]) -> str:
    """How many factors of each kind there are."""
    fields = [row for row in rows if row["name"] != "hash" and row["affects_key"]]
    count = Counter(row["group"] for row in fields)
    config, code, compiler = HASHES.values()
    variables = f"{count[ENVIRONMENT]} variables"
    if len(count) == 1:
        return f"{variables}, and hashes of config, code and compiler"
    return (
        f"{variables}, {count[config]} fields of the config, {count[code]} of the code, "
        f"{count[compiler]} of the compiler"
    )


def _spurious(rows: Sequence[Row]) -> RenderableType:
    return Listing(
        headings=("SPURIOUS FACTOR", "VALUE", "WHY, AND WHAT TO DO"),
        rows=tuple(
            (row["name"], plain_value(row["value"]), f"{row['reason']}: {row['advice']}")
            for row in rows
        ),
    )


def _paths_table(rows: Sequence[Row]) -> RenderableType:
    return Listing(
        headings=("PATH", "IN", "WHAT IT MEANS"),
        rows=tuple((row["path"], row["where"], row["meaning"]) for row in rows),
    )


def _several(caches: Sequence[Row]) -> RenderableType:
    total = size(sum(cache["bytes"] for cache in caches))
    listing = Listing(
        headings=("KEY", "KIND", "MODIFIED", ">SIZE", "DIFFERS FROM THE ONE BEFORE IN"),
        rows=tuple(
            (
                short_key(cache["key"]),
                cache["kind"],
                moment(cache["modified"]),
                size(cache["bytes"]),
                _difference(cache),
            )
            for cache in caches
        ),
    )
    return Group(
        Text(f"{len(caches)} keys, {total}; give the directory of one to see it", style="bold"),
        "",
        listing,
        *notes(
            [f"{short_key(cache['key'])}: {note}" for cache in caches for note in cache["notes"]]
        ),
    )


def _difference(cache: Row) -> str:
    if cache["kind"] == "aot" and cache["differs"] == ["vllm.key"]:
        return "not recorded"
    if cache["differs"] is None:
        return ""
    return names(cache["differs"], 3) or "nothing"
