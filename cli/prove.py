"""`vllmc diff-config --prove MODEL`: what the changes change in the code of a model's pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from vllmc.cli import job as jobs
from vllmc.cli.options import CompileRequest
from vllmc.cli.output import Output
from vllmc.cli.render import Listing, names, plain_value
from vllmc.cli.report import diff as diff_report
from vllmc.cli.settings import Settings
from vllmc.cli.snapshots import Side
from vllmc.core.cache.explain import diff
from vllmc.core.cache.key import Factor

if TYPE_CHECKING:
    from vllmc.core.proof.compare import Verdict
    from vllmc.core.proof.prove import Proof, ProvedChange

Row = dict[str, Any]

_RESULTS = "the results on random inputs"
_FOLLOWS = "it follows from the other changes, and is proved with them"


def print_proof(
    row: Row, sides: tuple[Side, Side], request: CompileRequest, settings: Settings, output: Output
) -> None:
    """Proves the differences in `row` of `diff-config`, and prints both.

    Of the request only the model and its layers count: all else is as the sides have it.
    """
    model = jobs.find_model(settings, request)
    from vllmc.core.proof.prove import prove
    from vllmc.core.proof.workbench import Workbench

    store = settings.store()
    with output.progress() as observer:
        bench = Workbench(model, environment=settings.environment, store=store, observer=observer)
        proof = prove(*_factors(*sides), bench)
    notes = _notes(proof)
    changes = [
        {**change, "note": "; ".join(filter(None, (change["note"], notes.get(_name(change)))))}
        for change in row["changes"]
    ]
    proof_row = _row(request.model, proof)
    output.data(
        {**row, "changes": changes, "proof": proof_row},
        lambda: Group(report(proof_row), "", diff_report(row)),
    )


def _factors(a: Side, b: Side) -> tuple[tuple[Factor, ...], tuple[Factor, ...]]:
    """The factors of both sides; sources too, where both know theirs."""
    if not a.sources or not b.sources:
        return a.factors, b.factors
    first, second = (
        (
            *side.factors,
            *(
                Factor(group="sources", name=f"{s.package}/{s.path}", value=s.digest)
                for s in side.sources
            ),
        )
        for side in (a, b)
    )
    return first, second


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['group']}.{row['name']}"


def _notes(proof: Proof) -> dict[str, str]:
    """What each CHANGE row may add to its note, by its name: a factor may have several."""
    notes = {}
    for change in proof.changes:
        before, after = ([side] if side else [] for side in change.pair)
        for leaf in diff(before, after):
            notes[f"{leaf.group}.{leaf.name}"] = _note(_change(change))
    return notes


def _row(model: str, proof: Proof) -> Row:
    changes = [_change(change) for change in proof.changes]
    return {
        "model": model,
        "pieces": proof.pieces,
        "changes": changes,
        "together": {
            **_verdict(proof.together),
            "changes": sum(change["code"] != "unproved" for change in changes),
        },
        "elsewhere": [".".join(identity) for identity in proof.elsewhere],
    }


def _change(change: ProvedChange) -> Row:
    group, name = change.identity
    before, after = (side.value if side else None for side in change.pair)
    row = {
        "group": group,
        "name": name,
        "before": before,
        "after": after,
        **_verdict(change.verdict),
    }
    return {**row, "code": "together", "reason": _FOLLOWS} if change.follows else row


def _verdict(verdict: Verdict) -> Row:
    return {
        "code": verdict.code,
        "units": len(verdict.differing),
        "of": verdict.of,
        "differing": list(verdict.differing),
        "bitwise": verdict.bitwise,
        "max_abs_diff": verdict.max_abs_diff,
        "reason": verdict.reason,
    }


def _note(row: Row) -> str:
    match row["code"]:
        case "unproved":
            return f"cannot be proved here: {row['reason']}"
        case "together":
            return str(row["reason"])
        case _:
            return f"proved: {_finding(row)}"


def _finding(row: Row) -> str:
    """What is known of the code and the results, in a sentence."""
    code = (
        "no piece's code differs"
        if row["code"] == "same"
        else f"the code of {row['units']} of {row['of']} units differs"
    )
    if row["bitwise"]:
        known = "" if row["code"] == "same" else f", {_RESULTS} are equal bit for bit"
    elif row["max_abs_diff"] is not None:
        known = f", and {_RESULTS} differ by at most {row['max_abs_diff']:.2g}"
    else:
        known = (
            f", {_RESULTS} differ" if row["bitwise"] is False else ", the results were not compared"
        )
    return code + known + (f" ({row['reason']})" if row["reason"] else "")


def report(proof: Row) -> RenderableType:
    """What was proved: the verdict, each change, and what is not proved."""
    shown = [row for row in proof["changes"] if row["code"] != "unproved"]
    unproved = [row for row in proof["changes"] if row["code"] == "unproved"]
    parts: list[RenderableType] = [_headline(proof, shown, unproved)]
    if shown:
        parts += ["", _findings(shown, proof["together"])]
    if unproved:
        parts += ["", _reasons(unproved)]
    if proof["elsewhere"]:
        text = "here these have another value than on both sides: "
        parts += ["", Text(text + names(proof["elsewhere"]), style="yellow")]
    return Group(*parts)


def _headline(proof: Row, shown: Sequence[Row], unproved: Sequence[Row]) -> Text:
    together = proof["together"]
    if not proof["changes"]:
        return Text("nothing to prove: no difference affects the key", style="bold green")
    if not shown:
        return Text(f"{proof['model']}: nothing can be proved here", style="bold yellow")
    rest = f"; {len(unproved)} more cannot be proved here" if unproved else ""
    number = "both" if len(shown) == 2 else f"all {len(shown)}"
    if together["code"] == "unproved":
        finding = f"{number} changes together cannot be proved: {together['reason']}"
    elif len(shown) > 1:
        finding = f"{number} changes together: {_finding(together)}"
    else:
        finding = f"{_name(shown[0])} changed: {_finding(together)}"
    unknown = unproved or proof["elsewhere"] or together["reason"]
    harmless = together["code"] == "same" and together["bitwise"] and not unknown
    style = "bold green" if harmless else "bold yellow"
    return Text(f"{proof['model']}: {finding}{rest}", style=style)


def _findings(rows: Sequence[Row], together: Row) -> RenderableType:
    cells = [_cells(_name(r), plain_value(r["before"]), plain_value(r["after"]), r) for r in rows]
    if len(rows) > 1:
        cells.append(_cells("all together", "", "", together))
    return Listing(headings=("OPTION", "BEFORE", "AFTER", "CODE", "RESULTS"), rows=tuple(cells))


def _reasons(rows: Sequence[Row]) -> RenderableType:
    """What cannot be proved, by reason."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["reason"], []).append(_name(row))
    return Listing(
        headings=("CANNOT BE PROVED HERE", "WHY"),
        rows=tuple((names(group), reason) for reason, group in groups.items()),
    )


def _cells(name: str, before: str, after: str, row: Row) -> tuple[str, ...]:
    if row["code"] == "unproved":
        return (name, before, after, "cannot be proved", row["reason"])
    if row["code"] == "together":
        return (name, before, after, "with the others", "")
    code = "same" if row["code"] == "same" else f"{row['units']} of {row['of']} differ"
    if row["bitwise"]:
        results = "equal"
    elif row["max_abs_diff"] is not None:
        results = f"max diff {row['max_abs_diff']:.2g}"
    else:
        results = "unknown" if row["bitwise"] is None else "differ"
    return (name, before, after, code, results)
