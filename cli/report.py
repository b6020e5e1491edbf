"""What commands that compile or compare say to a person, from the rows that `--json` prints."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from vllmc.cli.render import (
    Listing,
    changes,
    count,
    duration,
    factors,
    facts,
    name_cost,
    named_argument,
    names,
    short_key,
    size,
)

Row = Mapping[str, Any]

_OUTCOMES = {
    "hit": ("green", "nothing had to be compiled"),
    "compiled": ("yellow", "none of its units was stored, so all were compiled"),
    "partial": ("yellow", "some units were stored, the others were compiled"),
    "would-hit": ("green", "everything is stored"),
    "would-miss": ("yellow", "a warm would compile"),
    "unknown": ("yellow", "only capture can tell"),
    "unsafe": ("red", "the cache holds something that must not be used"),
    "failed": ("red", "it could not be compiled"),
}
_FORCED = "everything was compiled again, as --force asks"
_DUP = "dup: compiled now, and the code turned out to be stored already under another key"
_COUNTS = {
    "hit": "from the cache",
    "compiled": "compiled",
    "dup": "compiled to code that was stored already",
}
_SHOWN_CHANGES = 12
_SHOWN_FACTORS = 16
_SHOWN_NUMBERS = 6


def warm(rows: Sequence[Row], *, verbose: bool = False) -> RenderableType:
    """The report of `warm`, one part per model; `verbose` shows what the passes did."""
    parts: list[RenderableType] = []
    for row in rows:
        parts += ["", _warm_one(row)] if parts else [_warm_one(row)]
        if verbose and row["passes"]:
            parts += ["", *_passes(row["passes"])]
    if len(rows) > 1:
        outcomes = collections.Counter(row["outcome"] for row in rows)
        told = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        parts += ["", Text(f"{len(rows)} in all: {told}", style="bold")]
    return Group(*parts)


def _warm_one(row: Row) -> RenderableType:
    style, meaning = _OUTCOMES[row["outcome"]]
    if row["program"] == "miss" and row["miss"] is None:
        meaning = _FORCED
    lines = [("entry", row["name"])] if row["name"] != row["model"] else []
    lines.append(("model", row["model"]))
    if row["key"] is not None:
        lines.append(("key", short_key(row["key"])))
    if row["pieces"] is not None:
        pieces = row["pieces"]
        lines.append(
            (
                "pieces",
                f"{pieces['total']}: {pieces['splitting']} splitting, "
                f"{pieces['compilable']} compilable, {pieces['unique']} unique",
            )
        )
    if row["units"]:
        lines.append(("units", _counts(row["counts"])))
    if row["saved_seconds"]:
        lines.append(("saved", f"{duration(row['saved_seconds'])} that what was found took once"))
    if row["seconds"]["total"]:
        lines += [("time", _times(row["seconds"])), ("memory", f"{row['peak_rss_mb']} MB at most")]
    parts: list[RenderableType] = [
        Text.assemble((row["outcome"], f"bold {style}"), f"  {row.get('reason') or meaning}"),
        facts(*lines),
    ]
    if row["units"] and row["outcome"] != "would-hit":
        parts += ["", _units(row["units"])]
    if row["counts"]["dup"]:
        parts.append(Text(_DUP, style="dim"))
    if row["layer_names"] is not None:
        parts += ["", *_layer_names(row["layer_names"])]
    if row["miss"] is not None and row["miss"]["nearest_key"] is not None:
        parts += ["", *_miss(row["miss"])]
    return Group(*parts)


def _counts(counts: Row) -> str:
    return ", ".join(f"{counts[name]} {what}" for name, what in _COUNTS.items() if counts[name])


def _times(seconds: Row) -> str:
    spent = [f"{duration(seconds[n])} {n}" for n in ("capture", "compile") if seconds[n]]
    total = duration(seconds["total"])
    return f"{total} ({', '.join(spent)})" if spent else total


def _units(units: Sequence[Row]) -> RenderableType:
    return Listing(
        headings=("UNIT", "RANGE", "OUTCOME", ">SIZE", ">TIME", "ARTIFACT"),
        rows=tuple(
            (
                names(unit["pieces"], 3),
                unit["range"],
                unit["outcome"],
                size(unit["bytes"]),
                duration(unit["seconds"]) if unit["seconds"] else "",
                short_key(unit["artifact"]),
            )
            for unit in units
        ),
    )


def _passes(rows: Sequence[Row]) -> list[RenderableType]:
    table = Listing(
        headings=("PASS", ">MATCHES", "NODES", ">TIME"),
        rows=tuple(
            (
                row["name"],
                str(row["matches"]),
                f"{row['nodes_before']} to {row['nodes_after']}",
                duration(row["seconds"]),
            )
            for row in rows
        ),
    )
    parts: list[RenderableType] = [table]
    for row in rows:
        if (missed := row["missed"]) is not None:
            done = "does not match all" if row["matches"] else "matched nothing"
            parts.append(
                Text(
                    f"{row['name']} {done}: in {missed['graph']}, at {missed['node']}, it "
                    f"expected {missed['expected']} and found {missed['found']}",
                    style="yellow",
                )
            )
    return parts


def _layer_names(row: Row) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(name_cost(row), style="yellow")]
    for fix, ops in itertools.groupby(row["ops"], key=lambda op: op["fix"]):
        found = [(named_argument(op), names(op["pieces"], 3)) for op in ops]
        lines = [line for op, pieces in found for line in (("op", op), ("in", pieces))]
        parts.append(facts(*lines, ("fix", fix)))
    return parts


def _miss(miss: Row) -> list[RenderableType]:
    nearest = short_key(miss["nearest_key"])
    rows = miss["changes"]
    if miss["nearest_model"]:
        others = sum(change["class"] != "identity" for change in rows)
        compiled = f"with {count(others, 'other difference')}" if others else "compiled alike"
        return [
            Text(
                f"the nearest program, {nearest}, is one of {miss['nearest_model']}, {compiled}",
                style="dim",
            )
        ]
    if not rows:
        return [Text(f"the record of {nearest} is stored, but not all that it names")]
    return [
        Text(f"what differs from {nearest}, the nearest program in the cache:"),
        changes_table(rows),
        *restores(rows),
    ]


def restores(rows: Sequence[Row]) -> list[RenderableType]:
    """What to type or set to be rid of the first differences, one line each."""
    known = [row for row in rows[:_SHOWN_CHANGES] if row["restore"]]
    # The parts of a nested value are restored as one.
    first = {row["restore"]: f"{row['group']}.{row['name']}" for row in reversed(known)}
    lines = [(name, how) for how, name in reversed(first.items())]
    return ["", Text("to have it as it was:"), facts(*lines)] if lines else []


def changes_table(rows: Sequence[Row], limit: int = _SHOWN_CHANGES) -> RenderableType:
    """The first rows CHANGE, and how many more there are."""
    if len(rows) <= limit:
        return changes(rows)
    more = Text(f"and {len(rows) - limit} more; --json lists them all", style="dim")
    return Group(changes(rows[:limit]), more)


def inspect(row: Row, *, whole: bool) -> RenderableType:
    """The report of `inspect-key`: the prediction, and the factors that somebody set.

    `whole` shows every factor, and what is none.
    """
    # A unit serves any model, and names none.
    lines = [("model", row["model"])] if row["model"] else []
    parts: list[RenderableType] = [facts(*lines, ("key", row["key"]))]
    if (prediction := row.get("prediction")) is not None:
        parts += ["", *_prediction(prediction)]
    shown = [f for f in row["factors"] if whole or not f["is_default"] or not f["affects_key"]]
    parts += ["", factors(shown, limit=None if whole else _SHOWN_FACTORS)]
    if whole and row["excluded"]:
        excluded = tuple((item["name"], item["reason"]) for item in row["excluded"])
        parts += ["", Listing(headings=("NO FACTOR", "WHY"), rows=excluded)]
    elif not whole:
        hidden = len(row["factors"]) - len(shown)
        parts += ["", Text(f"{hidden} more that nobody set; -v shows them", style="dim")]
    return Group(*parts)


def _prediction(prediction: Row) -> list[RenderableType]:
    style = {"hit": "green", "unsafe": "red"}.get(prediction["outcome"], "yellow")
    head = Text.assemble(
        ("prediction  ", "bold"),
        (prediction["outcome"], f"bold {style}"),
        f"  {prediction['reason']}",
    )
    if not prediction["changes"]:
        return [head]
    return [head, *_miss(prediction)]


def diff(row: Row) -> RenderableType:
    """The report of `diff-config`: the verdict, the two sides, the differences, the remarks."""
    a, b = (f"{row[side]['kind']} {row[side]['name']}".strip() for side in ("a", "b"))
    parts: list[RenderableType] = [_verdict(row), facts(("a", a), ("b", b)), ""]
    if row["changes"]:
        parts.append(changes(row["changes"]))
    if row["a"]["kind"].startswith("vllm"):
        parts += restores(row["changes"])
    parts.append(Text(f"{row['same']} factors are the same", style="dim"))
    return Group(*parts, *notes(row["notes"]))


def _verdict(row: Row) -> RenderableType:
    if row["equal"]:
        return Text("equal: no difference affects the key", style="bold green")
    causes = [f"{c['group']}.{c['name']}" for c in row["changes"] if c["affects_key"]]
    what = "1 difference affects" if len(causes) == 1 else f"{len(causes)} differences affect"
    return Text(f"{what} the key: {names(causes, 3)}", style="bold yellow")


def notes(remarks: Sequence[str]) -> list[RenderableType]:
    """Remarks below a report, one paragraph each; nothing where there are none."""
    return ["", *(facts(("note", remark)) for remark in remarks)] if remarks else []


def run(row: Row) -> RenderableType:
    """The report of `run`: the outputs, the speed, and every recompile with its cure."""
    parts: list[RenderableType] = []
    for output in row["outputs"]:
        generated = output["text"]
        if generated is None:
            generated = ", ".join(map(str, output["token_ids"]))
        parts += [Text(f"> {output['prompt']}", style="dim"), Text(generated)]
    seconds, rates = row["seconds"], row["tokens_per_second"]
    parts += [
        "",
        facts(
            ("units", _counts(row["counts"])),
            ("load", duration(seconds["load"])),
            ("first token", duration(seconds["first_token"])),
            ("speed", f"prefill {rates['prefill']:.0f}, decode {rates['decode']:.0f} tokens/s"),
            ("recompiles", str(sum(r["count"] for r in row["recompiles"]))),
        ),
    ]
    for recompile in row["recompiles"]:
        parts += ["", _recompile(recompile)]
    return Group(*parts)


def embeddings(row: Row) -> RenderableType:
    """The report of `run --embed`: the beginning of each embedding, the speed, every recompile."""
    parts: list[RenderableType] = []
    for found in row["embeddings"]:
        numbers = found["embedding"]
        shown = ", ".join(f"{number:.4f}" for number in numbers[:_SHOWN_NUMBERS])
        more = f", ... ({len(numbers)} numbers)" if len(numbers) > _SHOWN_NUMBERS else ""
        parts += [Text(f"> {found['prompt']}", style="dim"), Text(f"{shown}{more}")]
    parts += [
        "",
        facts(
            ("units", _counts(row["counts"])),
            ("pooling", row["pooling"]),
            ("load", duration(row["seconds"]["load"])),
            ("speed", f"{row['tokens_per_second']:.0f} tokens/s"),
            ("recompiles", str(sum(r["count"] for r in row["recompiles"]))),
        ),
    ]
    for recompile in row["recompiles"]:
        parts += ["", _recompile(recompile)]
    return Group(*parts)


def recompiles(row: Row) -> RenderableType:
    """The report of `recompiles`: what compiled again and its cure, then what is no recompile."""
    times = sum(r["count"] for r in row["recompiles"])
    head = count(times, "recompile") if times else "no recompiles"
    parts: list[RenderableType] = [Text(head, style="bold yellow" if times else "bold green")]
    for recompile in row["recompiles"]:
        parts += ["", _recompile(recompile)]
    apart = [f"{count(row['graph_breaks'], 'graph break')}"] if row["graph_breaks"] else []
    if row["first_compilations"] is not None:
        apart.append(count(row["first_compilations"], "first compilation"))
    if apart:
        parts += ["", Text(f"apart from these: {', '.join(apart)}", style="dim")]
    return Group(*parts, *notes(row["notes"]))


def _recompile(row: Row) -> RenderableType:
    lines = [("frame", row["frame"]), ("guard", row["guard"]), ("class", row["class"])]
    if row["expected"]:
        observed = f", found {row['observed']}" if row["observed"] else ""
        lines.append(("expected", f"{row['expected']}{observed}"))
    lines.append(("times", str(row["count"])))
    if row["pattern"]:
        lines.append(("pattern", row["pattern"]))
    if row["cost_seconds"] is not None:
        lines.append(("cost", duration(row["cost_seconds"])))
    if row["limit_hit"]:
        lines.append(
            ("limit", "the recompile limit was hit: eager since then (fullgraph=True: an error)")
        )
    if row["dropped"]:
        lines.append(("dropped", "nothing compiled again: steps that broke it may be wrong"))
    return facts(*lines, ("fix", row["fix"]))
