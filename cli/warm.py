"""`vllmc warm`: compiles what is missing and stores it, or predicts what it would do."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from vllmc.cli import report
from vllmc.cli.dump import dump_places, write_dump
from vllmc.cli.matrix import read_matrix
from vllmc.cli.option_table import choice
from vllmc.cli.options import CommonFlags, CompileFlags, RemoteFlags, WorkerFlags, command
from vllmc.cli.output import Output
from vllmc.cli.paths import expanded
from vllmc.cli.prewarm import Attempt, Batch, Result, Task, matrix_tasks, named_tasks, told_rows
from vllmc.cli.settings import Settings
from vllmc.cli.warm_reports import ReportFlags
from vllmc.cli.warm_rows import Head, Row, predicted_row, ready_row
from vllmc.core.cache.store import Store
from vllmc.core.errors import UsageError
from vllmc.core.models.presets import DEFAULT_PRESET

if TYPE_CHECKING:
    from vllmc.core.cache.remote import Remote
    from vllmc.core.events import Observer
    from vllmc.core.job import Job
    from vllmc.core.workers.pool import WorkerPool

Weights: TypeAlias = Literal["fake", "real"]

WEIGHTS: tuple[Weights, ...] = ("fake", "real")


@command
def warm(
    compilation: CompileFlags,
    workers: WorkerFlags,
    reports: ReportFlags,
    remotes: RemoteFlags,
    common: CommonFlags,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            show_default="tiny-llama",
            help="module:attribute, a directory, a preset or a hub id; with --vllm the arguments "
            "of vllm serve, behind --.",
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
    matrix: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Warm each entry of this matrix file: a model, and options as in vllmc.toml.",
        ),
    ] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With --check: would vllm serve, with the arguments behind --, hit vLLM's cache "
            "DIR?",
        ),
    ] = None,
    retries: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            show_default="0",
            help="Try again up to N times what failed, after all the others.",
        ),
    ] = None,
    dump: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write each piece's graph before and after the passes, and its code, below DIR; "
            "compiles again what is stored, as --force does.",
        ),
    ] = None,
) -> int:
    """Compile every piece of a model for every compile range, and store the artifacts.

    outcome is hit where nothing had to be compiled, compiled where nothing was found, else
    partial; with --check would-hit (exit 0), would-miss or unknown (exit 3), or unsafe (exit 4).
    program says whether the program as a whole was found. There is one unit for each unique piece
    and range: hit (found), compiled, or dup (compiled, and the code turned out to be stored
    already under another key). pieces names every piece that shares the unit.

    With --json: name (the model, or what --from calls it), model, key, outcome, program, pieces
    (total, splitting, compilable, unique; null where only capture shows them), counts (hit, dup,
    compiled), units (pieces, range, outcome, artifact, bytes, seconds), seconds (total, capture,
    compile, store), saved_seconds (what the units that were found took when they were compiled),
    attempts, peak_rss_mb, miss (null, or nearest_key, nearest_model where it is another, and
    changes, as diff-config lists them), layer_names; with --check also reason.
    docs/schema/warm.schema.json describes it.

    Several models give results, a list of these. They share workers and what is stored, and one
    that cannot be compiled does not stop the others: its outcome is failed, with reason and error
    (code, message, context, hint), and the exit code is the highest of all. What is wrong with a
    name or an option stops all of them at once.

    --from FILE reads a matrix file: TOML, in which a list of tables called warm has for each model
    its model, optionally a name, and options that shape the compilation as vllmc.toml has them,
    with tables inductor and functorch for -O. An entry beats the environment and vllmc.toml, flags
    beat all. A directory is looked for beside the file. It gives results, also of one entry. An
    entry whose model cannot be found fails alone, with null as its key. --retries tries again
    whatever did not fail for wrong usage. See docs/ci.md.

    On GitHub (GITHUB_ACTIONS=true) what failed or would miss is printed on stderr as an error
    annotation, what was stored once and missed, or failed at first, as a warning.

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
    matches, nodes_before and nodes_after of all graphs, seconds, and missed: null, or where of what
    it left, although its ops are there, the closest match failed (graph, node, expected, found).
    -v shows it.

    With --remote, a program that the cache lacks is pulled from there, where it is and is trusted;
    what hinders that is one warning, and it is compiled. --check looks into the cache alone.

    --check --vllm DIR -- ARGUMENTS asks the vLLM of this environment what vllm serve ARGUMENTS
    would hash, and looks in its cache DIR (VLLM_CACHE_ROOT) for an entry of which
    vllmc_factors.json says the same, and whose traced sources are unchanged. It exits 0 or 3. The
    key is null and units are empty; vllm has key (of the entry that is meant), trees (in which vLLM
    would look) and not_known, what cannot be predicted. See docs/vllm.md.

    --dump DIR holds for each unit a directory PIECE/RANGE with before.py and after.py, the graph
    as Inductor would lower it before and after the passes, and code.py, what it generated. Of the
    eager backend, code.py only. Of several models, each has a directory of its own below DIR.
    """
    settings = common.settings()
    output = common.output("warm")
    if vllm is not None:
        given = {
            f"--{f.name.replace('_', '-')}": getattr(flags, f.name)
            for flags in (compilation, reports, remotes)
            for f in fields(flags)
        }
        others = {"--from": matrix, "--weights": weights, "--force": force, "--dump": dump}
        _refuse("--vllm", vllm, given | others | {"--retries": retries})
        return _check_vllm(vllm, models or (), output, check=check)
    kind = choice("weights", settings.find("weights", _given(weights), default=("fake",)), WEIGHTS)
    _refuse("--check", check, {"--force": force, "--dump": dump})
    _refuse("--from", matrix, {"MODEL": models, "--dump": dump})
    if reports.code_quality is not None and matrix is None:
        raise UsageError(
            "bad-value",
            "--code-quality shows what is found at the entries of a matrix file",
            hint="name the models in one: --from FILE",
        )
    again = _times(retries)
    reports.check(settings)
    store = settings.store()
    started = time.time()
    # All of them first, so that a mistake in the last is found before anything is compiled.
    batch = Batch(_tasks(settings, compilation, models, matrix))
    try:
        if check:
            with output.progress() as observer:
                batch.run(_predicting(store), observer, output, retries=again)
        else:
            pooled = workers.pool(settings, [job.spec for job in batch.jobs])
            with pooled as pool, output.progress() as observer:
                jobs = () if dump is None else batch.jobs
                places = () if dump is None else dump_places(dump, jobs)
                dumps = {id(job): place for job, place in zip(jobs, places, strict=True)}
                how = _How(weights=kind, force=force, dumps=dumps, remote=remotes.find(settings))
                warming = _warming(store, observer, pool, how)
                batch.run(warming, observer, output, retries=again)
    except KeyboardInterrupt:
        reports.write(settings, output, batch.results, started=started)
        raise
    written = reports.write(settings, output, batch.results, started=started)
    done = _report(output, batch.results, several=batch.several, verbose=common.verbose > 0)
    return max(written, done)


def _check_vllm(directory: Path, arguments: Sequence[str], output: Output, *, check: bool) -> int:
    from vllmc.cli.warm_vllm import check_vllm

    if not check:
        raise UsageError(
            "bad-value",
            "--vllm predicts a start of vLLM's, and compiles nothing",
            hint="vllmc warm --check --vllm DIR -- ARGUMENTS; vLLM itself fills its cache",
        )
    return check_vllm(directory, arguments, output)


def _refuse(name: str, given: object, others: Mapping[str, object]) -> None:
    """Raises `UsageError` where an option is given with one of those that exclude it."""
    for other, value in others.items():
        if given and value:
            raise UsageError(
                "bad-value", f"{name} and {other} exclude each other", hint="leave one out"
            )


def _given(flag: str | None) -> tuple[str, ...]:
    return () if flag is None else (flag,)


def _times(retries: str | None) -> int:
    if retries is None:
        return 0
    if not re.fullmatch(r"\d{1,4}", retries):
        raise UsageError(
            "bad-value", f"'{retries}' is no number of retries", hint="for example --retries 2"
        )
    return int(retries)


def _tasks(
    settings: Settings, flags: CompileFlags, models: Sequence[str] | None, matrix: Path | None
) -> tuple[Task, ...]:
    if matrix is None:
        return named_tasks(settings, flags, models or [DEFAULT_PRESET])
    return matrix_tasks(settings, flags, read_matrix(expanded(matrix)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """How to warm. `dumps` has where each job's dump goes, by its `id`; none where none is."""

    weights: Weights
    force: bool
    dumps: Mapping[int, Path]
    remote: Remote | None


