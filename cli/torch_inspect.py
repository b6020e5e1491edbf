"""`vllmc inspect-key` of a TORCH_TRACE: the rows, and what they look like to a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from vllmc.cli.render import Listing, factors, facts, names
from vllmc.cli.report import notes
from vllmc.core.cache.key import Factor
from vllmc.core.diagnose.torch_caches import Compilation, Component, Lookup, read_trace
from vllmc.core.diagnose.torch_components import readable

Row = dict[str, Any]

_CACHES = {"fx_graph": "torch.fx_graph", "aot_autograd": "torch.aot_autograd"}
_OUTCOMES = {
    "hit": "hit",
    "partial": "hit in part",
    "miss": "miss",
    "bypass": "bypass",
    "disabled": "with the cache off",
    "none": "that asked no cache",
}


def torch_row(path: Path) -> Row:
    """What `inspect-key` prints of a trace. Raises what `read_trace` raises."""
    trace = read_trace(path)
    lookups = [lookup for c in trace.compilations for lookup in c.lookups if lookup.components]
    shared = {c: _shared(k for k in lookups if k.cache == c) for c in _CACHES}
    # Most of AOTAutograd's components are Inductor's.
    known = {component.name for component in shared["fx_graph"]}
    listed = {
        "fx_graph": shared["fx_graph"],
        "aot_autograd": [c for c in shared["aot_autograd"] if c.name not in known],
    }
    return {
        "model": "",
        "key": "",
        "factors": [_factor(_CACHES[cache], c) for cache, found in listed.items() for c in found],
        "excluded": [],
        "torch": trace.torch,
        "compilations": [_compilation(c, shared) for c in trace.compilations],
        "notes": list(trace.notes),
    }


def _shared(lookups: Iterable[Lookup]) -> list[Component]:
    """The components that are the same in all lookups."""
    first, *others = [dict.fromkeys(lookup.components) for lookup in lookups] or [{}]
    return [component for component in first if all(component in other for other in others)]


def _factor(group: str, component: Component) -> Row:
    value = readable(component)
    factor = Factor(group=group, name=component.name, value=value, origin="probe", is_default=False)
    return {**factor.to_json(), "digest": component.digest}


def _compilation(compilation: Compilation, shared: Mapping[str, Sequence[Component]]) -> Row:
    return {
        "id": compilation.id,
        "rank": compilation.rank,
        "frame": compilation.frame,
        "label": compilation.label,
        "outcome": compilation.outcome,
        "lookups": [
            {
                "cache": lookup.cache,
                "answer": lookup.answer,
                "key": lookup.key,
                "reason": lookup.reason,
                "backward": lookup.backward,
                "components": [
                    {"name": c.name, "value": readable(c), "digest": c.digest}
                    for c in lookup.components
                    if c not in shared[lookup.cache]
                ],
            }
            for lookup in compilation.lookups
        ],
    }


def torch_report(row: Row, *, whole: bool) -> RenderableType:
    """The report of a trace; `whole` shows also every key, and what the keys share."""
    rows = row["compilations"]
    reasons = _reasons(rows)
    parts: list[RenderableType] = [_verdict(rows, reasons)]
    if row["torch"]:
        parts.append(facts(("torch", row["torch"])))
    if rows:
        parts += ["", _table(rows)]
    if len(reasons) > 1:
        told = (facts((answer, f"{names(w, 3)}: {r}")) for (answer, r), w in reasons.items())
        parts += ["", *told]
    if whole:
        parts += ["", _keys(rows), "", factors(row["factors"])]
    return Group(*parts, *notes(row["notes"]))


def _reasons(rows: Sequence[Row]) -> dict[tuple[str, str], list[str]]:
    """Each answer that has a reason, with the labels of the compilations that got it."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for lookup in row["lookups"]:
            if lookup["reason"]:
                where = reasons.setdefault((lookup["answer"], lookup["reason"]), [])
                where += [row["label"]] * (row["label"] not in where)
    return reasons


def _verdict(rows: Sequence[Row], reasons: Mapping[tuple[str, str], Sequence[str]]) -> Text:
    if not rows:
        return Text("no compilation is in this trace", style="bold yellow")
    counts = Counter(row["outcome"] for row in rows)
    said = ", ".join(f"{counts[o]} {what}" for o, what in _OUTCOMES.items() if counts[o])
    total = "1 compilation" if len(rows) == 1 else f"{len(rows)} compilations"
    why = next((f": {reason}" for _, reason in reasons), "")
    if len(reasons) > 1:
        why += f" (and {len(reasons) - 1} more, below)"
    style = "green" if set(counts) == {"hit"} else "yellow"
    return Text(f"{total}: {said}{why}", style=f"bold {style}")


def _table(rows: Sequence[Row]) -> RenderableType:
    return Listing(
        headings=("COMPILATION", "AOTAUTOGRAD", "FX GRAPH"),
        rows=tuple(
            (row["label"], _answers(row, "aot_autograd"), _answers(row, "fx_graph")) for row in rows
        ),
    )


def _answers(row: Row, cache: str) -> str:
    counts = Counter(k["answer"] for k in row["lookups"] if k["cache"] == cache)
    if counts.total() == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {answer}" for answer, count in counts.items()) or "not asked"


def _keys(rows: Sequence[Row]) -> RenderableType:
    return Listing(
        headings=("COMPILATION", "CACHE", "ANSWER", "KEY"),
        rows=tuple(
            (row["label"], k["cache"], k["answer"], k["key"])
            for row in rows
            for k in row["lookups"]
        ),
    )
