"""`vllmc warm`: compiles what is missing and stores it, or predicts what it would do."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from vllmc.cli import job as jobs
from vllmc.cli import report
from vllmc.cli.options import CommonFlags, CompileFlags, command, compile_request
from vllmc.cli.summary import write_summary
from vllmc.core.cache.store import Store
from vllmc.core.errors import CheckFailed, UnsafeCacheError, UsageError

if TYPE_CHECKING:
    from vllmc.core.job import Job
    from vllmc.core.pipeline import Ready
    from vllmc.core.prediction import Miss, Prediction

Row = dict[str, Any]

_PREDICTED = {"hit": "would-hit", "miss": "would-miss"}


@command
def warm(
    compilation: CompileFlags,
    common: CommonFlags,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            show_default="tiny-llama",
            help="module:attribute, a directory, a preset or a hub id.",
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(metavar="fake|real", help="Whether to allocate and read the weights."),
    ] = "fake",
    check: Annotated[
        bool, typer.Option("--check", help="Compile nothing and predict: exit 0, 3 or 4.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Compile again what is stored already.")
    ] = False,
    summary: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="$GITHUB_STEP_SUMMARY when set",
            help="Append a Markdown summary to this file.",
        ),
    ] = None,
) -> int:
    """Compile every piece of a model for every compile range, and store the artifacts."""
    if weights not in ("fake", "real"):
        raise UsageError("bad-value", f"'{weights}' is no kind of weights", hint="fake or real")
    if check and force:
        raise UsageError("bad-value", "--check compiles nothing, so it cannot --force")
    settings = common.settings()
    output = common.output("warm")
    store = Store(settings.cache_dir)
    rows: list[Row] = []
    with output.progress() as observer:
        for model in models or [None]:
            job = jobs.make(settings, compile_request(settings, compilation, model))
            from vllmc.core.obtain import Policy
            from vllmc.core.pipeline import obtain_program
            from vllmc.core.prediction import predict

            if check:
                rows.append(_check_row(job, predict(job, store)))
                continue
            ready = obtain_program(
                job,
                store,
                observer,
                policy=Policy(force=force),
                weights=cast("Literal['fake', 'real']", weights),
            )
            rows.append(_row(job, ready))
    output.data(
        rows[0] if len(rows) == 1 else {"results": rows},
        lambda: report.warm(rows),
    )
    if (path := summary or settings.step_summary) is not None:
        write_summary(path, rows)
    return _exit_code(rows)


def _exit_code(rows: list[Row]) -> int:
    codes = {
        "would-miss": CheckFailed.exit_code,
        "unknown": CheckFailed.exit_code,
        "unsafe": UnsafeCacheError.exit_code,
    }
    return max(codes.get(row["outcome"], 0) for row in rows)


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
        "miss": miss_row(ready.miss),
    }


def _check_row(job: Job, prediction: Prediction) -> Row:
    found = prediction.found
    units = found.record.units if found else ()
    return {
        "model": job.model.name,
        "key": job.key,
        "outcome": _PREDICTED.get(prediction.outcome, prediction.outcome),
        "program": "hit" if prediction.outcome == "hit" else "miss",
        "pieces": found.record.pieces if found else None,
        "counts": {"hit": len(units), "dup": 0, "compiled": 0},
        "units": [
            {
                "pieces": list(unit.pieces),
                "range": unit.range,
                "outcome": "hit",
                "artifact": unit.artifact,
                "bytes": len(found.artifacts[unit.artifact]) if found else 0,
                "seconds": 0.0,
            }
            for unit in units
        ],
        "seconds": {"total": 0.0, "capture": 0.0, "compile": 0.0, "store": 0.0},
        "peak_rss_mb": _peak_rss_mb(),
        "reason": prediction.reason,
        "miss": miss_row(prediction.miss),
    }


def miss_row(miss: Miss | None) -> Row | None:
    """The `miss` object of `warm --json`."""
    if miss is None:
        return None
    return {"nearest_key": miss.nearest_key, "changes": [c.to_json() for c in miss.changes]}


def _peak_rss_mb() -> int:
    # Linux reports kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