def _predicting(store: Store) -> Attempt:
    def attempt(job: Job, head: Head) -> Row:
        return predicted_row(head, job, store)

    return attempt


def _warming(store: Store, observer: Observer, pool: WorkerPool | None, how: _How) -> Attempt:
    from vllmc.core.obtain import Policy
    from vllmc.core.pipeline import obtain_program

    policy = Policy(force=how.force or bool(how.dumps), texts=bool(how.dumps))

    def attempt(job: Job, head: Head) -> Row:
        ready = obtain_program(
            job,
            store,
            observer,
            policy=policy,
            weights=how.weights,
            pool=pool,
            remote=how.remote,
        )
        if how.dumps:
            write_dump(how.dumps[id(job)], ready)
        return ready_row(head, job, ready, store)

    return attempt


def _report(output: Output, results: Sequence[Result], *, several: bool, verbose: bool) -> int:
    """Prints the rows, and returns the exit code. Raises what kept a single model from it."""
    rows = [result.row for result in results]
    if not several and (error := results[0].failure) is not None:
        raise error
    output.data(
        {"results": rows} if several else rows[0],
        lambda: report.warm(told_rows(results), verbose=verbose),
    )
    if any(row["outcome"] == "unsafe" for row in rows):
        output.note(
            "hint: vllmc cache verify lists all that is bad; vllmc warm replaces what is corrupt"
        )
    return max(result.exit_code for result in results)
