"""`vllmc warm`: compiles what is missing and stores it, or predicts what it would do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from vllmc.cli import report
from vllmc.cli.dump import write_dump
from vllmc.cli.job import make
from vllmc.cli.options import (
    CommonFlags,
    CompileFlags,
    RemoteFlags,
    WorkerFlags,
    command,
    compile_request,
)
from vllmc.cli.output import Output, error_fields
from vllmc.cli.settings import Settings, choice
from vllmc.cli.summary import write_summary
from vllmc.core.cache.redaction import scrub
from vllmc.core.cache.store import Store
from vllmc.core.errors import CheckFailed, UnsafeCacheError, UsageError, VllmcError
from vllmc.core.models.presets import DEFAULT_PRESET

if TYPE_CHECKING:
    from vllmc.core.cache.remote import Remote
    from vllmc.core.job import Job
    from vllmc.core.obtain import Policy
    from vllmc.core.pipeline import Ready
    from vllmc.core.prediction import Prediction
    from vllmc.core.workers.pool import WorkerPool

Row = dict[str, Any]
Weights: TypeAlias = Literal["fake", "real"]

WEIGHTS: tuple[Weights, ...] = ("fake", "real")
_PREDICTED = {"hit": "would-hit", "miss": "would-miss"}
PREDICTED_CODES = {
    "would-miss": CheckFailed.exit_code,
    "unknown": CheckFailed.exit_code,
    "unsafe": UnsafeCacheError.exit_code,
}


@command
def warm(
    compilation: CompileFlags,
    workers: WorkerFlags,
    remotes: RemoteFlags,
    common: CommonFlags,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            show_default="tiny-llama",
            help="module:attribute, a directory, a preset or a hub id.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="fake|real",
            show_default="fake",
            help="Whether to allocate and read the weights; compiling needs none.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compile nothing and predict: exit 0, 3 or 4.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Compile again what is stored already.")
    ] = False,
    dump: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write each piece's graph before and after the passes, and its code, below DIR; "
            "compiles again what is stored, as --force does.",
        ),
    ] = None,
    summary: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default="$GITHUB_STEP_SUMMARY when set",
            help="Append a Markdown summary to this file.",
        ),
    ] = None,
) -> int:
    """Compile every piece of a model for every compile range, and store the artifacts.

    outcome is hit where nothing had to be compiled, compiled where nothing was found, else
    partial; with --check would-hit (exit 0), would-miss or unknown (exit 3), or unsafe (exit 4).
    program says whether the program as a whole was found. There is one unit for each unique piece
    and range: hit (found), compiled, or dup (compiled, and the code turned out to be stored
    already under another key). pieces names every piece that shares the unit.

    With --json: model, key, outcome, program, pieces (total, splitting, compilable, unique; null
    where only capture shows them), counts (hit, dup, compiled), units (pieces, range, outcome,
    artifact, bytes, seconds), seconds (total, capture, compile, store), peak_rss_mb, miss (null, or
    nearest_key, nearest_model where it is another, and changes, as diff-config lists them),
    layer_names; with --check also reason. Several models give results, a list of these. They share
    workers and what is stored, and one that cannot be compiled does not stop the others: its
    outcome is failed, with reason and error (code, message, context, hint), and the exit code is
    the highest of the errors'. What is wrong with a name or an option stops all of them at once.

    Units are compiled by --jobs processes at once, on the CPU, by Inductor. A unit's seconds are
    its own; compile is the time in which at least one was at work. A worker that dies is
    reported, and its unit compiled once more, alone. peak_rss_mb is that of this process, without
    the workers.

    layer_names is null where the names of layers cost nothing. Where strings given to custom ops
    are all that tells pieces apart, it has unique (how many pieces there are), would_be (how many
    without the strings), ops (op, argument, values: how many strings, examples: the first and
    the last, pieces, fix), and what the pieces beyond would_be cost: compiled (units compiled now),
    seconds (in which they were) and bytes (of their artifacts, also those found). It is null too
    where nothing was captured: when the program was found, and with --check.

    passes is what each pass over the graphs did in what was captured and compiled now: name,
    matches, nodes_before and nodes_after of all graphs, seconds, and missed: null, or where the
    closest match failed of a pass that found none although its ops are there (graph, node,
    expected, found). -v shows it.

    With --remote, a program that the cache lacks is pulled from there, where it is and is trusted;
    what hinders that is one warning, and it is compiled. --check looks into the cache alone.

    --dump DIR holds for each unit a directory PIECE/RANGE with before.py and after.py, the graph
    as Inductor would lower it before and after the passes, and code.py, what it generated. Of the
    eager backend, code.py only.
    """
    settings = common.settings()
    output = common.output("warm")
    kind = choice("weights", settings.find("weights", _given(weights), default=("fake",)), WEIGHTS)
    if check and (force or dump is not None):
        asked = "--force" if force else "--dump"
        raise UsageError(
            "bad-value", f"--check compiles nothing, so it cannot {asked}", hint="leave one out"
        )
    store = settings.store()
    # All of them first, so that a mistake in the last is found before anything is compiled.
    todo = [
        make(settings, compile_request(settings, compilation, model))
        for model in models or [DEFAULT_PRESET]
    ]
    if check:
        rows = [predict_row(job, store) for job in todo]
        code = max(PREDICTED_CODES.get(row["outcome"], 0) for row in rows)
    else:
        with workers.pool(settings, [job.spec for job in todo]) as pool:
            from vllmc.core.obtain import Policy

            policy = Policy(force=force or dump is not None, texts=dump is not None)
            remote = remotes.find(settings)
            rows, code = _obtain(
                todo, store, output, pool, policy, weights=kind, dump=dump, remote=remote
            )
    if (path := _summary_file(settings, summary)) is not None:
        write_summary(path, rows)
    output.data(
        rows[0] if len(rows) == 1 else {"results": rows},
        lambda: report.warm(rows, verbose=common.verbose > 0),
    )
    if any(row["outcome"] == "unsafe" for row in rows):
        output.note(
            "hint: vllmc cache verify lists all that is bad; vllmc warm replaces what is corrupt"
        )
    return code


def _given(flag: str | None) -> tuple[str, ...]:
    return () if flag is None else (flag,)


def _summary_file(settings: Settings, flag: str | None) -> Path | None:
    values = settings.find("summary", _given(flag), default=()).values
    return Path(values[0]).expanduser() if values else settings.step_summary


def predict_row(job: Job, store: Store) -> Row:
    """The row of `warm --check`: what a warm would find in `store`."""
    from vllmc.core.prediction import predict

    return _check_row(job, predict(job, store))


def _obtain(
    todo: Sequence[Job],
    store: Store,
    output: Output,
    pool: WorkerPool | None,
    policy: Policy,
    *,
    weights: Weights,
    dump: Path | None,
    remote: Remote | None,
) -> tuple[list[Row], int]:
    """The rows, and the exit code: of several models one that fails does not stop the others."""
    from vllmc.core.pipeline import obtain_program

    rows, code = [], 0
    with output.progress() as observer:
        for job in todo:
            if len(todo) > 1:
                observer.stage(job.model.name)
            try:
                ready = obtain_program(
                    job,
                    store,
                    observer,
                    policy=policy,
                    weights=weights,
                    pool=pool,
                    remote=remote,
                )
                if dump is not None:
                    write_dump(dump if len(todo) == 1 else dump / job.label, ready)
            except VllmcError as error:
                if len(todo) == 1:
                    raise
                output.complain(error)
                rows.append(_failed_row(job, error))
                code = max(code, error.exit_code)
            else:
                rows.append(_row(job, ready))
    return rows, code


def _row(job: Job, ready: Ready) -> Row:
    return {
        "model": job.model.name,
        "key": job.key,
        "outcome": ready.outcome,
        "program": ready.program,
        "pieces": ready.record.pieces,
        "counts": {name: ready.count(name) for name in ("hit", "dup", "compiled")},
        "units": [
            {
                "pieces": list(unit.pieces),
                "range": unit.range,
                "outcome": unit.outcome,
                "artifact": unit.artifact,
                "bytes": len(unit.data),
                "seconds": round(unit.seconds, 4),
            }
            for unit in ready.units
        ],
        "seconds": {
            "total": round(ready.seconds.total, 4),
            "capture": round(ready.seconds.capture, 4),
            "compile": round(ready.seconds.compile, 4),
            "store": round(ready.seconds.store, 4),
        },
        "peak_rss_mb": _peak_rss_mb(),
        "miss": ready.miss and ready.miss.to_json(),
        "layer_names": ready.layer_names and ready.layer_names.to_json(),
        "passes": [report.to_json() for report in ready.passes],
    }


def _check_row(job: Job, prediction: Prediction) -> Row:
    units = prediction.units
    stored = sum(unit.artifact is not None for unit in units)
    return {
        "model": job.model.name,
        "key": job.key,
        "outcome": _PREDICTED.get(prediction.outcome, prediction.outcome),
        "program": prediction.program,
        "pieces": prediction.pieces,
        "counts": {"hit": stored, "dup": 0, "compiled": len(units) - stored},
        "units": [
            {
                "pieces": list(unit.pieces),
                "range": unit.range,
                "outcome": "compiled" if unit.artifact is None else "hit",
                "artifact": unit.artifact,
                "bytes": unit.bytes,
                "seconds": 0.0,
            }
            for unit in units
        ],
        "seconds": {"total": 0.0, "capture": 0.0, "compile": 0.0, "store": 0.0},
        "peak_rss_mb": _peak_rss_mb(),
        "reason": prediction.reason,
        "miss": prediction.miss and prediction.miss.to_json(),
        "layer_names": None,
        "passes": [],
    }


def _failed_row(job: Job, error: VllmcError) -> Row:
    return {
        "model": job.model.name,
        "key": job.key,
        "outcome": "failed",
        "program": "miss",
        "pieces": None,
        "counts": {"hit": 0, "dup": 0, "compiled": 0},
        "units": [],
        "seconds": dict.fromkeys(("total", "capture", "compile", "store"), 0.0),
        "peak_rss_mb": _peak_rss_mb(),
        "reason": scrub(error.message),
        "miss": None,
        "layer_names": None,
        "passes": [],
        "error": error_fields(error),
    }


def _peak_rss_mb() -> int:
    # `getrusage` would count what the process held that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) // 1024
